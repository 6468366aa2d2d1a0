"""A jaxpr as a diff reads it: equations with keys that are equal where they compute alike."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import re
import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.extend import source_info_util

from hire_rewrite import _compat
from hire_rewrite.graph.calls import structured_calls

_UNSAID = frozenset({
    "inline", "keep_unused", "ctx_mesh", "ft_in", "ft_out", "num_consts", "num_carry", "linear",
    "donated_invars", "jaxpr", "unique_indices", "indices_are_sorted", "fill_value", "unroll",
    "cond_nconsts", "body_nconsts", "accuracy", "platforms", "branches_platforms",
    "symbolic_zeros",
})  # fmt: skip
"""Parameters that are compared but not shown: they say nothing to a reader."""
_IN_THE_TYPE = frozenset({
    "new_sizes", "shape", "new_dtype", "dtype", "preferred_element_type", "sharding",
})  # fmt: skip
"""Parameters that the type of the result shows already."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{6,}")
_LARGEST_CONSTANT = 4096
"""Numbers in a closed-over array that is compared by its values; larger ones by identity."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inner:
    """A jaxpr inside an equation.

    Attributes:
      label: the parameter that holds it.
      roles: for each of its inputs what it holds (see `graph.nodes.Input`) and of which operand;
        None for an operand that is not known.
      outputs: for each of its results the equation's result that it becomes, or None, and the
        inputs that it feeds in the next iteration.
      length: how often it runs in one run of the equation; None if that is not known.
    """

    label: str
    code: Code
    roles: tuple[tuple[str, int | None], ...]
    outputs: tuple[tuple[int | None, tuple[int, ...]], ...]
    length: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """One equation.

    Attributes:
      eqn: JAX's equation.
      key: equal for equations that compute the same from the same kinds of operands.
      params: what of its parameters a reader is shown.
      inner: the jaxprs inside it.
    """

    eqn: Any
    key: int
    params: tuple[tuple[str, str], ...]
    inner: tuple[Inner, ...]

    @property
    def primitive(self) -> str:
        return str(self.eqn.primitive)

    @property
    def name(self) -> str:
        """The name of a call, or of what a primitive is a call of."""
        return str(self.eqn.params.get("name") or "")

    @property
    def is_site(self) -> bool:
        """Whether it is the call of a rewritten site."""
        return self.name.startswith("hire_")

    @property
    def ins(self) -> Sequence[Any]:
        return self.eqn.invars

    @property
    def outs(self) -> Sequence[Any]:
        return self.eqn.outvars

    @functools.cached_property
    def source(self) -> tuple[str, int, str]:
        """File, line and function of the user's code; empty if JAX does not know."""
        place, _, function = source_info_util.summarize(self.eqn.source_info).partition(" (")
        found = re.match(r"(.*?):(\d+)", place)
        if found is None:
            return "", 0, ""
        return found[1], int(found[2]), function.rstrip(")")

    @functools.cached_property
    def primitives(self) -> collections.Counter[str]:
        """How often each primitive stands in it, at any depth outside of rewritten sites."""
        total = collections.Counter([self.primitive])
        for inner in () if self.is_site else self.inner:
            for line in inner.code.lines:
                total.update(line.primitives)
        return total


@dataclasses.dataclass(frozen=True, eq=False)
class Code:
    """A jaxpr: its inputs, constants with their arrays, equations and results."""

    inputs: Sequence[Any]
    constants: Mapping[Any, Any]
    lines: tuple[Line, ...]
    results: Sequence[Any]

    @functools.cached_property
    def size(self) -> int:
        """Its equations, those inside of others included."""
        return sum(1 + sum(inner.code.size for inner in line.inner) for line in self.lines)


