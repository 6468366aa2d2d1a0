"""Why something is not a site: a kind for programs and a sentence for people."""

from __future__ import annotations

import dataclasses
import enum

from hire_rewrite.graph.nodes import Node


class Refusal(enum.Enum):
    """The kind of reason for which a linear layer is not part of a site."""

    FROM_OUTSIDE = "no linear layer leads to it"
    UNKNOWN_OPERATION = "an operation stands in the way of which nothing is known"
    MIXES_POSITIONS = "its positions are not treated separately"
    MIXES_TOKENS = "its tokens do not stay as they are"
    READ_ELSEWHERE = "something in it is also read elsewhere"
    DIFFERENT_PRODUCTS = "its products do not fit each other"
    LOW_RANK = "a low-rank product"
    NOT_A_BLOCK = "two layers that are not a block"
    CHOSEN_AT_RUN_TIME = "its weight is chosen at run time"
    CONVOLUTION = "a convolution over several positions"
    TAKEN = "a part of it belongs to another site"
    TOO_NARROW = "too narrow for a vocabulary"
    CONTRACTED = "its output takes part in another product"
    NOT_LOGITS = "its output is not used as logits are"
    UNSUPPORTED = "a form of site that is not rewritten"


@dataclasses.dataclass(eq=False)
class NoMatch(Exception):  # noqa: N818 (a finding, not an error)
    """What stopped a match.

    Attributes:
      refusal: the kind of reason.
      reason: the reason, a sentence.
      node: the equation that stopped it.
      matched: how many equations had matched by then.
      intended: whether the layer was meant to be a site of this kind, by its shape.
    """

    refusal: Refusal
    reason: str
    node: Node
    matched: int = 1
    intended: bool = False

    def __str__(self) -> str:
        return self.reason


def closer(first: NoMatch | None, second: NoMatch) -> NoMatch:
    """Which of the refusals of two kinds of site says more about a layer.

    That of the kind that was meant, or else the one that got further; both together where neither
    got far.
    """
    if first is None:
        return second
    if first.intended != second.intended:
        return first if first.intended else second
    if second.matched > first.matched:
        return second
    if first.matched > 2:
        return first
    return dataclasses.replace(first, reason=f"{first.reason}; and {second.reason}")
