"""From a rule with `k="positive"`, and what packing found out, to the sizes of its operation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from hire_rewrite.cost.machine import fetches_words
from hire_rewrite.graph.weights import narrow
from hire_rewrite.ops.encodings import Encoding, Float, in_words
from hire_rewrite.ops.ffn.positive import PositiveFFNSpec
from hire_rewrite.ops.predictors import Predictor, Quantized, certifies
from hire_rewrite.rules import count
from hire_rewrite.sites.ffn.match import FFNMatch
from hire_rewrite.sites.ffn.rule import FFN
from hire_rewrite.sites.kind import MatchedSite, Unfit, unfit_if_refused

_BEST = Quantized()
SHARE = 0.5
"""Of neurons that are taken to be positive where nobody has looked: of weights that are symmetric
around zero half are."""


@dataclasses.dataclass(frozen=True)
class PositiveStatistics:
    """What packing found out about a block.

    Attributes:
      up, down: the narrowest encodings that hold the rows of the first matrices and of the second;
        None where nobody has looked.
      share: of neurons that are not zero, in the layer that has most; None without calibration.
      most: the greatest such share of one token.
    """

    up: Encoding | None = None
    down: Encoding | None = None
    share: float | None = None
    most: float | None = None


def positive_spec(site: MatchedSite, rule: FFN, told: PositiveStatistics) -> PositiveFFNSpec:
    """The sizes that a rule with `k="positive"` asks for at a block.

    Raises:
      HireRewriteError: the rule asks for more neurons than there are.
      Unfit: the rule cannot be applied to this block.
    """
    match: FFNMatch = site.match
    gates = match.activation.zeroing
    if not gates:
        raise Unfit(
            f"its activation ({match.activation.name}) is not seen to make a neuron zero, and "
            'k="positive" leaves out those that are; give a number or share'
        )
    devices = site.sharding.row_shards
    if match.region.size % devices:
        raise Unfit(f"its {match.region.size} neurons cannot be divided among {devices} devices")
    known = (jnp.dtype("float32"), jnp.dtype("bfloat16"))
    up, down, width = match.linears[0], match.down, match.region.size
    if up.out.dtype not in known or down.out.dtype not in known:
        raise Unfit(f'k="positive" is for products in float32 and bfloat16, not {up.out.dtype}')
    d, projections = up.in_dim, len(match.region.projections)
    first, second = rule.exact or told.up, rule.exact or told.down
    if first is None or second is None:
        first, second = rows_apart(site, as_the_model(up), as_the_model(down))
    predictor = rule.predictor or _guess(first, len(gates) * width, d, told, up)
    if predictor is not None and not certifies(predictor):
        raise Unfit(
            f'{predictor} has no bound of its errors, by which k="positive" chooses; give '
            "predictor=Quantized()"
        )
    with unfit_if_refused():
        first.check(projections * width // devices, d, site=site.name)
        second.check(width // devices, down.out_dim, site=site.name)
        if predictor is not None:
            predictor.check(len(gates) * width // devices, d, site=site.name)
    spec = PositiveFFNSpec(
        up_dtype=up.out.dtype,
        down_dtype=down.out.dtype,
        precision=up.node.params["precision"],
        compute_dtype=up.weight.dtype,
        width=width,
        d_out=down.out_dim,
        projections=projections,
        gates=gates,
        budget=width,
        up=first,
        down=second,
        predictor=predictor,  # type: ignore[arg-type]
        margin=rule.margin,
    )
    read = read_share(spec, d, told.share)
    if match.experts == 1:
        most = 0.5 if told.most is None else 1.5 * (told.most + read - (told.share or 0.0))
        budget = width if most >= 1 else math.ceil(most * width)
        if rule.budget is not None:
            budget = count(rule.budget, width, f"{site.name}: budget")
        spec = dataclasses.replace(spec, budget=budget)
    return spec


def as_the_model(linear: Any) -> Float:
    """How rows are stored that are to be as the model has them."""
    dtypes = {jnp.dtype(narrow(linear.weight).dtype), jnp.dtype(linear.weight.dtype)}
    return Float("bfloat16" if jnp.dtype("bfloat16") in dtypes else "float32")


def rows_apart(site: MatchedSite, up: Encoding, down: Encoding) -> tuple[Encoding, Encoding]:
    """The encodings of both layers' rows, so that the machine can fetch each row alone."""
    if site.sharding.mesh is not None or not fetches_words():
        return up, down
    return in_words(up, site.d_model), in_words(down, site.match.down.out_dim)


def _guess(rows: Encoding, n: int, d: int, told: PositiveStatistics, up: Any) -> Predictor | None:
    """A guess of the gates where calibration tells that it saves bytes; None to read them whole."""
    if told.share is None:
        return None
    guess = _BEST.bytes(n, d, narrow(up.weight).dtype)
    share = min(1.0, told.share + _spread(_BEST, "proved", d))
    whole = rows.bytes(n, d)
    return _BEST if guess + share * whole < whole else None


def _spread(predictor: Predictor, margin: float | str, d: int) -> float:
    """The share of neurons of which a guess does not tell that they are zero: an estimate.

    Of numbers that are spread like normal ones 0.4 of them lie within a standard deviation around
    the middle; rows of 8 bits are off by about 0.7 % of it, of 4 bits by 8 %.
    """
    error = 0.08 if getattr(predictor, "bits", 8) == 4 else 0.007
    deviations = math.sqrt(d) if margin == "proved" else float(margin)
    return 0.4 * error * deviations


def read_share(spec: PositiveFFNSpec, d: int, share: float | None) -> float:
    """Of neurons that are read one by one."""
    share = SHARE if share is None else share
    if spec.predictor is not None:
        share += _spread(spec.predictor, spec.margin, d)
    return min(1.0, share)
