"""The jaxpr before and after, aligned: only what changed, with context.

Both are printed line by line and aligned by what lines compute (primitive, parameters, types); the
variables of the new jaxpr take the names of those that they are aligned with.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import string
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core as jex_core

from hire_rewrite import _compat
from hire_rewrite.graph.flatten import inner_jaxprs

_INDENT = "  "
_CONTEXT = 3
"""Unchanged lines shown around a change."""
_HIDDEN = frozenset({"inline", "keep_unused", "ctx_mesh", "ft_in", "ft_out", "num_consts"})


@dataclasses.dataclass(frozen=True, eq=False)
class Diff:
    """Two closed jaxprs; prints as a text diff.

    Attributes:
      before, after: the closed jaxprs.
    """

    before: Any
    after: Any

    @property
    def changed(self) -> bool:
        """Whether the jaxprs differ."""
        return any(mark != " " for mark, _ in self._marked())

    def __str__(self) -> str:
        """`- ` removed, `+ ` added, two spaces for context, `...` where lines are left out."""
        marked = self._marked()
        near = {
            j
            for i, (mark, _) in enumerate(marked)
            if mark != " "
            for j in range(i - _CONTEXT, i + _CONTEXT + 1)
        }
        # The line that opens a nested jaxpr says where a change inside it is.
        for i in sorted(near & set(range(len(marked)))):
            depth = _depth(marked[i][1])
            for j in range(i - 1, -1, -1):
                if _depth(marked[j][1]) < depth:
                    depth = _depth(marked[j][1])
                    near.add(j)
                if depth == 0:
                    break
        shown: list[str] = []
        for i, (mark, text) in enumerate(marked):
            if i in near:
                shown.append(f"{mark} {text}".rstrip())
            elif shown and shown[-1] != "...":
                shown.append("...")
        return "\n".join(shown)

    def _marked(self) -> list[tuple[str, str]]:
        old, new = _print(self.before), _print(self.after)
        fresh = map("".join, _letters())
        old_names: dict[Any, str] = {}
        for line in old:
            for var in line.binds:
                old_names.setdefault(var, next(fresh))
        matcher = difflib.SequenceMatcher(
            None, [line.key for line in old], [line.key for line in new], autojunk=False
        )
        blocks = matcher.get_opcodes()
        new_names: dict[Any, str] = {}
        pairs: list[tuple[_Line, _Line]] = []
        for tag, i1, i2, j1, j2 in blocks:
            if tag == "equal":
                pairs += zip(old[i1:i2], new[j1:j2], strict=True)
        for a, b in pairs:
            _adopt(a.binds, b.binds, old_names, new_names)
        # What replaces a result takes its name, so that its readers look unchanged.
        taken = set(new_names.values())
        for a, b in pairs:
            for v, w in _read_variables(a, b):
                if w not in new_names and old_names.get(v, "_") not in {*taken, "_"}:
                    new_names[w] = old_names[v]
                    taken.add(old_names[v])
        for line in new:
            for var in line.binds:
                if var not in new_names:
                    new_names[var] = next(fresh)
        marked: list[tuple[str, str]] = []
        for tag, i1, i2, j1, j2 in blocks:
            before = [line.render(old_names) for line in old[i1:i2]]
            after = [line.render(new_names) for line in new[j1:j2]]
            if tag != "equal":
                marked += [("-", text) for text in before] + [("+", text) for text in after]
                continue
            for was, now in zip(before, after, strict=True):
                marked += [(" ", was)] if was == now else [("-", was), ("+", now)]
        return marked


@dataclasses.dataclass(frozen=True, eq=False)
class _Line:
    """A line of a printed jaxpr: `binds` are named here, `reads` elsewhere."""

    depth: int
    what: str
    binds: Sequence[Any]
    reads: Sequence[Any]
    opens: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        if self.opens or not self.binds:
            return (self.depth, self.what)
        types = tuple(_type(v) for v in (*self.binds, *self.reads))
        return (self.depth, self.what, types)

    def render(self, names: dict[Any, str]) -> str:
        bound = " ".join(f"{names[var]}:{_type(var)}" for var in self.binds)
        read = " ".join(
            str(v.val) if isinstance(v, jex_core.Literal) else names.get(v, "_") for v in self.reads
        )
        equation = self.binds and not self.what.startswith("λ")
        text = f"{bound} = {self.what} {read}" if equation else f"{self.what} {bound}{read}"
        return _INDENT * self.depth + text.strip()


def _print(closed: Any, depth: int = 0, label: str = "") -> list[_Line]:
    jaxpr, _ = _compat.open_jaxpr(closed)
    lines = [_Line(depth, f"λ{label}", (*jaxpr.constvars, *jaxpr.invars), (), opens=True)]
    for eqn in jaxpr.eqns:
        shown, inner = [], []
        for name, param in sorted(eqn.params.items()):
            jaxprs = list(param) if isinstance(param, tuple | list) else [param]
            if jaxprs and all(map(_compat.is_jaxpr, jaxprs)):
                many = len(jaxprs) > 1
                inner += [(f"{name}[{i}]" if many else name, sub) for i, sub in enumerate(jaxprs)]
            elif name not in _HIDDEN and not _is_plain(param):
                shown.append(f"{name}={_short(param)}")
        what = f"{eqn.primitive}[{' '.join(shown)}]" if shown else str(eqn.primitive)
        if str(eqn.params.get("name", "")).startswith("hire_"):
            what += f" ({sum(map(_size, (sub for _, sub in inner)))} equations)"
            inner = []
        binds = [var for var in eqn.outvars if not isinstance(var, jex_core.DropVar)]
        lines.append(_Line(depth + 1, what, binds, eqn.invars, opens=bool(inner)))
        for name, sub in inner:
            lines += _print(sub, depth + 2, f" {name}")
    lines.append(_Line(depth + 1, "return", (), jaxpr.outvars))
    return lines


def _adopt(
    old: Sequence[Any], new: Sequence[Any], old_names: dict[Any, str], new_names: dict[Any, str]
) -> None:
    """Give variables of the new line the names of the first of equal type on the old one."""
    free = list(old)
    for var in new:
        same = next((v for v in free if _type(v) == _type(var)), None)
        if same is not None:
            free.remove(same)
            new_names.setdefault(var, old_names[same])


def _size(closed: Any) -> int:
    """Equations in a jaxpr and the jaxprs inside it."""
    jaxpr, _ = _compat.open_jaxpr(closed)
    return len(jaxpr.eqns) + sum(_size(sub) for eqn in jaxpr.eqns for sub in inner_jaxprs(eqn))


def _read_variables(a: _Line, b: _Line) -> list[tuple[Any, Any]]:
    """Variables that two aligned equations read in the same place."""
    if a.opens or len(a.reads) != len(b.reads):
        return []
    both = zip(a.reads, b.reads, strict=True)
    return [pair for pair in both if not any(isinstance(v, jex_core.Literal) for v in pair)]


def _is_plain(param: Any) -> bool:
    """Parameters that say nothing: unset, off, or functions."""
    return param is None or param is False or callable(param) or _unset(param)


def _unset(param: Any) -> bool:
    if not isinstance(param, tuple | list):
        return type(param).__name__ == "UnspecifiedValue"
    return all(item is None or item is False or _unset(item) for item in param)


def _short(param: Any) -> str:
    text = str(param)
    return text if len(text) <= 60 else text[:57] + "..."


def _type(var: Any) -> str:
    return var.aval.str_short(short_dtypes=True)


def _depth(text: str) -> int:
    return (len(text) - len(text.lstrip())) // len(_INDENT)


def _letters() -> Iterator[tuple[str, ...]]:
    for length in itertools.count(1):
        yield from itertools.product(string.ascii_lowercase, repeat=length)
