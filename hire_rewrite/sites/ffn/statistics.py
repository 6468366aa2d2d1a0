"""What calibration tells about a block, as static numbers that its sizes and costs depend on."""

from __future__ import annotations

import dataclasses
import math

from hire_rewrite.ops.ffn.activity import Activity, expected_union, smallest_k
from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.sites.ffn.rule import FFN

TOKENS = (1, 2, 4, 8, 16, 32, 64)
"""For so many tokens in a call the rows that they share are estimated."""


@dataclasses.dataclass(frozen=True)
class FFNStatistics:
    """Static numbers: they are part of a `Packed`'s type, not of its arrays.

    Attributes:
      k: the neurons that `k="auto"` found, or None.
      union: neurons that 1, 2, 4, ... tokens gather together, on average, where each token has its
        candidates as often as the calibration had them.
    """

    k: int | None = None
    union: tuple[int, ...] = ()

    def gathered(self, tokens: int) -> int | None:
        """Neurons that so many tokens gather together; None if it was not measured."""
        place = math.log2(max(tokens, 1))
        if place > len(self.union) - 1:
            return None
        low = self.union[math.floor(place)]
        high = self.union[math.ceil(place)]
        return math.ceil(low + (high - low) * (place - math.floor(place)))


def ffn_statistics(active: Activity, spec: FFNSpec, rule: FFN, *, undecided: bool) -> FFNStatistics:
    """What the activity of a block, with a leading axis of layers, says about its sizes."""
    if undecided:
        return FFNStatistics(k=smallest_k(active, rule.keep, spec.groups) * spec.group)
    union = tuple(round(expected_union(active, n) * spec.group) for n in TOKENS)
    return FFNStatistics(k=spec.k_groups * spec.group if rule.k == "auto" else None, union=union)
