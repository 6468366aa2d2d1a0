"""Python logging under the name `hire_rewrite`: what each pass found, and how long it took.

Silent unless asked for:

    logging.basicConfig()
    logging.getLogger("hire_rewrite").setLevel(logging.DEBUG)
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Iterator

LOGGER = logging.getLogger("hire_rewrite")
LOGGER.addHandler(logging.NullHandler())

_verbs: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("verbs", default=())


def verbs() -> tuple[str, ...]:
    """The passes that run now, the outermost first."""
    return _verbs.get()


@contextlib.contextmanager
def timed(name: str, verb: str) -> Iterator[Callable[..., None]]:
    """Log a pass over a function, with its time.

    Yields a function to be told what was found: a format and its arguments, as `Logger.debug`.
    A pass that raises logs nothing.

    Args:
      name: of the function.
      verb: of the pass.
    """
    found = [""]

    def note(text: str, *args: object) -> None:
        if LOGGER.isEnabledFor(logging.DEBUG):
            found[0] = f"{text % args}, "

    start = time.perf_counter()
    around = _verbs.set((*verbs(), verb))
    try:
        yield note
    finally:
        _verbs.reset(around)
    LOGGER.debug("%s: %s: %s%.1f ms", name, verb, found[0], 1e3 * (time.perf_counter() - start))
