"""What a plan says of the equations of the traced function, by where they stand."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.estimate import dense_times
from hire_rewrite.graph.nodes import Node
from hire_rewrite.passes.decision import Decision
from hire_rewrite.passes.detect import Detection
from hire_rewrite.passes.diff.value import Note
from hire_rewrite.plan import Plan

Path = tuple[int, ...]
"""An equation and those around it, outermost first, each by the identity of JAX's equation."""


@dataclasses.dataclass(frozen=True)
class Notes:
    """Notes by path, of each equation and of those around it, and the times of dense products."""

    notes: Mapping[Path, tuple[Note, ...]] = dataclasses.field(default_factory=dict)
    milliseconds: Mapping[Path, float] = dataclasses.field(default_factory=dict)

    def at(self, path: Path) -> tuple[Note, ...]:
        """The notes of an equation and of all inside it."""
        return self.notes.get(path, ())

    @functools.cached_property
    def _packed(self) -> frozenset[str]:
        return frozenset(note.packed for notes in self.notes.values() for note in notes)

    def is_packed(self, name: str) -> bool:
        """Whether a value of this name is an array that a site packed, with all of its layers."""
        return name.rpartition(":")[0] in self._packed - {""} and not name.endswith("]")


def notes_of(plan: Plan, decisions: Sequence[Decision], detection: Detection) -> Notes:
    """The notes of a transformed function's plan."""
    machine = machines.current()
    timed = machine.name != "bytes"
    rows = {id(site) for site in plan.sites}
    notes: dict[Path, dict[Note, None]] = collections.defaultdict(dict)
    times: dict[Path, float] = {}

    def add(node: Node, note: Note) -> None:
        path = path_of(node)
        for end in range(1, len(path) + 1):
            notes[path[:end]][note] = None

    for decision in decisions:
        if id(decision.row) not in rows:
            continue
        site, cost = decision.site, decision.cost
        known = None
        if timed and cost is not None:
            known = cost.dense / 1e6, cost.rewritten / 1e6
        row = decision.row
        note = Note(row.name, row.status, row.reason, row, decision.packed_name, known)
        last = site.linears[-1].node
        add(last, note)
        if decision.rewritten:
            part = dataclasses.replace(note, kind="part", milliseconds=None)
            for node in decision.nodes - {last}:
                add(node, part)
        if timed:
            each = dense_times(site, site.tokens, machine)
            for linear, time in zip(site.linears, each, strict=True):
                times[path_of(linear.node)] = time / 1e6
    # Deciding may have another reason for a layer than detection had.
    said = {dataclasses.replace(r, reason=""): r.reason for r in plan.rejected}
    for node, rejection in detection.rejected.items():
        reason = said.get(dataclasses.replace(rejection, reason=""))
        if reason is not None:
            add(node, Note(rejection.name, "rejected", reason))
    return Notes({path: tuple(found) for path, found in notes.items()}, times)


def path_of(node: Node) -> Path:
    """Where a node stands in the jaxpr that was flattened."""
    return tuple(map(id, reversed(list(node.eqns_around()))))
