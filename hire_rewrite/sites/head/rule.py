"""The rule of vocabulary heads."""

from __future__ import annotations

import dataclasses
import numbers

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings import Coarse, CoarseEncoding, Encoding
from hire_rewrite.ops.predictors import Predictor, Quantized
from hire_rewrite.rules import Rule, check_amounts, check_positive_int, is_one
from hire_rewrite.settings import check_settings, is_int


@dataclasses.dataclass(frozen=True, repr=False)
class Head(Rule):
    """Compute exactly only those logits of a vocabulary head that may be among the greatest.

    Examples:
      >>> import hire_rewrite as hire
      >>> hire.Head(k=64, candidates=512, predictor=hire.LowRank(256))
      Head(k=64, candidates=512, predictor=LowRank(rank=256))
      >>> hire.Head(exact=hire.Nested()).guesses_by
      Coarse(encoding=Nested(block=32))

    Args:
      k: how many of the greatest logits must be exact; a number (int) or a fraction (float) of
        the vocabulary.
      candidates: k' ≥ k rows that are computed exactly; by default max(256, 4 k).
      predictor: how all logits are guessed. `Quantized()` recalls nearly all and needs no
        calibration; `LowRank(rank)` reads less, but has to be calibrated. None for what `exact`
        tells of its rows by itself, as `Nested` does, and otherwise for `Quantized()`.
      exact: how the rows are stored from which candidates are computed (`Blocks(8)`, `Nested()`,
        ...), whether that holds their numbers exactly or not: their logits are those of what is
        stored. None for as the model has them. `Nested` guesses all logits from one half of what it
        stores, so that nothing is held beside the rows.
      lookups: with `exact`, whether rows of the weight that are looked up elsewhere (those of an
        embedding that is tied to the head) are read from what is stored too, so that the weight is
        held once. False leaves the embedding as the model has it.
      tail: what the logits outside the candidates hold where the function can see them:
        `"predicted"` (the predictor's scores, never above the k greatest exact ones) or `"-inf"`.
      certify: how many of the greatest logits are proved to be those of the dense head (True for
        1, the arg max); a token for which the proof fails is computed whole. Needs a predictor
        with a bound, as `Quantized` has, and with `exact` rows that are stored without loss.
      recall_target: where the vocabulary is sharded over a mesh: 1 lets each device take as many
        candidates as one device would take of all, and compares enough of them to find the very
        greatest. Less saves both: that share of them is found, the greatest always (`da_top_k`).
      min_width: a linear layer narrower than this is not a vocabulary. None for 4,096 and at least
        twice the layer's input; a number decides alone, for the small vocabularies of bytes,
        codecs and proteins.
      max_tokens, path, force: as in `FFN`.

    Raises:
      HireRewriteError: an argument is out of its range.
    """

    k: float | int = 64
    _: dataclasses.KW_ONLY
    candidates: float | int | None = None
    predictor: Predictor | None = None
    exact: Encoding | None = None
    lookups: bool = True
    tail: str = "predicted"
    certify: bool | int = False
    recall_target: float = 1.0
    min_width: int | None = None
    max_tokens: int | None = None
    path: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        check_amounts("Head", self.k, self.candidates)
        self._check_exact()
        if self.tail not in ("predicted", "-inf"):
            raise HireRewriteError(f'Head: tail={self.tail!r} must be "predicted" or "-inf"')
        if not isinstance(self.certify, bool) and (not is_int(self.certify) or self.certify < 0):
            raise HireRewriteError(
                f"Head: certify={self.certify!r} must be True, False or how many of the greatest "
                "logits are to be proved"
            )
        target = self.recall_target
        if not isinstance(target, numbers.Real) or not 0.0 < float(target) <= 1.0:
            raise HireRewriteError(f"Head: recall_target={target!r} must be in (0, 1]")
        check_positive_int("Head", "min_width", self.min_width)
        super().__post_init__()

    @property
    def guesses_by(self) -> Predictor:
        """The predictor that is given, or stands for None."""
        if self.predictor is not None:
            return self.predictor
        return Coarse(self.exact) if isinstance(self.exact, CoarseEncoding) else Quantized()

    def _check_exact(self) -> None:
        """Raise HireRewriteError if the rows cannot be stored so, or not guess so."""
        if self.exact is not None and not is_one(self.exact, Encoding):
            raise HireRewriteError(
                f"Head: exact={self.exact!r} is not an encoding: give Blocks(...), Nested(...) or "
                "Float(...)"
            )
        if not isinstance(self.lookups, bool):
            raise HireRewriteError(f"Head: lookups={self.lookups!r} must be True or False")
        if not self.lookups and self.exact is None:
            raise HireRewriteError(
                "Head: lookups=False is for rows that are stored in an encoding, and without "
                "`exact` they are as the model has them: give exact= too, or leave it out"
            )
        if isinstance(self.predictor, Coarse):
            if self.predictor.encoding != self.exact:
                raise HireRewriteError(
                    f"Head: predictor={self.predictor!r} reads the rows of the head, which are "
                    f"exact={self.exact!r}: give them the same encoding"
                )
            object.__setattr__(self, "predictor", None)  # which says the same
