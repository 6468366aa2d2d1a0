"""How a match failed."""

from __future__ import annotations

from hire_rewrite.graph.nodes import Node

__all__ = ["Contracted", "Miss"]


class Miss(Exception):  # noqa: N818 (a finding, not an error)
    """A near miss: what stopped the match, at which equation, and how many had matched."""

    def __init__(self, reason: str, node: Node, matched: int = 1) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.matched = matched


class Contracted(Miss):
    """What might have been logits goes into another product, the node."""
