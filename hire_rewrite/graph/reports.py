"""Sums of reports: pytrees of arrays, and of values that know how they are combined."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class Combines(Protocol):
    """A part of a report that is not added array by array; all zeros are its neutral value."""

    def combine(self, other: Any) -> Any:
        """What stands for both."""
        ...


def combine(total: Any, report: Any) -> Any:
    """What two reports of the same structure are together."""
    return jax.tree.map(
        lambda a, b: a.combine(b) if isinstance(a, Combines) else jnp.add(a, b),
        total,
        report,
        is_leaf=lambda part: isinstance(part, Combines),
    )
