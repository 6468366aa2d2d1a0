"""Trace a function to a flattened jaxpr, and name its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.contents import ClosedOver
from hire_rewrite.graph.flatten import flatten
from hire_rewrite.graph.liveness import Liveness, liveness
from hire_rewrite.graph.nodes import Scope, Value
from hire_rewrite.graph.provenance import Provenance
from hire_rewrite.graph.varying import VaryingAxes
from hire_rewrite.names import unique


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a call, by its name; `position` is None where it was given by keyword."""

    name: str
    position: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """A function traced at some shapes.

    Attributes:
      closed: its closed jaxpr.
      scope: the same, flattened.
      weights: numbers of the inputs that hold weights.
      paths: the path of each input, as `params/layers/w_up`.
      arguments: the argument that each input is of.
      out_tree: the structure of its results.
      shardings: of the inputs that are weights and sharded over a mesh.
      closed_over: the arrays that it closes over.
    """

    closed: Any
    scope: Scope
    weights: tuple[int, ...]
    paths: tuple[str, ...]
    arguments: tuple[Argument, ...]
    out_tree: Any
    provenance: Provenance
    differences: VaryingAxes
    live: Liveness
    shardings: Mapping[Value, NamedSharding]
    closed_over: ClosedOver

    def path(self, root: Value) -> str:
        """The name of an input or of a closed-over array."""
        if root.const is not None:
            return f"closure[{'×'.join(map(str, root.shape))}]"
        return self.paths[self.scope.inputs.index(root)]


def trace(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    weights: Sequence[int],
) -> Trace:
    """Trace `fn` at the shapes of `args` and `kwargs` (arrays or `jax.ShapeDtypeStruct`s).

    Raises:
      HireRewriteError: an argument or a result is not an array.
    """
    leaves, in_tree = jax.tree_util.tree_flatten_with_path((tuple(args), dict(kwargs)))
    names = argument_names(fn, len(args))
    paths, holds_weights, arguments, places = [], [], [], []
    for number, (path, leaf) in enumerate(leaves):
        positional = path[0].idx == 0
        head = names[path[1].idx] if positional else str(path[1].key)
        rest = jax.tree_util.keystr(path[2:], simple=True, separator="/")
        paths.append(f"{head}/{rest}" if len(path) > 2 else head)
        arguments.append(Argument(head, path[1].idx if positional else None))
        held = positional and path[1].idx in weights
        if held:
            holds_weights.append(number)
        # What weights are told apart by in other functions, which may call the argument otherwise.
        places.append(f"{sorted(weights).index(path[1].idx)}:{rest}" if held else paths[-1])
        _check_leaf(paths[-1], leaf)
    # {"a/b": ...} and {"a": {"b": ...}} are written alike.
    paths, places = unique(paths), unique(places)

    @functools.wraps(fn, assigned=("__module__", "__name__", "__qualname__", "__doc__"), updated=())
    def flat(*arrays: Any) -> Any:
        call_args, call_kwargs = jax.tree_util.tree_unflatten(in_tree, arrays)
        return fn(*call_args, **call_kwargs)

    # JAX is to number the leaves in what it says, not to give them names of the function's.
    flat.__signature__ = _FLAT  # type: ignore[attr-defined]
    try:
        with jax.disable_jit(False):  # loops are to be loops, for a `Packed` made without it
            closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*(leaf for _, leaf in leaves))
    except (TypeError, ValueError) as error:
        message = _explained(fn, error, dict(zip(paths, (leaf for _, leaf in leaves), strict=True)))
        if message is None:
            raise
        raise HireRewriteError(message) from error
    scope = flatten(closed)
    return Trace(
        closed=closed,
        scope=scope,
        weights=tuple(holds_weights),
        paths=tuple(paths),
        arguments=tuple(arguments),
        out_tree=jax.tree_util.tree_structure(shapes),
        provenance=Provenance(scope, holds_weights, places),
        differences=VaryingAxes(scope),
        live=liveness(scope),
        shardings={
            scope.inputs[i]: sharding
            for i in holds_weights
            if (sharding := sharding_over_mesh(leaves[i][1]))
        },
        closed_over=ClosedOver(scope),
    )


