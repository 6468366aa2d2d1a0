"""What the matchers of all kinds of site know about the scope that they look into."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

from hire_rewrite.graph.nodes import Node, Uses
from hire_rewrite.graph.provenance import Provenance
from hire_rewrite.graph.trace import Trace
from hire_rewrite.patterns.linear import Linear


@dataclasses.dataclass(frozen=True, eq=False)
class MatchContext:
    """A scope, and the sites that were matched in it so far.

    Attributes:
      linears: the linear layers of the scope, by their products.
      taken: the nodes that belong to a site, with its match.
      cache: what was found out about code, by the code: layers are mostly alike. Shared by all
        scopes of a function.
    """

    trace: Trace
    linears: Mapping[Node, Linear]
    taken: dict[Node, Any] = dataclasses.field(default_factory=dict)
    cache: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    @property
    def provenance(self) -> Provenance:
        return self.trace.provenance

    @property
    def uses(self) -> Uses:
        """Who reads a value, as far as anybody needs it."""
        return self.trace.live
