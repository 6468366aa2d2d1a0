"""FFN blocks as a kind of site."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from hire_rewrite.ops.encodings import Blocks
from hire_rewrite.patterns.linear import Linear, MatchContext
from hire_rewrite.rules import Rule
from hire_rewrite.sharding.rows import RowSharding
from hire_rewrite.sites.ffn.match import FFNMatch, match_ffn
from hire_rewrite.sites.ffn.operation import FFNOperation
from hire_rewrite.sites.ffn.positive import positive_operation
from hire_rewrite.sites.ffn.positive_sizes import PositiveStatistics
from hire_rewrite.sites.ffn.predicted import predicted_operation
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.ffn.sizes import FFNStatistics, ffn_spec, selected_k
from hire_rewrite.sites.kind import Functions, MatchedSite, SiteKind
from hire_rewrite.sites.operation import Operation

_ENCODINGS = (Blocks(4, minimum=True), Blocks(8))
_NEURONS = (0.02, 0.05, 0.1)
_EXACT = Blocks(8)
"""What tuning tries: how the copy is stored, which neurons are exact, and how those are stored."""


class FFNKind(SiteKind):
    """FFN blocks, plain and gated, with experts side by side and with fused products."""

    name = "ffn"
    rule = FFN
    statistics_types = (FFNStatistics, PositiveStatistics)

    def match(self, linear: Linear, context: MatchContext, rules: Sequence[Rule]) -> FFNMatch:
        return match_ffn(linear, context)

    def default_rule(self, match: FFNMatch) -> FFN | None:
        """What the graph itself selects, by its own k; of a ReLU what is not zero."""
        activation = match.activation
        if activation.keeps is None:
            return FFN(k="positive") if activation.zeroing else None
        if not activation.by_gate:
            return None  # how many it keeps, or which, cannot be told by the gate
        return FFN(k=selected_k(activation, match.region.size), group=1)

    def unasked(self, match: FFNMatch) -> str:
        name = match.activation.name
        if match.activation.keeps is not None:
            return f"no rule asks for it; FFN(k=...) does ({name} selects neurons by itself)"
        if match.activation.zeroing:
            return f'no rule asks for it; FFN(k="positive") does, and leaves out what {name} zeroes'
        return (
            f"{name} zeroes no neuron, so a top-k changes a model that was not trained with one; "
            'ask with FFN(k=..., tail="predicted"), which guesses the others, or with FFN(k=...)'
        )

    def summary(self, match: FFNMatch) -> Mapping[str, Any]:
        return {
            "width": match.region.size,
            "gated": len(match.region.projections) > 1,
            "activation": match.activation.name,
            "experts": match.experts,
        }

    def identity(self, match: FFNMatch) -> Hashable:
        vectors = tuple(vector.source.window for part in match.regions for vector in part.vectors)
        windows = tuple(
            item.linear.weight_window(item.window)
            for part in match.regions
            for item in part.projections
        )
        order = tuple(match.linears.index(item.linear) for item in match.region.projections)
        return vectors, windows, match.piece.start, order

    def unsupported_sharding(self, match: FFNMatch, sharding: RowSharding) -> str | None:
        rows = f"its rows are sharded over {sharding}"
        if match.region.siblings or match.piece.others:
            return f"{rows}, and it shares a product with other layers"
        if match.activation.keeps is not None:
            return f"{rows}, and it selects among all of them itself"
        return None

    def expert_axes(self, match: FFNMatch) -> Sequence[int]:
        if match.experts == 1:
            return ()
        windows = {item.linear: item.window for item in match.region.projections}
        found = [linear.expert_axes(windows.get(linear)) for linear in match.linears]
        return [axes[1] for axes in found if axes is not None]

    def trials(self, site: MatchedSite, rule: FFN | None) -> Sequence[FFN]:
        """Those that zero no neuron: that is for models that were trained so."""
        if rule is not None and rule.tail == "zero":
            return ()
        like = rule or FFN(k=0.02, tail="predicted")
        return [
            like.replace(k=k, encoding=encoding, exact=_EXACT)
            for encoding in _ENCODINGS
            for k in _NEURONS
        ]

    def resolve(
        self, site: MatchedSite, rule: FFN, statistics: Any, functions: Functions
    ) -> Operation:
        if rule.tail == "predicted":
            return predicted_operation(site, rule, functions)
        if rule.k == "positive":
            told = statistics if isinstance(statistics, PositiveStatistics) else None
            return positive_operation(site, rule, told, functions)
        statistics = statistics if isinstance(statistics, FFNStatistics) else None
        undecided = rule.k == "auto" and not (statistics and statistics.k)
        wanted = rule.replace(k=1.0, candidates=None) if undecided else rule
        spec = ffn_spec(site, wanted, statistics)
        return FFNOperation(site, rule, spec, statistics, undecided, functions)
