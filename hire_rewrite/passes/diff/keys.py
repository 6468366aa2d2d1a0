"""Keys of types, constants and parameters: equal where they are, and the same in every process."""

from __future__ import annotations

import dataclasses
import enum
import re
import zlib
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_rewrite import _compat

_UNSAID = frozenset({
    "inline", "keep_unused", "ctx_mesh", "ft_in", "ft_out", "num_consts", "num_carry", "linear",
    "donated_invars", "jaxpr", "unique_indices", "indices_are_sorted", "fill_value", "unroll",
    "cond_nconsts", "body_nconsts", "accuracy", "platforms", "branches_platforms",
    "symbolic_zeros", "out_avals", "result_avals",
})  # fmt: skip
"""Parameters that are compared but not shown: they say nothing to a reader."""
_IN_THE_TYPE = frozenset({
    "new_sizes", "shape", "new_dtype", "dtype", "preferred_element_type", "sharding",
})  # fmt: skip
"""Parameters that the type of the result shows already."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{6,}")
_LARGEST_CONSTANT = 4096
"""Numbers in a closed-over array that is compared by its values; larger ones by identity."""


def type_of(var: Any) -> str:
    """The type of a variable, as `f32[1,576]`."""
    if var is None:
        return ""
    aval = var.aval
    try:
        return str(aval.str_short(short_dtypes=True))
    except (AttributeError, TypeError):
        return str(aval)


def literal_key(atom: Any) -> Hashable:
    """Equal for literals of the same value and type."""
    return ("literal", type_of(atom), constant_key(atom.val))


def constant_key(array: Any) -> Hashable:
    """Equal for arrays of the same values, if they are small, or else for the same array."""
    if isinstance(array, jax.core.Tracer) or not hasattr(array, "dtype"):
        if isinstance(array, bool | int | float | complex | str):
            return repr(array)
        return ("array", id(array))
    small = getattr(array, "size", 0) <= _LARGEST_CONSTANT
    if isinstance(array, jax.Ref):  # its values change
        return ("array", id(array))
    if not small or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return ("array", id(array))
    values = np.asarray(array)
    return ("values", values.shape, str(values.dtype), values.tobytes())


def shown_params(eqn: Any, plain: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What of an equation's parameters a reader is shown.

    Args:
      plain: the parameters as text.
    """
    params, texts = _compat.call_params(eqn), dict(plain)
    if str(eqn.primitive) == "dot_general":
        del texts["dimension_numbers"]
        texts["contract"] = _contracted(params["dimension_numbers"])
    return tuple(
        (name, text)
        for name, text in sorted(texts.items())
        if name not in _UNSAID | _IN_THE_TYPE and text and not _unset(params.get(name, text))
    )


def plain_text(param: Any) -> str:
    """A parameter as text that is equal wherever the parameter is; what it is called, if it is a
    function or some other thing of JAX's."""
    if param is None or isinstance(param, bool | int | float | complex | str | np.generic):
        return str(param)
    if isinstance(param, np.dtype) or (isinstance(param, type) and issubclass(param, np.generic)):
        return np.dtype(param).name
    if isinstance(param, enum.Enum):
        return param.name
    if isinstance(param, tuple) and hasattr(param, "_fields"):
        return " ".join(f"{k}={plain_text(v)}" for k, v in zip(param._fields, param, strict=True))
    if isinstance(param, tuple | list):
        return "(" + ", ".join(map(plain_text, param)) + ("," if len(param) == 1 else "") + ")"
    if isinstance(param, dict):
        return "{" + ", ".join(f"{plain_text(k)}: {plain_text(v)}" for k, v in param.items()) + "}"
    if isinstance(param, np.ndarray | jax.Array):
        return f"array {zlib.crc32(repr(constant_key(param)).encode()):08x}"
    if isinstance(param, jax.sharding.Sharding | jax.sharding.PartitionSpec):
        return _ADDRESS.sub("", str(param))
    if isinstance(param, set | frozenset):
        return "{" + ", ".join(sorted(map(plain_text, param))) + "}"
    if dataclasses.is_dataclass(param):
        return _ADDRESS.sub("", repr(param))
    return str(getattr(param, "__name__", type(param).__name__))


def _contracted(numbers: Any) -> str:
    """The dimensions of a product, as `2·0`, and those of its batch."""
    (left, right), (batch, _) = numbers
    words = " ".join(f"{a}·{b}" for a, b in zip(left, right, strict=True))
    return f"{words} batch {','.join(map(str, batch))}" if batch else words


def _unset(param: Any) -> bool:
    """Whether a parameter says nothing: unset, off, or a function."""
    if isinstance(param, tuple | list):
        return all(map(_unset, param))
    unset = param is None or param is False or type(param).__name__ == "UnspecifiedValue"
    return unset or callable(param) or type(param).__name__ == "WrappedFun"
