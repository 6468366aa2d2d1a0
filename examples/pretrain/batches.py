"""Rows of tokens to train and to validate on.

Which rows a step reads follows from its number alone, so that training goes on after a break with
the rows that would have come next. An epoch cuts the text into rows at a place of its own and
shuffles them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a training.

    Attributes:
      tokens: i32[n], the text.
      context: tokens that the model reads at once; a row has one more, the last one's target.
      batch: rows of a step.
      seed: of the shuffling.
    """

    tokens: np.ndarray
    context: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_epoch < 1:
            raise ValueError(
                f"{len(self.tokens)} tokens are less than a batch of {self.batch} rows of "
                f"{self.context} tokens"
            )

    @property
    def rows(self) -> int:
        """Rows of an epoch, wherever it starts to cut."""
        return (len(self.tokens) - self.context) // self.context

    @property
    def per_epoch(self) -> int:
        return self.rows // self.batch

    def __getitem__(self, step: int) -> np.ndarray:
        """The rows of a step: i32[batch, context + 1]."""
        epoch, number = divmod(step, self.per_epoch)
        random = np.random.default_rng((self.seed, epoch))
        first = random.integers(self.context)
        chosen = random.permutation(self.rows)[number * self.batch :][: self.batch]
        starts = first + chosen * self.context
        return self.tokens[starts[:, None] + np.arange(self.context + 1)]


def in_order(tokens: np.ndarray, context: int, batch: int) -> Iterator[np.ndarray]:
    """Full batches of rows that follow one another: i32[batch, context + 1] each.

    Every token but the first is a target once, up to what fills no batch.
    """
    rows = (len(tokens) - 1) // context
    starts = np.arange(rows // batch * batch).reshape(-1, batch, 1) * context
    for rows_of_batch in starts + np.arange(context + 1):
        yield tokens[rows_of_batch]
