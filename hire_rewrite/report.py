"""How well a rewritten function does: what `evaluate` returns."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Hashable, Sequence
from typing import Any

from hire_rewrite.files import write
from hire_rewrite.names import groups
from hire_rewrite.plan import table


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """What a site's predictor misses; a unit is a group of neurons or a row of the vocabulary.

    Where nothing is chosen (`k` is 0) nothing is missed, and recalls are 1. Where the data say how
    many units are read (`FFN(k="positive")`) a recall is the share of those that are not zero.

    Attributes:
      name, kind: as in the plan.
      tokens: how many were measured, in each layer.
      k, candidates: units.
      recall: for each layer the share of the true top k that was among the candidates.
      recall_p1: for each layer the 1st percentile over tokens of that share.
      best: share of tokens whose greatest unit was among the candidates, of all layers.
      mass: share of the true top k's mass (of the squares of activations, or of probability) among
        them.
      error: mean relative error of the output (of a head, of its probabilities) against dense.
      error_exact: the same against the exact top k, which the predictor alone is to blame for.
      proved: share of tokens whose greatest logits were proved; None without `certify`.
      bytes_dense, bytes_read: weight bytes for one token, in all layers.
      curve: recall for other numbers of candidates, as (candidates, bytes, recall of each layer).
      read: for each layer the share of units that were read; None where it does not vary.
      whole: share of tokens that asked for more units than are read one by one, and read all; None
        alike.
    """

    name: str
    kind: str
    tokens: int
    k: int
    candidates: int
    recall: tuple[float, ...]
    recall_p1: tuple[float, ...]
    best: float
    mass: float
    error: float
    error_exact: float
    proved: float | None
    bytes_dense: int
    bytes_read: int
    curve: tuple[tuple[int, int, tuple[float, ...]], ...]
    read: tuple[float, ...] | None = None
    whole: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """The rewritten model beside the dense one and the one with the exact top k.

    Attributes:
      tokens: rows of logits that were compared.
      agreement, agreement_exact: share of tokens with the dense, or exact, model's arg max.
      kl, kl_exact: mean KL divergence of the rewritten model from either, in nats.
      perplexity: dense, exact, rewritten; None without targets.
    """

    tokens: int
    agreement: float
    agreement_exact: float
    kl: float
    kl_exact: float
    perplexity: tuple[float, float, float] | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What decoding loses: every token was measured as if it were decoded alone.

    Attributes:
      sites: in the order of the plan.
      model: if it has a head outside all loops.
      stay_dense: names of the sites that are dense when the function is called with such a batch
        itself: it has more tokens than their rules take, or with so many they do not pay.
    """

    sites: tuple[SiteReport, ...]
    model: ModelReport | None
    stay_dense: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Sites that are alike in all but their names and what was measured share a row: its
        figures are the least and the greatest of theirs, its MB those of all."""
        header = ["site", "tokens", "top", "of", "recall", "worst layer", "1st percentile",
                  "greatest", "mass", "error", "from exact", "proved", "read", "whole",
                  "MB read"]  # fmt: skip
        rows = [header, *(_row(name, sites) for name, sites in _grouped(self.sites))]
        told = [i for i, column in enumerate(zip(*rows[1:], strict=True)) if any(column)]
        shown = [[row[i] for i in told] for row in rows]
        parts = [table(shown)] if self.sites else ["no site rewritten"]
        if self.model is not None:
            model = self.model
            parts.append(
                f"model, {model.tokens} tokens: same arg max as dense {model.agreement:.2%}, as "
                f"exact top-k {model.agreement_exact:.2%}; KL from dense {model.kl:.2e}, from "
                f"exact {model.kl_exact:.2e} nats"
            )
            if model.perplexity is not None:
                dense, exact, hire = model.perplexity
                parts.append(
                    f"perplexity: dense {dense:.3f}, exact top-k {exact:.3f}, rewritten {hire:.3f}"
                )
        if self.sites:
            parts.append("every token as if it were decoded alone" + self._dense_calls())
        return "\n".join(parts)

    def _dense_calls(self) -> str:
        """Where a call of all these tokens at once would be dense, for the printout."""
        if not self.stay_dense:
            return ""
        some = ", ".join(self.stay_dense[:3])
        rest = len(self.stay_dense) - 3
        more = f" and {rest} other(s)" if rest > 0 else ""
        return f"; called with a whole batch, {some}{more} would stay dense"

    def to_json(self, path: str | None = None) -> str:
        """The report as JSON, null for what is not finite; written to `path` if it is given."""
        text = json.dumps(_finite(dataclasses.asdict(self)), indent=1, allow_nan=False)
        if path is not None:
            write("to_json", path, text + "\n")
        return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _grouped(sites: Sequence[SiteReport]) -> list[tuple[str, list[SiteReport]]]:
    """Sites of one kind and size, with one name for each group."""

    def alike(site: SiteReport) -> Hashable:
        sizes = site.tokens, site.k, site.candidates, site.bytes_dense, site.bytes_read
        return site.kind, sizes, site.proved is None

    return groups(sites, lambda site: site.name, alike)


def _row(name: str, sites: Sequence[SiteReport]) -> list[str]:
    site, number = sites[0], len(sites)
    choice = [
        str(site.k), str(site.candidates),
        _range("{:.4f}", [sum(s.recall) / len(s.recall) for s in sites]),
        _range("{:.4f}", [min(s.recall) for s in sites]),
        _range("{:.3f}", [min(s.recall_p1) for s in sites]),
        _range("{:.4f}", [s.best for s in sites]),
        _range("{:.4f}", [s.mass for s in sites]),
    ]  # fmt: skip
    return [
        f"{name} ({number})" if number > 1 else name, str(site.tokens),
        *(choice if site.k else [""] * len(choice)),
        _range("{:.4f}", [s.error for s in sites]),
        _range("{:.4f}", [s.error_exact for s in sites]),
        _range("{:.2%}", [s.proved for s in sites if s.proved is not None]),
        _range("{:.2%}", [sum(s.read) / len(s.read) for s in sites if s.read]),
        _range("{:.2%}", [s.whole for s in sites if s.whole is not None]),
        f"{number * site.bytes_dense / 1e6:.1f} → {number * site.bytes_read / 1e6:.1f}",
    ]  # fmt: skip


def _range(form: str, figures: Sequence[float]) -> str:
    """Figures as one, or as the least and the greatest where these print otherwise."""
    ends = [form.format(end(figures)) for end in (min, max)] if figures else []
    return "–".join(dict.fromkeys(ends))
