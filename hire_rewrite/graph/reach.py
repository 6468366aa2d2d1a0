"""All that can be reached from some values, or whatever else has a way on, each once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def reached(starts: Iterable[T], behind: Callable[[T], Iterable[T]]) -> Iterator[T]:
    """What is reached from some starts, those too, each once and before what is behind it.

    However many stand in a row, Python's stack stays flat. What is behind one is asked for when
    the next is.

    Args:
      behind: what one step leads to.
    """
    stack = list(dict.fromkeys(starts))
    seen = set(stack)
    while stack:
        current = stack.pop()
        yield current
        new = [each for each in dict.fromkeys(behind(current)) if each not in seen]
        stack += new
        seen.update(new)
