"""What takes the place of the sites of a call: the modes of their operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from hire_rewrite.passes.decision import Decision
from hire_rewrite.sites.replacement import SiteReplacement

Packing = Callable[[Decision, Any], list[SiteReplacement]]
"""A packed site and its arrays to its replacements."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to run a function.

    Attributes:
      packed: what takes the place of a packed site.
      differentiable: whether its gradient is that of what it computes.
      packs_on_sight: whether raw weights are packed at the first call.
      exact_form: whether sites on raw weights have their exact form, instead of the model's own.
    """

    packed: Packing
    differentiable: bool = True
    packs_on_sight: bool = False
    exact_form: bool = False


def _hire(decision: Decision, arrays: Any) -> list[SiteReplacement]:
    operation = decision.op
    return operation.rewritten(arrays) if decision.rewritten else operation.exact(arrays)


def decoded(decision: Decision, arrays: Any) -> list[SiteReplacement]:
    """A packed site rewritten as each token has it when it is decoded alone.

    What is measured is measured so: with many tokens in a call a site may be dense, or read more
    rows than one token does, and lose less than in decoding.
    """

    def silent(swap: SiteReplacement) -> SiteReplacement:
        def run(*operands: Any) -> tuple[Sequence[Any], None]:
            return swap.run(*operands)[0], None

        return dataclasses.replace(swap, run=run, reports=False)

    return [silent(swap) for swap in decision.op.measured(arrays, follow_exact=False)]


HIRE = Mode(_hire, differentiable=False, packs_on_sight=True)
EXACT = Mode(lambda decision, arrays: decision.op.exact(arrays), exact_form=True)
DENSE = Mode(lambda decision, arrays: decision.op.dense(arrays))

MODES = {"hire": HIRE, "exact": EXACT, "dense": DENSE}
"""By the name that a user gives to `transform`."""
