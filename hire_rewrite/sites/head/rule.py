"""The rule of vocabulary heads."""

from __future__ import annotations

import dataclasses
import numbers

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.predictors import Predictor, Quantized
from hire_rewrite.rules import Rule, check_amounts, check_positive_int, is_int


@dataclasses.dataclass(frozen=True, repr=False)
class Head(Rule):
    """Compute exactly only those logits of a vocabulary head that may be among the greatest.

    Examples:
      >>> import hire_rewrite as hire
      >>> hire.Head(k=64, candidates=512, predictor=hire.LowRank(256))
      Head(k=64, candidates=512, predictor=LowRank(rank=256))

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
    predictor: Predictor = Quantized()
    tail: str = "predicted"
    certify: bool | int = False
    recall_target: float = 1.0
    min_width: int | None = None
    max_tokens: int | None = None
    path: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_amounts("Head", self.k, self.candidates)
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
