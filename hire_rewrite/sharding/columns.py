"""Over which axes of a mesh the contracted axes of a weight, or those of experts, are sharded.

The function's inputs say how they lie on a mesh; a weight is a view of one: sliced by a scan,
transposed, cast, reshaped. This follows the axes of the input to those of the weight. Where it
loses them, a site is packed with sharded rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from jax.extend.core import primitives as p

from hire_rewrite.graph.nodes import Node, Value
from hire_rewrite.graph.sources import body_of
from hire_rewrite.graph.trace import Trace, sharding_over_mesh
from hire_rewrite.graph.traits import Trait, has
from hire_rewrite.sharding.rows import mesh_axes

_Axes = tuple[frozenset[str], ...]
"""For each axis of an array the axes of the mesh over which it is sharded."""

_NONE = frozenset[str]()


def column_axes(trace: Trace, weight: Value, among: Sequence[int]) -> frozenset[str]:
    """The axes of the mesh over which some axes of a weight, such as those that are contracted, are
    sharded; none where that is not known."""
    axes = _axes_of(trace, weight)
    if axes is None:
        return _NONE
    columns = _NONE.union(*(axes[axis] for axis in among))
    others = (names for axis, names in enumerate(axes) if axis not in among)
    return _NONE if columns & _NONE.union(*others) else columns


def _axes_of(trace: Trace, value: Value) -> _Axes | None:
    """How a weight is sharded as far as its inputs say; None if that is not known."""
    empty = (_NONE,) * len(value.shape)
    if value.literal is not None:
        return empty
    if value.const is not None or value in trace.shardings:
        sharding = trace.shardings.get(value) or sharding_over_mesh(value.const)
        if sharding is None:
            return empty
        spec = (*sharding.spec, *(None,) * (len(empty) - len(sharding.spec)))
        return tuple(frozenset(mesh_axes(part)) for part in spec)
    if value.node is not None:
        return _result_axes(trace, value.node)
    if value.scope.parent is None:
        return empty
    body, i = body_of(value)
    outer = _axes_of(trace, body.inputs[i].outer)
    if outer is None or body.inputs[i].role != "slice":
        return outer
    return None if outer[0] else outer[1:]  # layers that lie apart lie so for rows alone


def _result_axes(trace: Trace, node: Node) -> _Axes | None:
    operands = [_axes_of(trace, operand) for operand in node.ins]
    known = [axes for axes in operands if axes is not None]
    if len(known) < len(operands):
        return None
    new = node.outs[0].shape
    if not any(names for axes in known for names in axes):
        return (_NONE,) * len(new)
    if has(node.primitive, Trait.POINTWISE):
        alike = [axes for axes in known if len(axes) == len(new)]
        return tuple(_NONE.union(*names) for names in zip(*alike, strict=True))
    old, first = node.ins[0].shape, known[0]
    if node.primitive is p.transpose_p:
        return tuple(first[axis] for axis in node.params["permutation"])
    if node.primitive is p.broadcast_in_dim_p:
        sources = {new: old for old, new in enumerate(node.params["broadcast_dimensions"])}
        return tuple(first[sources[i]] if i in sources else _NONE for i in range(len(new)))
    if node.primitive in (p.reshape_p, p.squeeze_p):
        return _reshaped(first, old, new)
    if has(node.primitive, Trait.CUTS) and len(old) == len(new):
        cut = (names for names, a, b in zip(first, old, new, strict=True) if a != b)
        return None if any(cut) else first
    return None


def _reshaped(axes: _Axes, old: Sequence[int], new: Sequence[int]) -> _Axes:
    """Of axes that are merged or split the major one is sharded then."""
    result = [_NONE] * len(new)
    for olds, news in _runs(old, new):
        result[news[0]] = _NONE.union(*(axes[axis] for axis in olds))
    return tuple(result)


def _runs(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of axes of both shapes, those of size 1 left out, that hold the same elements."""
    olds, news = ([i for i, size in enumerate(shape) if size != 1] for shape in (old, new))
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (sizes := (_size(old, left), _size(new, right)))[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                left.append(olds.pop(0))
            else:
                right.append(news.pop(0))
        yield left, right


def _size(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)
