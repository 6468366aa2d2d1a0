"""What a user asks for: which sites to rewrite, with how many rows, and how to predict them.

A rule is a noun. The first rule, in the order given, whose kind and `path` fit a site decides
about it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.ffn.block import check_choices
from hire_rewrite.ops.predictors import Cascade, LowRank, Predictor, Quantized, written

__all__ = ["FFN", "Cascade", "Head", "LowRank", "Quantized", "Rule", "count"]


@dataclasses.dataclass(frozen=True, repr=False)
class FFN:
    """Run FFN blocks on the top k of their hidden neurons.

    Args:
      k: neurons that count, a fraction of the width (float in (0, 1]) or a number (int), rounded up
        to whole groups. All others are zero: on a model that was not trained so, a small k gives
        another model. `"auto"` lets calibration find the smallest k that keeps `keep`.
      candidates: k' ≥ k neurons that are computed exactly, from which the k are taken; a
        fraction or a number like `k`. By default twice `k`.
      group: neurons that are chosen and fetched together. Where it does not divide the width,
        the greatest common divisor of both is taken.
      predictor: how the pre-activations of all neurons are guessed. `Quantized()` recalls nearly
        all and needs no calibration; `LowRank(rank)` reads less and recalls less.
      criterion: what a neuron is ranked by: `"hidden"`, |h|, `"output"`, |h| times the norm of its
        row of the last matrix, or `"gate"`, |h| with the other factor of a gated block taken as
        one; then the gate alone is guessed, which reads half.
      reduction: what ranks a group, of its members: `"l2"`, `"max"` or `"sum"`.
      selection: how candidates are found: `"sort"`, or by a `"threshold"` without a sort (then
        there may be a few less).
      common: neurons that are always computed, without prediction: those that were among the k
        most often in calibration. A fraction or a number; they are among the candidates.
      budget: neurons that are fetched for all tokens of a call together, at most, a fraction or a
        number, but never less than one token's candidates; a call whose tokens ask for more reads
        all. None for as many as they may ask for.
      keep: what `k="auto"` keeps, at least, on average over the calibration: of an activation
        that zeroes neurons the share of non-zero ones, of any other 1 − relative error of the
        block's output.
      parts: the neurons are taken as so many equal parts, and the top k is that of each part
        together. None for 1, and where weights are packed that are spread over a mesh, one for
        each device. Give it on one device, or in training, to compute what several will.
      max_tokens: with more tokens in a call (prefill) the block keeps its dense arithmetic, for
        their candidates together are most of the rows; None for no limit.
      path: a regular expression; only sites whose name contains a match are asked for.
      force: rewrite even where the estimate says that it does not pay.

    Raises:
      HireRewriteError: an argument is out of its range.
    """

    k: float | int | str
    candidates: float | int | None = None
    group: int = 8
    predictor: Predictor = Quantized()
    criterion: str = "hidden"
    reduction: str = "l2"
    selection: str = "sort"
    common: float | int = 0
    budget: float | int | None = None
    keep: float = 0.95
    parts: int | None = None
    max_tokens: int | None = 8
    path: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.k, str):
            if self.k != "auto":
                raise HireRewriteError(f'FFN: k={self.k!r} must be an amount or "auto"')
            _check_amount("FFN", "candidates", self.candidates)
        else:
            _check_amounts("FFN", self.k, self.candidates)
        _check_amount("FFN", "budget", self.budget)
        if self.common != 0:
            _check_amount("FFN", "common", self.common)
        if not isinstance(self.keep, numbers.Real) or not 0.0 < float(self.keep) < 1.0:
            raise HireRewriteError(f"FFN: keep={self.keep!r} must be between 0 and 1")
        check_choices(self)
        if self.parts is not None and (not _is_int(self.parts) or self.parts < 1):
            raise HireRewriteError(f"FFN: parts={self.parts!r} must be a positive int or None")
        if not _is_int(self.group) or self.group < 1:
            raise HireRewriteError(f"FFN: group={self.group!r} must be a positive int")
        _check_common("FFN", self.predictor, self.max_tokens, self.path)

    def __repr__(self) -> str:
        return written(self)


@dataclasses.dataclass(frozen=True, repr=False)
class Head:
    """Compute exactly only those logits of a vocabulary head that may be among the greatest.

    Args:
      k: how many of the greatest logits must be exact; a number (int) or a fraction (float) of
        the vocabulary.
      candidates: k' ≥ k rows that are computed exactly; by default max(256, 4 k).
      predictor: how all logits are guessed. `Quantized()` recalls nearly all and needs no
        calibration; `LowRank(rank)` reads less, but has to be calibrated.
      tail: what the logits outside the candidates hold where the function can see them:
        `"predicted"` (the predictor's scores, never above the k greatest exact ones) or `"-inf"`.
      certify: how many of the greatest logits are proved to be those of the dense head (True for
        1, the arg max); a token for which the proof fails is computed whole. Needs a predictor
        with a bound, as `Quantized` has.
      recall_target: where the vocabulary is spread over a mesh: 1 lets each device take as many
        candidates as one device would take of all, and compares enough of them to find the very
        greatest. Less saves both: that share of them is found, the greatest always (`da_top_k`).
      min_width: a linear layer narrower than this is no vocabulary.
      max_tokens, path, force: as in `FFN`.

    Raises:
      HireRewriteError: an argument is out of its range.
    """

    k: float | int = 64
    candidates: float | int | None = None
    predictor: Predictor = Quantized()
    tail: str = "predicted"
    certify: bool | int = False
    recall_target: float = 1.0
    min_width: int = 4096
    max_tokens: int | None = None
    path: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        _check_amounts("Head", self.k, self.candidates)
        if self.tail not in ("predicted", "-inf"):
            raise HireRewriteError(f'Head: tail={self.tail!r} must be "predicted" or "-inf"')
        if not isinstance(self.certify, bool) and (not _is_int(self.certify) or self.certify < 0):
            raise HireRewriteError(
                f"Head: certify={self.certify!r} must be True, False or how many of the greatest "
                "logits are to be proved"
            )
        target = self.recall_target
        if not isinstance(target, numbers.Real) or not 0.0 < float(target) <= 1.0:
            raise HireRewriteError(f"Head: recall_target={target!r} must be in (0, 1]")
        if not _is_int(self.min_width) or self.min_width < 1:
            raise HireRewriteError(f"Head: min_width={self.min_width!r} must be a positive int")
        _check_common("Head", self.predictor, self.max_tokens, self.path)

    def __repr__(self) -> str:
        return written(self)


Rule = FFN | Head


def count(amount: float | int, width: int, what: str) -> int:
    """How many of `width` rows an amount (a fraction or a number) asks for.

    Args:
      what: the site and argument, for the message.

    Raises:
      HireRewriteError: a number above the width.
    """
    if _is_int(amount):
        if amount > width:
            raise HireRewriteError(
                f"{what}={amount} is more than the width {width}: give at most {width}, or a "
                "fraction (a float in (0, 1])"
            )
        return int(amount)
    return max(1, math.ceil(round(float(amount) * width, 6)))


def _is_int(number: object) -> bool:
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def _check_amount(rule: str, name: str, amount: object) -> None:
    if amount is None and name != "k":
        return
    if _is_int(amount):
        valid = amount >= 1  # type: ignore[operator]
    else:
        valid = isinstance(amount, numbers.Real) and 0.0 < float(amount) <= 1.0
        valid = valid and not isinstance(amount, bool)
    if not valid:
        raise HireRewriteError(
            f"{rule}: {name}={amount!r} must be a fraction (a float in (0, 1]) or a number "
            "of rows (an int of at least 1)"
        )


def _check_amounts(rule: str, k: object, candidates: object) -> None:
    _check_amount(rule, "k", k)
    _check_amount(rule, "candidates", candidates)
    same_unit = candidates is not None and _is_int(k) == _is_int(candidates)
    if same_unit and candidates < k:  # type: ignore[operator]
        raise HireRewriteError(
            f"{rule}: candidates={candidates} is less than k={k}: the k are chosen among the "
            "candidates, so give at least as many"
        )


def _check_common(rule: str, predictor: object, max_tokens: object, path: object) -> None:
    if not isinstance(predictor, Predictor):
        raise HireRewriteError(
            f"{rule}: predictor={predictor!r} is no predictor: give LowRank(...) or Quantized(...)"
        )
    if max_tokens is not None and (not _is_int(max_tokens) or max_tokens < 1):  # type: ignore[operator]
        raise HireRewriteError(f"{rule}: max_tokens={max_tokens!r} must be a positive int or None")
    if path is not None:
        try:
            re.compile(path)  # type: ignore[call-overload]
        except (re.error, TypeError) as error:
            raise HireRewriteError(
                f"{rule}: path={path!r} is no regular expression: {error}"
            ) from None
