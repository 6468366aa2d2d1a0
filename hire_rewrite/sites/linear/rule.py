"""The rule of linear layers."""

from __future__ import annotations

import dataclasses

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings import Encoding
from hire_rewrite.rules import Rule, check_amount, is_one
from hire_rewrite.settings import check_settings


@dataclasses.dataclass(frozen=True, repr=False)
class Linear(Rule):
    """Read linear layers that are in no other site from a compressed copy of their weights.

    Without any argument nothing is lost: where the numbers of a weight fit fewer bits exactly (a
    bfloat16 checkpoint held in float32, or what was widened from a file of 4 or 8 bits), packing
    finds that and stores them so. This is also what is done without rules.

    Of a weight that is sharded over a mesh, by its outputs, its inputs or both, each device encodes
    and reads its own part. Experts are layers side by side, each with the k of its own inputs.

    Examples:
      >>> import hire_rewrite as hire
      >>> hire.Linear(k=0.02, encoding=hire.Blocks(8))
      Linear(k=0.02, encoding=Blocks(bits=8))

    Args:
      k: of each token, how many of its inputs meet their columns of the weight exactly, those of
        greatest |x|; a fraction of the inputs (float) or a number (int). 0 for none. Where inputs
        are sharded over a mesh each device takes its share of k, among its own inputs; inside a
        `shard_map` of the function an int is for each device.
      encoding: how the weight is stored (`Blocks`, `Float`, ...), whether it holds the numbers
        exactly or not; None for the narrowest that does.
      exact: how the columns for `k` are stored; None for as the model has them.
      round_inputs: whether the inputs of the compressed product are rounded to 8 bits, as most
        formats of inference do: processors multiply such numbers many at a time. For an `encoding`
        that rounds too.
      lookups: whether rows of the weight that are looked up elsewhere (those of an embedding that
        is tied to a head) are read from the compressed copy too, so that the weight is not held
        twice. None for where that loses nothing.
      max_tokens, path, force: as in `FFN`.

    Raises:
      HireRewriteError: an argument is out of its range.
    """

    k: float | int = 0
    _: dataclasses.KW_ONLY
    encoding: Encoding | None = None
    exact: Encoding | None = None
    round_inputs: bool = False
    lookups: bool | None = None
    max_tokens: int | None = None
    path: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if self.k != 0 or isinstance(self.k, bool):
            check_amount("Linear", "k", self.k)
        for name in ("encoding", "exact"):
            encoding = getattr(self, name)
            if encoding is not None and not is_one(encoding, Encoding):
                raise HireRewriteError(
                    f"Linear: {name}={encoding!r} is not an encoding: give Blocks(...) or "
                    "Float(...)"
                )
        if self.encoding is None and (self.k or self.exact is not None or self.round_inputs):
            raise HireRewriteError(
                "Linear: k, exact and round_inputs are for an encoding that rounds, and without "
                "`encoding` nothing is rounded: give encoding=Blocks(8), or leave them out"
            )
        if self.exact is not None and not self.k:
            raise HireRewriteError(
                "Linear: exact= says how columns are stored, and k=0 asks for none"
            )
        if not isinstance(self.round_inputs, bool):
            raise HireRewriteError(
                f"Linear: round_inputs={self.round_inputs!r} must be True or False"
            )
        if self.lookups is not None and not isinstance(self.lookups, bool):
            raise HireRewriteError(f"Linear: lookups={self.lookups!r} must be True, False or None")
        super().__post_init__()
