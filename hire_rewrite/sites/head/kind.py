"""Vocabulary heads as a kind of site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hire_rewrite.ops.encodings import Coarse
from hire_rewrite.ops.predictors import Quantized
from hire_rewrite.patterns.linear import Linear, MatchContext
from hire_rewrite.sharding.manual import vocabulary_shards
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.head.match import MIN_WIDTH, HeadMatch, match_head
from hire_rewrite.sites.head.operation import HeadOperation
from hire_rewrite.sites.head.rule import Head
from hire_rewrite.sites.head.sizes import head_spec
from hire_rewrite.sites.kind import Functions, Logits, MatchedSite, SiteKind
from hire_rewrite.sites.lookup import lookups_of


class HeadKind(SiteKind):
    """Vocabulary heads, with whatever acts on each logit separately."""

    name = "head"
    rule = Head

    def match(self, linear: Linear, context: MatchContext, rules: Sequence[Any]) -> HeadMatch:
        widths = {rule.min_width for rule in rules}
        least = min(width or MIN_WIDTH for width in widths) if widths - {None} else None
        match = match_head(linear, context, least, vocabulary_shards(context.trace, linear))
        if any(rule.exact is not None and rule.lookups for rule in rules):
            return dataclasses.replace(match, lookups=lookups_of(linear, context))
        return match

    def default_rule(self, match: HeadMatch) -> Head | None:
        if match.doubt is not None or match.disorder is not None:
            return None
        return Head(k=max(match.ranked.depth, Head.k))

    def asks(self, rule: Head, site: MatchedSite) -> bool:
        if rule.min_width is None:
            return site.match.doubt is None and site.match.disorder is None
        return bool(site.match.width * site.sharding.vocabulary_shards >= rule.min_width)

    def unasked(self, match: HeadMatch) -> str:
        if match.doubt is not None:
            return f"{match.doubt}; Head(min_width=...) takes it for a vocabulary"
        if match.disorder is not None:
            return f"{match.disorder}; Head(min_width=...) rewrites it nevertheless"
        return "no rule asks for it; Head(k=...) does"

    def summary(self, match: HeadMatch) -> Mapping[str, Any]:
        return {"width": match.width}

    def unsupported_sharding(self, match: HeadMatch, sharding: RowSharding) -> str | None:
        places = ((value.shape, match.places[value]) for value in match.outputs)
        if any((shape[axis], start) != (match.width, 0) for shape, (axis, start) in places):
            return f"its rows are sharded over {sharding}, and only a part of its logits is read"
        return None

    def logits(self, match: HeadMatch) -> Logits:
        value = match.outputs[-1]
        return Logits(value, *match.places[value], match.width)

    def trials(self, site: MatchedSite, rule: Head | None) -> Sequence[Head]:
        rule = rule or Head()
        if isinstance(rule.guesses_by, Coarse):
            return [rule]
        return [rule.replace(predictor=Quantized(bits)) for bits in (4, 8)]

    def resolve(
        self, site: MatchedSite, rule: Head, statistics: Any, functions: Functions
    ) -> HeadOperation:
        return HeadOperation(site, rule, head_spec(site, rule), lossless=statistics is True)
