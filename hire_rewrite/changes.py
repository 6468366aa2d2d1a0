"""The diff of a call: what was traced and what runs, with what the plan says of both."""

from __future__ import annotations

from typing import Any

from hire_rewrite.analysis import Analysis
from hire_rewrite.packed import Packed
from hire_rewrite.passes.diff import Diff, compare, notes_of

__all__ = ["compared"]


def compared(analysis: Analysis, name: str, packed: Packed | None, after: Any) -> Diff:
    """The traced function of this name beside the closed jaxpr of its call on `packed`."""
    paths = analysis.trace.paths
    others = [path for i, path in enumerate(paths) if i not in analysis.trace.weights]
    given = paths if packed is None else (*packed.paths, *others)
    results = [(i, i) for i in range(analysis.trace.out_tree.num_leaves)]
    notes = notes_of(analysis.plan, analysis.decisions, analysis.detection)
    closed = analysis.trace.closed, after
    names = name, f"{name}, rewritten"
    return compare(names, closed, (paths, given), results, analysis.plan, notes)
