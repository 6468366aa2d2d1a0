"""Trees of shapes as JSON: dicts, lists, tuples and None, as most models have them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def spec_to_json(leaf: Any) -> list[Any] | None:
    """A shape, dtype and weak type; None of what has more than these, as a `jax.Ref`."""
    if not isinstance(leaf, jax.ShapeDtypeStruct) or jnp.issubdtype(
        leaf.dtype, jax.dtypes.extended
    ):
        return None
    return [list(leaf.shape), leaf.dtype.name, bool(leaf.weak_type)]


def spec_from_json(item: Any) -> jax.ShapeDtypeStruct:
    """Of what `spec_to_json` returned.

    Raises:
      ValueError, TypeError: it is something else.
    """
    shape, dtype, weak = item
    return jax.ShapeDtypeStruct(shape_from_json(shape), dtype_of(dtype), weak_type=weak is True)


def shape_from_json(shape: Any) -> tuple[int, ...]:
    """Raises ValueError unless it is a list of a few sizes."""
    if not isinstance(shape, list) or len(shape) > 32:
        raise ValueError(f"{shape!r:.80} is not a shape")
    if any(type(size) is not int or not 0 <= size < 2**48 for size in shape):
        raise ValueError(f"{shape!r:.80} is not a shape")
    return tuple(shape)


def dtype_of(name: Any) -> Any:
    """The dtype of this name, one of JAX's own too. Raises ValueError if there is none."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{name!r:.80} is not a dtype")
    return _DTYPES[name]


_NAMES = (
    "bool_ int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 float16 float32 "
    "float64 bfloat16 complex64 complex128 float4_e2m1fn float8_e3m4 float8_e4m3 "
    "float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
)
_DTYPES = {
    jnp.dtype(getattr(jnp, name)).name: jnp.dtype(getattr(jnp, name))
    for name in _NAMES.split()
    if hasattr(jnp, name)
}


_DEEPEST = 16
"""Of a tree: each of its nodes is three levels of JSON, of which `bounded.parse` reads 64."""


def tree_to_json(tree: Any) -> Any:
    """A tree of shapes; None if it has nodes of other types, or other leaves, or is too deep."""
    try:
        return {"tree": _to_json(tree, _DEEPEST)}
    except TypeError:
        return None


def tree_from_json(item: Any) -> Any:
    """Of what `tree_to_json` returned.

    Raises:
      ValueError, TypeError, KeyError: it is something else.
    """
    return _from_json(item["tree"])


def _to_json(tree: Any, deepest: int) -> Any:
    if not deepest:
        raise TypeError("too deep")
    if tree is None:
        return None
    if type(tree) is dict:
        if not all(type(key) in (str, int) for key in tree):
            raise TypeError("keys that are not in JSON")
        return {"dict": [[key, _to_json(value, deepest - 1)] for key, value in tree.items()]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_to_json(value, deepest - 1) for value in tree]}
    spec = spec_to_json(tree)
    if spec is None or tree.sharding is not None:
        raise TypeError("another leaf")
    return {"leaf": spec}


def _from_json(item: Any) -> Any:
    if item is None:
        return None
    ((kind, held),) = item.items()
    if kind == "leaf":
        return spec_from_json(held)
    if kind == "dict":
        found = {key: _from_json(value) for key, value in held if type(key) in (str, int)}
        if len(found) < len(held):
            raise ValueError("keys of a dict that are the same")
        return found
    if kind in ("list", "tuple"):
        values = [_from_json(value) for value in held]
        return tuple(values) if kind == "tuple" else values
    raise ValueError(f"{kind!r:.80} is not a kind of tree")
