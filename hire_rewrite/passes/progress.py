"""A progress bar, one at a time."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(what: str, unit: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar for what takes seconds, where tqdm is installed.

    Inside another bar there is none. `TQDM_DISABLE=1` in the environment switches all of them off.

    Yields a function to be called when a unit is done, with a note for the end of the bar or none.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or _open.get():
        yield lambda note="": None
        return
    with tqdm(total=total, desc=what, unit=unit, delay=2.0, leave=False) as bar:

        def advance(note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update()

        token = _open.set(True)
        try:
            yield advance
        finally:
            _open.reset(token)


_open = contextvars.ContextVar("progress", default=False)
"""Whether a bar is there."""
