"""A progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(what: str, unit: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar for what takes seconds, where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, desc=what, unit=unit, delay=2.0, leave=False) as bar:
        yield lambda: bar.update() and None
