"""Random code behind a head: what samplers, losses and metrics are made of, put together by chance.

A program is a list of steps, each of which makes a value of a kind (see `operations`) of those
before.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from tests.fuzz.operations import OPERATIONS
from tests.fuzz.procedures import PROCEDURES

STEPS = OPERATIONS | PROCEDURES
KINDS = ("numbers", "mask", "places", "one", "token", "flag")
_RETURNED = ("mask", "token", "flag")


class Step(NamedTuple):
    """An operation, and the values that it reads: 0 is the logits, 1 given tokens."""

    name: str
    reads: tuple[int, ...]


class Program(NamedTuple):
    """Steps, and the numbers of the values that are returned: integers and conditions."""

    steps: tuple[Step, ...]
    returned: tuple[int, ...]

    def __call__(self, logits: Any, tokens: Any) -> tuple[Any, ...]:
        values = [logits, tokens]
        for step in self.steps:
            values.append(STEPS[step.name][2](*(values[i] for i in step.reads)))
        return (logits.argmax(-1), *(values[i] for i in self.returned))


def random_program(rng: random.Random, most: int = 6) -> Program:
    """A program whose values, but for the last, are read by others as a rule."""
    kinds = ["numbers", "token"]
    steps: list[Step] = []
    unread: set[int] = set()
    for _ in range(rng.randint(2, most)):
        able = [name for name, (_, reads, _) in STEPS.items() if {*reads} <= {"logits", *kinds}]
        makes = rng.choice(KINDS)
        name = rng.choice([n for n in able if STEPS[n][0] == makes] or able)
        made, reads, _ = STEPS[name]
        chosen = tuple(_one_of(rng, kind, kinds, unread) for kind in reads)
        unread -= set(chosen)
        unread.add(len(kinds))
        kinds.append(made)
        steps.append(Step(name, chosen))
    returned = [i for i in sorted(unread) if kinds[i] in _RETURNED]
    return Program(tuple(steps), tuple(returned))


def _one_of(rng: random.Random, kind: str, kinds: list[str], unread: set[int]) -> int:
    """The number of a value of a kind, one that nobody read yet if there is any."""
    if kind == "logits":
        return 0
    all_of_kind = [i for i, k in enumerate(kinds) if k == kind]
    fresh = [i for i in all_of_kind if i in unread]
    return rng.choice(fresh if fresh and rng.random() < 0.8 else all_of_kind)
