"""The diff of two functions: what they are given, the rows of their jaxprs, and its forms."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TextIO

import jax

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.files import local, write
from hire_rewrite.graph.trace import Trace, trace
from hire_rewrite.passes.diff.align import align
from hire_rewrite.passes.diff.build import Builder
from hire_rewrite.passes.diff.code import Code, Reader
from hire_rewrite.passes.diff.graph import to_dot, to_model_explorer
from hire_rewrite.passes.diff.keys import type_of
from hire_rewrite.passes.diff.notes import Notes
from hire_rewrite.passes.diff.page import to_html, to_notebook
from hire_rewrite.passes.diff.reads import size_of
from hire_rewrite.passes.diff.record import to_json
from hire_rewrite.passes.diff.text import in_color, text
from hire_rewrite.passes.diff.value import Argument, Block, Region
from hire_rewrite.plan import Plan


@dataclasses.dataclass(frozen=True, eq=False)
class Diff:
    """Two functions' jaxprs, aligned by what equations compute and what they read.

    Prints as text; a notebook shows it as HTML.

    Examples:
      >>> import jax.numpy as jnp, hire_rewrite as hire
      >>> changes = hire.diff(lambda x: jnp.exp(jnp.sin(x)), lambda x: jnp.exp(x * 2), 1.0)
      >>> changes
      Diff(1 region, 1 equation → 1, of 2)
      >>> region = changes.regions[0]
      >>> region.before[0].primitive, region.after[0].primitive
      ('sin', 'mul')

    Attributes:
      names: what the functions are called.
      before, after: the closed jaxprs.
      block: all rows, in order (see `Block`).
      arguments: the arrays that either function is given, by path.
      sizes: equations of both, at any depth.
      plan: of the transformed function; None where two functions are compared.
    """

    names: tuple[str, str]
    before: Any
    after: Any
    block: Block
    arguments: tuple[Argument, ...]
    sizes: tuple[int, int]
    plan: Plan | None = None

    @property
    def changed(self) -> bool:
        """Whether the functions differ."""
        return self.block.changed

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """What changed, at any depth, in order."""
        return tuple(self.block.regions())

    @property
    def bytes(self) -> tuple[int, int]:
        """What the regions read in one call, before and after."""
        reads = [region.bytes for region in self.regions]
        return sum(before for before, _ in reads), sum(after for _, after in reads)

    @property
    def milliseconds(self) -> tuple[float, float] | None:
        """Estimated for the regions with sites, before and after; None if nothing is known."""
        known = [r.milliseconds for r in self.regions if r.milliseconds is not None]
        return (sum(b for b, _ in known), sum(a for _, a in known)) if known else None

    def __str__(self) -> str:
        """Plain text: what changed, with the site, the rule and the bytes of each region; layers
        that changed alike are shown once, with their number. Empty if nothing changed."""
        return text(self)

    def __repr__(self) -> str:
        gone = sum(len(region.before) for region in self.regions)
        new = sum(len(region.after) for region in self.regions)
        count = len(self.regions)
        regions = f"{count} region{'s' * (count != 1)}"
        return f"Diff({regions}, {gone} equation{'s' * (gone != 1)} → {new}, of {self.sizes[0]})"

    def _repr_html_(self) -> str:
        return to_notebook(self)

    def show(self, file: TextIO | None = None) -> None:
        """Print it, in color if `file` (standard output) is a terminal and `NO_COLOR` is unset."""
        file = sys.stdout if file is None else file
        print(text(self, color=in_color(file)), file=file)

    def to_html(self) -> str:
        """One HTML document that loads nothing: both sides beside each other, with links to the
        lines of code, a search field and a map of the changes."""
        return to_html(self)

    def to_json(self, path: str | None = None) -> str:
        """The diff as JSON, equal wherever it is made; written to `path` if it is given.

        Examples:
          >>> import json, jax.numpy as jnp, hire_rewrite as hire
          >>> changes = hire.diff(jnp.sin, jnp.cos, jnp.ones(3))
          >>> json.loads(changes.to_json())["regions"][0]["bytes"]
          [12, 12]
        """
        written = to_json(self)
        if path is not None:
            write("to_json", path, written + "\n")
        return written

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, in the form that the name's ending says: `.html`, `.json`, `.dot`
        (for Graphviz), or text in `.txt` and `.diff`.

        Raises:
          HireRewriteError: it has another ending, or cannot be written.

        Examples:
          >>> import jax.numpy as jnp, hire_rewrite as hire
          >>> import pathlib, tempfile
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     file = pathlib.Path(folder, "step.html")
          ...     hire.diff(jnp.sin, jnp.cos, jnp.ones(3)).save(file)
          ...     file.read_text(encoding="utf-8")[:15]
          '<!doctype html>'
        """
        forms = {".html": to_html, ".htm": to_html, ".json": to_json, ".dot": to_dot}
        forms |= {".txt": text, ".diff": text}
        name = local("diff", path)
        form = forms.get(os.path.splitext(name)[1].lower())
        if form is None:
            raise HireRewriteError(f"diff: {name} has to end in .html, .json, .dot, .txt or .diff")
        write("diff", name, form(self) + "\n")

    def to_dot(self) -> str:
        """Both graphs in the language of Graphviz, what is in both once: red went, green came."""
        return to_dot(self)

    def to_model_explorer(self) -> str:
        """Both graphs in the JSON format of Google's model-explorer, with what each equation reads
        and what the plan says of it."""
        return to_model_explorer(self)