def abstract(leaf: Any) -> Any:
    """The type of an array, a number or a `jax.ShapeDtypeStruct`, weak and sharded as it is, and as
    it differs from device to device inside a `shard_map`; of a `jax.Ref` its own type.

    Raises:
      HireRewriteError: it is an integer that JAX has no type for.
      TypeError: it is nothing that JAX computes with.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct) or _compat.is_ref(leaf):
        return leaf
    try:
        aval = jax.typeof(leaf)
    except OverflowError:
        raise HireRewriteError(
            f"the number {leaf} does not fit the integers that JAX has here: give a smaller one, "
            "or an array"
        ) from None
    if _compat.is_ref(aval):
        return aval
    sharding = aval.sharding if _compat.is_sharded_by_type(aval) else None
    kind: Any = {"weak_type": aval.weak_type, "sharding": sharding, **_compat.varying_type(aval)}
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, **kind)


def holds_numbers(leaf: Any) -> bool:
    """Whether a leaf is an array or a number, and neither a shape nor anything else."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return False
    try:
        abstract(leaf)
    except TypeError:
        return False
    return True


def placed(leaf: Any) -> Any:
    """The type of a weight: `abstract`, and how it lies on a mesh."""
    aval = abstract(leaf)
    if _compat.is_ref(aval):
        return aval
    sharding = sharding_over_mesh(leaf) or (None if leaf is aval else aval.sharding)
    kind: Any = {"weak_type": aval.weak_type, "sharding": sharding, **_compat.varying_type(aval)}
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, **kind)


def sharding_over_mesh(leaf: Any) -> NamedSharding | None:
    """The sharding of an array, or of a shape, that is sharded over a mesh."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return None
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return None
    parts = list(sharding.spec)
    while parts[-1] is None:  # equal layouts are to be written alike
        parts.pop()
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))


def _check_leaf(path: str, leaf: Any) -> None:
    try:
        abstract(leaf)
    except TypeError:
        raise HireRewriteError(
            f"argument {path} is a {type(leaf).__name__}, not an array: {_apart([path])}"
        ) from None


def _explained(fn: Callable[..., Any], error: Exception, leaves: Mapping[str, Any]) -> str | None:
    """What a user should change where a function cannot be traced; None if the error says it."""
    first = (str(error).splitlines() or [""])[0]
    if "not a valid JAX type" in first:
        return (
            f"{_name(fn)} returned a value that is not a JAX array: {first} Return arrays (or "
            "pytrees of them) alone, and keep other values outside."
        )
    static = isinstance(error, jax.errors.JAXTypeError) or "static argument" in first
    if not static:
        return None
    # JAX counts the leaves: `depends on the value of the argument arrays[13]`.
    told = [int(number) for number in re.findall(r"\barrays\[(\d+)\]", str(error))]
    paths = list(leaves)
    known = list(dict.fromkeys(paths[number] for number in told if number < len(paths)))
    numbers = known or [path for path, leaf in leaves.items() if getattr(leaf, "weak_type", False)]
    if numbers:
        return (
            f"{_name(fn)} needs the value of an argument that is traced as an array, "
            f"{'' if known else 'perhaps '}of {', '.join(numbers)}: {_apart(numbers)}. ({first})"
        )
    return None


_FLAT = inspect.Signature([inspect.Parameter("arrays", inspect.Parameter.VAR_POSITIONAL)])
"""The signature of a function of leaves."""


def _apart(paths: Sequence[str]) -> str:
    """How a user keeps values out of a function's arguments."""
    if any("/" in path for path in paths):
        return (
            "keep it out of the argument, which is for arrays alone, and close over it (Equinox: "
            "arrays, static = eqx.partition(model, eqx.is_array), see docs/guide/models.md)"
        )
    return "close over it (with functools.partial, say) instead of passing it"


def argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of the positional parameters, as far as the signature tells."""
    names: list[str] = []
    with contextlib.suppress(TypeError, ValueError):
        for name, parameter in inspect.signature(fn).parameters.items():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(name)
    names = names[:count]
    for i in range(len(names), count):
        name = f"arg{i}"
        while name in names:
            name += "_"
        names.append(name)
    return names


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", None) or type(fn).__name__


def trace_context() -> Any:
    """Equal wherever JAX would take a trace from its cache, as far as shapes do not matter.

    x64, matmul precision, promotion rules, the mesh, compute types and whatever else a version of
    JAX keys its traces by: the jaxpr that it has of a probe is another one in another context.
    """
    return _probe.trace(_PROBED).jaxpr


_probe = jax.jit(lambda x: x)
_PROBED = jax.ShapeDtypeStruct((), jax.numpy.float32)
