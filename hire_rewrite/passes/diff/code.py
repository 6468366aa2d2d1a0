"""A jaxpr as a diff reads it: equations with keys that are equal where they compute alike."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend import core as jex_core

from hire_rewrite import _compat
from hire_rewrite.graph.calls import structured_calls
from hire_rewrite.graph.source import PACKAGE, user_place
from hire_rewrite.passes.diff.keys import (
    constant_key,
    literal_key,
    plain_text,
    shown_params,
    type_of,
)


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
        place = user_place(self.eqn.source_info)
        if place is None or PACKAGE in Path(place[0]).parents:
            return "", 0, ""
        return place

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
        plain = {name: plain_text(param) for name, param in params.items() if not _has_jaxpr(param)}
        said = shown_params(eqn, plain)
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


def _has_jaxpr(param: Any) -> bool:
    items = param if isinstance(param, tuple | list) else (param,)
    return any(_compat.is_jaxpr(i) or isinstance(i, jax.stages.Traced) for i in items)