class Reader:
    """Reads jaxprs; keys are comparable among all that one reader has read."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[int, tuple[Any, Code, int]] = {}

    def read(self, closed: Any) -> Code:
        """The code of a jaxpr, open or closed."""
        return self._read(closed)[0]

    def number(self, what: Hashable) -> int:
        """One number for all things that are equal."""
        return self._numbers.setdefault(what, len(self._numbers))

    def _read(self, closed: Any) -> tuple[Code, int]:
        if id(closed) in self._known:
            return self._known[id(closed)][1:]
        jaxpr, consts = _compat.open_jaxpr(closed)
        constants = dict(zip(jaxpr.constvars, consts, strict=False))
        lines = tuple(map(self._line, jaxpr.eqns))
        code = Code(jaxpr.invars, constants, lines, jaxpr.outvars)
        key = self.number(("code", *self._structure(code)))
        self._known[id(closed)] = closed, code, key  # held, so that its id stays its own
        return code, key

    def _structure(self, code: Code) -> list[Hashable]:
        """All that makes a jaxpr what it is, whatever its variables are called."""
        order: dict[Any, Hashable] = {v: constant_key(c) for v, c in code.constants.items()}
        for var in code.inputs:
            order[var] = (len(order), type_of(var))
        structure: list[Hashable] = [len(code.inputs)]
        for line in code.lines:
            structure.append((line.key, *(self._atom(v, order) for v in line.ins)))
            for var in line.outs:
                order[var] = len(order)
        return [*structure, tuple(self._atom(v, order) for v in code.results)]

    @staticmethod
    def _atom(atom: Any, order: Mapping[Any, Hashable]) -> Hashable:
        return literal_key(atom) if isinstance(atom, jex_core.Literal) else order.get(atom)

    def _line(self, eqn: Any) -> Line:
        inner, keys = self._inner(eqn)
        params = _compat.call_params(eqn)
        plain = {name: _plain(param) for name, param in params.items() if not _has_jaxpr(param)}
        if str(eqn.primitive) == "dot_general":
            plain["contract"] = _contracted(params["dimension_numbers"])
        said = tuple(
            (name, text)
            for name, text in sorted(plain.items())
            if name not in _UNSAID | _IN_THE_TYPE
            and text
            and not ("contract" in plain and name == "dimension_numbers")
            and not _unset(params.get(name, text))
        )
        types = tuple(map(type_of, (*eqn.invars, None, *eqn.outvars)))
        key = self.number((str(eqn.primitive), tuple(sorted(plain.items())), keys, types))
        return Line(eqn, key, said, inner)

    def _inner(self, eqn: Any) -> tuple[tuple[Inner, ...], tuple[int, ...]]:
        found: list[Inner] = []
        keys: list[int] = []
        operands: tuple[Any, ...] = tuple(range(len(eqn.invars)))
        if eqn.primitive in structured_calls:
            specs = structured_calls[eqn.primitive].bodies(eqn, operands)
            labels = ("cond", "body") if len(specs) == 2 and specs[0].length is None else ()
            for i, spec in enumerate(specs):
                code, key = self._read(spec.jaxpr)
                keys.append(key)
                label = labels[i] if str(eqn.primitive) == "while" and labels else "body"
                label = f"branch {i}" if str(eqn.primitive) == "cond" else label
                links = tuple((link.role, operands.index(link.outer)) for link in spec.inputs)
                outputs = tuple(
                    (out.outer, tuple(k for body, k in out.feeds if body == i))
                    for out in spec.outputs
                )
                found.append(Inner(label, code, links, outputs, spec.length))
            return tuple(found), tuple(keys)
        for name, param in sorted(_compat.call_params(eqn).items()):
            many = param if isinstance(param, tuple | list) else (param,)
            for i, item in enumerate(many):
                closed = item.jaxpr if isinstance(item, jax.stages.Traced) else item
                if not _compat.is_jaxpr(closed):
                    continue
                code, key = self._read(closed)
                keys.append(key)
                direct = len(code.inputs) == len(operands)
                roles = tuple(("const", j if direct else None) for j in range(len(code.inputs)))
                same = len(code.results) == len(eqn.outvars)
                outputs = tuple((j if same else None, ()) for j in range(len(code.results)))
                label = f"{name}[{i}]" if len(many) > 1 else name
                found.append(Inner(label, code, roles, outputs, 1))
        return tuple(found), tuple(keys)


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
    if not small or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return ("array", id(array))
    values = np.asarray(array)
    return ("values", values.shape, str(values.dtype), values.tobytes())


def _has_jaxpr(param: Any) -> bool:
    items = param if isinstance(param, tuple | list) else (param,)
    return any(_compat.is_jaxpr(i) or isinstance(i, jax.stages.Traced) for i in items)


def _plain(param: Any) -> str:
    """A parameter as text that is equal wherever the parameter is; what it is called, if it is a
    function or some other thing of JAX's."""
    if param is None or isinstance(param, bool | int | float | complex | str | np.generic):
        return str(param)
    if isinstance(param, np.dtype) or (isinstance(param, type) and issubclass(param, np.generic)):
        return np.dtype(param).name
    if isinstance(param, enum.Enum):
        return param.name
    if isinstance(param, tuple) and hasattr(param, "_fields"):
        return " ".join(f"{k}={_plain(v)}" for k, v in zip(param._fields, param, strict=True))
    if isinstance(param, tuple | list):
        return "(" + ", ".join(map(_plain, param)) + ("," if len(param) == 1 else "") + ")"
    if isinstance(param, dict):
        return "{" + ", ".join(f"{_plain(k)}: {_plain(v)}" for k, v in param.items()) + "}"
    if isinstance(param, np.ndarray | jax.Array):
        return f"array {zlib.crc32(repr(constant_key(param)).encode()):08x}"
    if isinstance(param, jax.sharding.Sharding | jax.sharding.PartitionSpec):
        return _ADDRESS.sub("", str(param))
    if isinstance(param, set | frozenset):
        return "{" + ", ".join(sorted(map(_plain, param))) + "}"
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
