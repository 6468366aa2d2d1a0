"""Convert a trained model for decoding, and measure what predicting costs it.

`hire_rewrite.transform` takes the model's own `forward`; nothing of the training is needed but
some of its text, to calibrate on.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import hire_rewrite as hire

from . import batches, model
from .train import GROUP, K

CANDIDATES = 0.1  # twice the k of the training
PREDICTORS = (hire.LowRank(48), hire.Quantized(4), hire.Quantized(8))
# The vocabulary is small, and its head stays dense: no site has this name, and no miss is reported.
# The rule is there so that what comes out of the head is compared.
HEAD = hire.Head(min_width=1024, path="nowhere")
CALIBRATION, ROWS = 16, 16  # batches, and rows of a batch


class Conversion(NamedTuple):
    """A model with its FFNs rewritten, and what that costs on the validation text.

    Attributes:
      site: what its FFNs read and miss.
      losses: nats per token: of all neurons, of the neurons that the rule means, and rewritten.
    """

    packed: hire.Packed
    site: hire.SiteReport
    losses: tuple[float, float, float]


def convert(
    config: model.Config,
    params: model.Params,
    rule: hire.FFN,
    training: np.ndarray,
    validation: np.ndarray,
    context: int,
) -> Conversion:
    """Pack a model by a rule, calibrated on some of the training text, and measure it.

    A rule without a predictor is packed as it is: by calibration it might be given one.
    """
    some = [(rows[:, :-1],) for rows in _some(training, context)]
    rows = list(batches.in_order(validation, context, ROWS))
    forward = functools.partial(model.forward, config)
    step = hire.transform(forward, rule, HEAD, on_miss="ignore")
    calibration = None if rule.predictor is None else some
    packed = step.pack(params, *some[0], calibration=calibration)
    targets = iter([one[:, 1:] for one in rows])
    report = step.evaluate(
        packed, [(one[:, :-1],) for one in rows], targets=lambda _: next(targets)
    )
    (site,), whole = report.sites, report.model
    assert whole is not None
    assert whole.perplexity is not None
    dense, exact, rewritten = map(math.log, whole.perplexity)
    return Conversion(packed, site, (dense, exact, rewritten))


def converted(
    config: model.Config,
    params: model.Params,
    training: np.ndarray,
    validation: np.ndarray,
    context: int,
    predictors: Sequence[Any] = PREDICTORS,
) -> list[dict[str, Any]]:
    """For each predictor losses on the validation text, and what the blocks recall.

    `losses` are nats per token: of all neurons, of the exact top-k, and rewritten.
    """
    found = []
    for predictor in predictors:
        # So small a model gains nothing; what it loses is measured.
        rule = hire.FFN(k=K, candidates=CANDIDATES, group=GROUP, predictor=predictor, force=True)
        _, site, losses = convert(config, params, rule, training, validation, context)
        dense, exact, rewritten = losses
        found.append(
            {
                "predictor": str(predictor),
                "losses": {
                    "dense": round(dense, 5),
                    "exact": round(exact, 5),
                    "rewritten": round(rewritten, 5),
                },
                "above_exact": round(rewritten / exact - 1, 5),
                "recall": [round(recall, 4) for recall in site.recall],
                "candidates": site.candidates * GROUP,
                "k": site.k * GROUP,
                "bytes": [site.bytes_dense, site.bytes_read],
            }
        )
    return found


def _some(tokens: np.ndarray, context: int) -> list[np.ndarray]:
    """Batches from all over the text, i32[ROWS, context + 1] each."""
    every = batches.Batches(tokens, context, ROWS)
    return [every[i] for i in range(CALIBRATION)]
