"""A site with what was decided for it."""

from __future__ import annotations

import dataclasses

from hire_rewrite.cost.estimate import Estimate
from hire_rewrite.graph.nodes import Node
from hire_rewrite.plan import Site
from hire_rewrite.sites import MatchedSite, Operation


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """A site with the rule and the operation that were decided for it.

    Attributes:
      row: the site as the plan has it.
      packs: whether the site's weights are packed: a rule asks for it, and it pays for some small
        number of tokens, if not for those of this call.
      packed_name: the name under which they are packed: the first site's with the same weights.
      cost: what it saves in this call, if its sizes are known.
      asked: whether mode "exact" gives it its top-k on raw weights: a rule of the user's asks for
        it, whether that pays or not, or it is packed.
      absent: whether a rule of the user's asks for it and would pack it, and the `Packed` that the
        call was given does not hold it.
    """

    site: MatchedSite
    row: Site
    operation: Operation | None = None
    packs: bool = False
    packed_name: str = ""
    asked: bool = False
    cost: Estimate | None = None
    absent: bool = False

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def nodes(self) -> frozenset[Node]:
        """The nodes that no other site may have."""
        return frozenset(self.site.match.nodes | self.site.match.shared)

    @property
    def products(self) -> frozenset[Node]:
        """The products of its linear layers."""
        return frozenset(linear.node for linear in self.site.linears)

    @property
    def op(self) -> Operation:
        """The operation of a site that a rule asks for."""
        assert self.operation is not None
        return self.operation

    @property
    def estimated(self) -> Estimate:
        """The cost of a site whose sizes are known."""
        assert self.cost is not None
        return self.cost

    @property
    def rewritten(self) -> bool:
        return self.row.status == "rewritten"

    @property
    def undecided(self) -> bool:
        """Whether calibration has yet to tell its sizes."""
        return self.operation is not None and self.operation.undecided is not None