def compare(
    names: tuple[str, str],
    closed: tuple[Any, Any],
    paths: tuple[Sequence[str], Sequence[str]],
    results: Sequence[tuple[int, int]],
    plan: Plan | None = None,
    notes: Notes | None = None,
) -> Diff:
    """The diff of two jaxprs.

    Args:
      names: what they are called.
      closed: the jaxprs.
      paths: the path of each input of both; those of one path and type hold equal values.
      results: pairs of numbers of results that mean the same.
      plan, notes: of a transformed function.
    """
    reader = Reader()
    before, after = (reader.read(each) for each in closed)
    paths = _distinct(paths[0]), _distinct(paths[1])
    inputs = [
        [(path, type_of(var)) for path, var in zip(those, code.inputs, strict=True)]
        for those, code in zip(paths, (before, after), strict=True)
    ]
    arguments = _arguments(paths, (before, after))
    aligned = align(reader, before, after, (inputs[0], inputs[1]), results)
    builder = Builder(notes or Notes(), [*paths[0], *paths[1]])
    given = [
        dict(zip(code.inputs, those, strict=True))
        for those, code in zip(paths, (before, after), strict=True)
    ]
    block = builder.block(aligned, given[0], given[1])
    return Diff(names, *closed, block, arguments, (before.size, after.size), plan)


def compare_functions(
    f: Callable[..., Any], g: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Diff:
    """The diff of two functions of the same arguments.

    Raises:
      HireRewriteError: one of them cannot be traced with these arguments.
    """
    traces = [trace(fn, args, kwargs, ()) for fn in (f, g)]
    closed = [_unwrapped(one.closed) for one in traces]
    paths = traces[0].paths  # the second may call its parameters otherwise
    names = tuple(getattr(fn, "__name__", None) or type(fn).__name__ for fn in (f, g))
    return compare(
        (names[0], names[1]), (closed[0], closed[1]), (paths, paths), _result_pairs(*traces)
    )


def _result_pairs(f: Trace, g: Trace) -> list[tuple[int, int]]:
    """Results of one path; if the trees differ, those of one type too, in order."""
    if f.out_tree == g.out_tree:
        return [(i, i) for i in range(f.out_tree.num_leaves)]
    trees = [jax.tree.unflatten(t.out_tree, range(t.out_tree.num_leaves)) for t in (f, g)]
    found: list[dict[Hashable, int]] = [
        {jax.tree_util.keystr(path): n for path, n in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in trees
    ]
    pairs = [(n, found[1][path]) for path, n in found[0].items() if path in found[1]]
    left = [
        [n for n in range(t.out_tree.num_leaves) if all(pair[side] != n for pair in pairs)]
        for side, t in enumerate((f, g))
    ]
    return sorted([*pairs, *zip(*left, strict=False)])


def _unwrapped(closed: Any) -> Any:
    """What a function that is jitted as a whole runs."""
    while True:
        jaxpr, _ = _compat.open_jaxpr(closed)
        if len(jaxpr.eqns) != 1 or jaxpr.constvars:
            return closed
        (eqn,) = jaxpr.eqns
        whole = list(eqn.invars) == list(jaxpr.invars) and list(eqn.outvars) == list(jaxpr.outvars)
        if str(eqn.primitive) not in ("jit", "pjit") or not whole:
            return closed
        closed = eqn.params["jaxpr"]


def _distinct(paths: Sequence[str]) -> list[str]:
    """Paths, numbered where keys with a slash in them make two of them one."""
    seen: collections.Counter[str] = collections.Counter()
    distinct = []
    for path in paths:
        seen[path] += 1
        distinct.append(path if seen[path] == 1 else f"{path}#{seen[path]}")
    return distinct


def _arguments(
    paths: tuple[Sequence[str], Sequence[str]], codes: tuple[Code, Code]
) -> tuple[Argument, ...]:
    sides = [
        dict(zip(those, code.inputs, strict=True))
        for those, code in zip(paths, codes, strict=True)
    ]  # fmt: skip
    arguments = []
    for path in dict.fromkeys((*paths[0], *paths[1])):
        old, new = (side.get(path) for side in sides)
        types = [None if var is None else type_of(var) for var in (old, new)]
        size = next(size_of(var.aval) for var in (old, new) if var is not None)
        arguments.append(Argument(path, types[0], types[1], size))
    return tuple(arguments)
