"""The rule of FFN blocks."""

from __future__ import annotations

import dataclasses
import math
import numbers

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings import Encoding
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.rules import Rule, check_amount, check_amounts, check_positive_int, is_one
from hire_rewrite.settings import check_settings

_CRITERIA = ("hidden", "output")
_TAILS = ("zero", "predicted")
_OF_TOP_K = ("candidates", "group", "criterion", "common", "keep", "parts")
_OF_ZERO = ("candidates", "predictor", "common", "budget", "keep", "parts")
_ENCODINGS = ("encoding", "exact")
_OF_PREDICTED = (*_ENCODINGS, "round_inputs")


@dataclasses.dataclass(frozen=True, repr=False)
class FFN(Rule):
    """Run FFN blocks on the neurons that count: the top k, or those that are not zero.

    Examples:
      >>> import hire_rewrite as hire
      >>> hire.FFN(k=0.05, candidates=0.1, predictor=hire.LowRank(128))
      FFN(k=0.05, candidates=0.1, predictor=LowRank(rank=128))
      >>> hire.FFN(k=0.02, tail="predicted", encoding=hire.Blocks(8))
      FFN(k=0.02, tail='predicted', encoding=Blocks(bits=8))
      >>> hire.FFN(k="positive", predictor=hire.Quantized(4), margin=4.0)
      FFN(k='positive', predictor=Quantized(bits=4), margin=4.0)

    Args:
      k: neurons that count, a fraction of the width (float in (0, 1]) or a number (int), rounded up
        to whole groups. `"auto"` lets calibration find the smallest k that keeps `keep`. With
        `tail="predicted"` 0 is for none. `"positive"` is for activations that make neurons zero,
        as a ReLU does: all that are not zero, however many a token has. Nothing is lost, and it is
        what is done without rules where it pays.
      tail: what the others are. `"zero"`: nothing; on a model that was not trained so, a small k
        gives another model. `"predicted"`: what a compressed copy of all layers of the block says,
        which comes close to the block of any model. The copy also tells which the k are, so
        there are neither candidates nor a predictor.
      encoding: with `tail="predicted"`, how the copy is stored; None for `Blocks(8)`.
      exact: with `tail="predicted"`, how the rows for `k` are stored; None for as the model has
        them. With `k="positive"`, how all rows are; None for the fewest bits that hold the same
        numbers.
      round_inputs: with `tail="predicted"`, whether what the copy multiplies is rounded to 8 bits,
        as most formats of inference do: processors multiply such numbers many at a time.
      candidates: k' ≥ k neurons that are computed exactly, from which the k are taken; a
        fraction or a number like `k`. By default twice `k`.
      group: neurons that are chosen and fetched together. Where it does not divide the width,
        the greatest common divisor of both is taken. None for 8, and for 1 with
        `tail="predicted"`.
      predictor: how the pre-activations of all neurons are guessed. `Quantized()`, which None
        stands for, recalls nearly all and needs no calibration; `LowRank(rank)` reads less and
        recalls less. With `k="positive"` it is `Quantized(...)`, whose errors have a bound, and
        None reads the first layers whole unless calibration tells that guessing them reads less.
      margin: with `k="positive"`, how far a guess is taken to be off. `"proved"`: as far as it can
        be, so that what is left out is zero in the model's own arithmetic, in whatever order it
        adds. A number: so many standard deviations of its error; 3 misses about one of ten
        thousand positive neurons.
      criterion: what a neuron is ranked by: `"hidden"`, |h|, or `"output"`, |h| times the norm of
        its row of the last matrix. A group is ranked by the sum of its members' squares. None for
        `"hidden"`, and for `"output"` with `tail="predicted"`.
      common: neurons that are always computed, without prediction: those that were among the k
        most often in calibration. A fraction or a number; they are among the candidates.
      budget: neurons that are fetched for all tokens of a call together, at most, a fraction or a
        number, but never less than one token's candidates; a call whose tokens ask for more reads
        all. None for as many as they may ask for. With `k="positive"` it is for each token, and
        None is half as many again as calibration saw, or half of them.
      keep: what `k="auto"` keeps, at least, on average over the calibration: of an activation
        that zeroes neurons the share of non-zero ones, of any other 1 − relative error of the
        block's output.
      parts: the neurons are taken as so many equal parts, and the top k is that of each part
        together. None for 1, and where weights are packed that are sharded over a mesh, one for
        each device. Give it on one device, or in training, to compute what several will.
      max_tokens: with more tokens in a call (prefill) the block keeps its dense arithmetic, for
        their candidates together are most of the rows; None for no limit.
      path: only sites whose name it fits are asked for: a name as plans print it, such as
        `params/layers/{0..3}/mlp`, or a regular expression that is searched for in names.
      force: rewrite even where the estimate says that it does not pay.

    Raises:
      HireRewriteError: an argument is out of its range.
    """

    k: float | int | str
    _: dataclasses.KW_ONLY
    tail: str = "zero"
    encoding: Encoding | None = None
    exact: Encoding | None = None
    round_inputs: bool = False
    candidates: float | int | None = None
    group: int | None = None
    predictor: Predictor | None = None
    margin: float | str = "proved"
    criterion: str | None = None
    common: float | int = 0
    budget: float | int | None = None
    keep: float = 0.95
    parts: int | None = None
    max_tokens: int | None = 8
    path: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_margin()
        self._check_tail()
        if isinstance(self.k, str):
            if self.k not in ("auto", "positive"):
                raise HireRewriteError(f'FFN: k={self.k!r} must be an amount, "auto" or "positive"')
            if self.candidates is not None:
                check_amount("FFN", "candidates", self.candidates)
        elif self.tail == "zero" or self.k != 0 or isinstance(self.k, bool):
            check_amounts("FFN", self.k, self.candidates)
        if self.budget is not None:
            check_amount("FFN", "budget", self.budget)
        if self.common != 0 or isinstance(self.common, bool):
            check_amount("FFN", "common", self.common)
        if not isinstance(self.keep, numbers.Real) or not 0.0 < float(self.keep) < 1.0:
            raise HireRewriteError(f"FFN: keep={self.keep!r} must be between 0 and 1")
        if self.criterion is not None and self.criterion not in _CRITERIA:
            raise HireRewriteError(
                f"FFN: criterion={self.criterion!r} must be one of {', '.join(_CRITERIA)}"
            )
        check_positive_int("FFN", "parts", self.parts)
        check_positive_int("FFN", "group", self.group)
        super().__post_init__()

    def _check_margin(self) -> None:
        """Raise HireRewriteError if a setting is for a top k, or for another k than "positive"."""
        margin, positive = self.margin, self.k == "positive"
        number = isinstance(margin, numbers.Real) and not isinstance(margin, bool)
        if margin != "proved" and not (number and 0 < float(margin) < math.inf):
            raise HireRewriteError(
                f'FFN: margin={margin!r} must be "proved" or a positive number of standard '
                "deviations, such as 3.0"
            )
        if margin != "proved" and not positive:
            raise HireRewriteError(
                f'FFN: margin={margin!r} is for k="positive", and k={self.k!r} ranks neurons: '
                "leave it out"
            )
        if margin != "proved" and self.predictor is None:
            raise HireRewriteError(
                f"FFN: margin={margin!r} says how far a guess may be off, and nothing is guessed "
                "without a predictor: give predictor=Quantized(4), or leave it out"
            )
        fields = {field.name: field for field in dataclasses.fields(self)}
        given = [name for name in _OF_TOP_K if getattr(self, name) != fields[name].default]
        if positive and given:
            raise HireRewriteError(
                f"FFN: {given[0]}={getattr(self, given[0])!r} is for a top k, and "
                'k="positive" takes all neurons that are not zero: leave it out'
            )

    def _check_tail(self) -> None:
        """Raise HireRewriteError if a setting is for another tail than this."""
        if self.tail not in _TAILS:
            raise HireRewriteError(f'FFN: tail={self.tail!r} must be "zero" or "predicted"')
        for name in _ENCODINGS:
            encoding = getattr(self, name)
            if encoding is not None and not is_one(encoding, Encoding):
                raise HireRewriteError(
                    f"FFN: {name}={encoding!r} is not an encoding: give Blocks(...) or Float(...)"
                )
        if not isinstance(self.round_inputs, bool):
            raise HireRewriteError(f"FFN: round_inputs={self.round_inputs!r} must be True or False")
        fields = {field.name: field for field in dataclasses.fields(self)}
        others = _OF_ZERO if self.tail == "predicted" else _OF_PREDICTED
        given = [name for name in others if getattr(self, name) != fields[name].default]
        if self.k == "positive" and self.tail == "zero":
            given = [name for name in given if name != "exact"]
        if given and self.tail == "zero":
            raise HireRewriteError(
                f"FFN: {given[0]}={getattr(self, given[0])!r} is for a compressed copy, which "
                'tail="zero" has not: give tail="predicted" too, or leave it out'
            )
        if given:
            raise HireRewriteError(
                f"FFN: {given[0]}={getattr(self, given[0])!r} is for candidates whose others are "
                'zero; with tail="predicted" the compressed copy itself tells the top k: leave it '
                'out, or give tail="zero"'
            )
        if self.tail == "predicted" and isinstance(self.k, str):
            raise HireRewriteError(
                f'FFN: k={self.k!r} is for tail="zero": with tail="predicted" give a fraction or a '
                "number, such as 0.02"
            )
        if self.exact is not None and self.k == 0:
            raise HireRewriteError("FFN: exact= says how rows are stored, and k=0 asks for none")
