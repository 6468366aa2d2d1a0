"""A diff as JSON, for programs: what is in it changes with its version alone."""

from __future__ import annotations

import json
from typing import Any

from hire_rewrite.passes.diff.value import Equation, Note, Region

VERSION = 1


def to_json(diff: Any) -> str:
    """A `Diff` as JSON; equal for equal diffs, wherever they are made."""
    return json.dumps(record(diff), indent=1, ensure_ascii=False)


def record(diff: Any) -> dict[str, Any]:
    """A `Diff` as plain values."""
    plan = diff.plan
    return {
        "format": "hire_rewrite.diff",
        "version": VERSION,
        "names": list(diff.names),
        "changed": diff.changed,
        "equations": list(diff.sizes),
        "bytes": list(diff.bytes),
        "milliseconds": _times(diff.milliseconds),
        "arguments": [
            {"path": a.path, "before": a.before, "after": a.after, "bytes": a.bytes}
            for a in diff.arguments
        ],
        "sites": [] if plan is None else [_site(site) for site in plan.sites],
        "rejected": []
        if plan is None
        else [
            {"name": r.name, "shape": list(r.shape), "reason": r.reason, "source": r.source}
            for r in plan.rejected
        ],
        "regions": [_region(region) for region in diff.regions],
    }


def _site(site: Any) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "status": site.status,
        "reason": site.reason,
        "rule": None if site.rule is None else repr(site.rule),
        "repeats": site.repeats,
        "bytes": [site.bytes_before, site.bytes_after],
        "expected": None if site.expected is None else round(site.expected, 4),
        "source": site.source,
    }


def _region(region: Region) -> dict[str, Any]:
    return {
        "inside": list(region.inside),
        "runs": region.runs,
        "sites": [site.name for site in region.sites],
        "rules": [repr(rule) for rule in region.rules],
        "bytes": list(region.bytes),
        "milliseconds": _times(region.milliseconds),
        "notes": [_note(note) for note in region.notes],
        "before": [_equation(equation) for equation in region.before],
        "after": [_equation(equation) for equation in region.after],
    }


def _note(note: Note) -> dict[str, Any]:
    return {"name": note.name, "kind": note.kind, "reason": note.reason}


def _equation(equation: Equation) -> dict[str, Any]:
    milliseconds = equation.milliseconds
    return {
        "results": [{"name": name, "type": kind} for name, kind in equation.results],
        "primitive": equation.primitive,
        "name": equation.name,
        "params": dict(equation.params),
        "reads": list(equation.reads),
        "source": equation.place,
        "function": equation.function,
        "bytes": equation.bytes,
        "milliseconds": None if milliseconds is None else round(milliseconds, 6),
        "inner": [
            {"label": inner.label, "equations": [_equation(each) for each in inner.equations]}
            for inner in equation.inner
        ],
    }


def _times(milliseconds: tuple[float, float] | None) -> list[float] | None:
    return None if milliseconds is None else [round(time, 6) for time in milliseconds]
