"""A dictionary that forgets."""

from __future__ import annotations

import threading
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """A dictionary of so many items: a new one takes the place of the oldest.

    Examples:
      >>> known = Recent(2)
      >>> known["a"], known["b"], known["c"] = 1, 2, 3
      >>> known
      {'b': 2, 'c': 3}
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self._lock = most, threading.Lock()

    def __setitem__(self, key: K, value: V) -> None:
        with self._lock:
            while key not in self and len(self) >= self.most:
                del self[next(iter(self))]
            super().__setitem__(key, value)
