"""A replacement that is one function of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.nodes import Node, Scope, Value
from hire_rewrite.sharding.manual import ManualSharding

Run = Callable[[Sequence[Any], Any, Any], tuple[Sequence[Any], Any]]
"""(inputs, layer: i32[], packed arrays) to outputs and a report."""


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """How a replacement runs in one call with others of the same inputs.

    Attributes:
      key: replacements that have equal ones can run together.
      start: (inputs, layer: i32[], states of all) to one result for each of them.
      finish: such a result to the outputs.
    """

    key: Hashable
    start: Callable[[Sequence[Any], Any, Sequence[Any]], Sequence[Any]]
    finish: Callable[[Any], Sequence[Any]]

    def run(self, ins: Sequence[Any], layer: Any, state: Any) -> tuple[Sequence[Any], None]:
        """A `Run` of one replacement alone."""
        (result,) = self.start(ins, layer, [state])
        return self.finish(result), None


@dataclasses.dataclass(frozen=True, eq=False)
class SiteReplacement:
    """Code that takes the place of some nodes of one scope.

    `run` is given the arrays that stand for `inputs`, the number of the layer, and `state`, the
    packed arrays of the site. It returns those of `outputs`, and a report, None without `reports`.
    `shards` is the `shard_map` around, over whose devices the leading axis of `state` is sharded;
    `loops` are the scans around in whose iterations it has weights of its own; `joint` says how it
    runs in one call with others, None for alone. `known` are reports that no data decide, by the
    name of the site.
    """

    name: str
    nodes: frozenset[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    run: Run
    state: Any = None
    shards: ManualSharding | None = None
    loops: tuple[Scope, ...] = ()
    reports: bool = False
    joint: Joint | None = None
    known: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def reported(self) -> tuple[str, ...]:
        """The names of the sites that it reports."""
        return (self.name, *self.known)

    def emit(
        self, ins: Sequence[Any], index: Mapping[Scope, Any], state: Any
    ) -> tuple[list[Any], Any]:
        """Outputs and a report (None for none).

        Args:
          index: the iteration of each scan around.
          state: the arrays of `state`; inside a `shard_map`, this device's.
        """
        run, layer = self.run, _layer_of(self.loops, index)
        specs = [_compat.explicit_spec(value.aval) for value in self.outputs]
        if any(spec is None for spec in specs):
            results, report = run(list(ins), layer, state)
        else:
            # Inside, the mesh's axes are the compiler's business; the results' types are kept.
            with jax.sharding.use_abstract_mesh(self.outputs[0].aval.sharding.mesh):
                run = jax.sharding.auto_axes(run, out_sharding=(specs, PartitionSpec()))
                results, report = run(list(ins), layer, state)
        for value, result in zip(self.outputs, results, strict=True):
            got = jax.typeof(result)
            if (got.shape, got.dtype) != (value.shape, value.dtype):
                raise HireRewriteError(
                    f"{self.name}: rewritten it would return {got.str_short()}, and the function "
                    f"returns {value.aval.str_short()}: this is a bug of its kind of site; leave "
                    "the site out with path= in a rule, and report it"
                )
        pairs = zip(results, self.outputs, strict=True)
        return [_compat.varying_like(result, value.aval) for result, value in pairs], report


def _layer_of(loops: Sequence[Scope], index: Mapping[Scope, Any]) -> Any:
    """The number of the current iteration among all of the scans `loops`, i32[]."""
    if not loops:
        return np.int32(0)
    layer = index[loops[0]]
    for scope in loops[1:]:
        layer = layer * scope.length + index[scope]
    return layer


def arguments(values: Iterable[Value]) -> tuple[Value, ...]:
    """Those of the values that have to be given: not the numbers of the program itself."""
    return tuple(dict.fromkeys(value for value in values if not value.is_constant))
