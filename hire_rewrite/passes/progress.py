"""A progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(what: str, unit: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar for what takes seconds, where tqdm is installed.

    Yields a function to be called when a unit is done, with a note for the end of the bar or none.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda note="": None
        return
    with tqdm(total=total, desc=what, unit=unit, delay=2.0, leave=False) as bar:

        def advance(note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update()

        yield advance
