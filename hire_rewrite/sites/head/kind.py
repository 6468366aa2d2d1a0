"""Vocabulary heads as a kind of site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hire_rewrite.patterns.linear import Linear
from hire_rewrite.sharding.manual import vocabulary_shards
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.head.match import HeadMatch, match_head
from hire_rewrite.sites.head.operation import HeadOperation
from hire_rewrite.sites.head.rule import Head
from hire_rewrite.sites.head.sizes import head_spec
from hire_rewrite.sites.kind import Functions, Logits, MatchedSite, SiteKind

__all__ = ["HeadKind"]


class HeadKind(SiteKind):
    """Vocabulary heads, with whatever acts on each logit separately."""

    name = "head"
    rule = Head

    def match(self, linear: Linear, context: Any, rules: Sequence[Any]) -> HeadMatch:
        widths = [rule.min_width or 4096 for rule in rules] or [4096]
        shards = vocabulary_shards(context.trace, linear)
        least = -(-min(widths) // shards)
        return match_head(
            linear, least, context.linears, context.provenance, context.uses, context.taken
        )

    def default_rule(self, match: HeadMatch) -> Head:
        return Head()

    def asks(self, rule: Head, site: MatchedSite) -> bool:
        width = site.match.width * site.sharding.vocabulary_shards
        return bool(width >= (rule.min_width or 4096))

    def unasked(self, match: HeadMatch) -> str:
        return "no rule asks for it; Head(k=...) does"

    def summary(self, match: HeadMatch) -> Mapping[str, Any]:
        return {"width": match.width}

    def unsupported_sharding(self, match: HeadMatch, sharding: RowSharding) -> str | None:
        places = ((value.shape, match.places[value]) for value in match.endpoints)
        if any((shape[axis], start) != (match.width, 0) for shape, (axis, start) in places):
            return f"its rows are sharded over {sharding}, and only a part of its logits is read"
        return None

    def logits(self, match: HeadMatch) -> Logits:
        value = match.endpoints[-1]
        return Logits(value, *match.places[value])

    def resolve(
        self, site: MatchedSite, rule: Head, statistics: Any, functions: Functions
    ) -> HeadOperation:
        return HeadOperation(site, rule, head_spec(site, rule))
