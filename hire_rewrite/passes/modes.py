"""What takes the place of the sites of a call: the modes of their operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hire_rewrite.passes.decide import Decision
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


HIRE = Mode(_hire, differentiable=False, packs_on_sight=True)
EXACT = Mode(lambda decision, arrays: decision.op.exact(arrays), exact_form=True)
DENSE = Mode(lambda decision, arrays: decision.op.dense(arrays))

MODES = {"hire": HIRE, "exact": EXACT, "dense": DENSE}
"""By the name that a user gives to `transform`."""
