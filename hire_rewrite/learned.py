"""What calibration told about a site, as numbers that its sizes are decided by."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Learned", "Learnings"]


@dataclasses.dataclass(frozen=True)
class Learned:
    """Static numbers: they are part of a `Packed`'s type, not of its arrays.

    Attributes:
      k: the neurons that `k="auto"` found, or None.
      union: neurons that 1, 2, 4, ... tokens fetch together, on average, where each token has its
        candidates as often as the calibration had them.
    """

    k: int | None = None
    union: tuple[int, ...] = ()

    def fetched(self, tokens: int) -> int | None:
        """Neurons that so many tokens fetch together; None if it was not measured."""
        place = math.log2(max(tokens, 1))
        if place > len(self.union) - 1:
            return None
        low = self.union[math.floor(place)]
        high = self.union[math.ceil(place)]
        return math.ceil(low + (high - low) * (place - math.floor(place)))


Learnings = tuple[tuple[str, Learned], ...]
"""What calibration told about sites, by name."""
