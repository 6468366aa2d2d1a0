"""The line of a user's code that an equation comes from."""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

from jax.extend import source_info_util

PACKAGE = Path(__file__).parents[1]

_LIBRARIES = (
    "flax", "equinox", "haiku", "keras", "keras_hub", "penzai", "jaxtyping", "beartype",
    "typeguard", "einops", "optax", "chex", "qwix",
)  # fmt: skip
"""Packages whose lines say nothing of the model that calls them."""

_DEPTH = 64
_FRAME = re.compile(r"(.*?):(\d+)\S* \((.*)\)$")


def user_place(source_info: Any) -> tuple[str, int, str] | None:
    """File, line and function of the innermost line of the user's code, past those of layers that
    libraries define; of the library where there is no other, and None if JAX knows none."""
    innermost = None
    for text in reversed(source_info_util.summarize(source_info, _DEPTH).splitlines()):
        found = _FRAME.match(text)
        if found is None:
            continue
        place = found[1], int(found[2]), found[3]
        if innermost is None:
            innermost = place
        elif _is_inside(place[0], PACKAGE):
            break  # what is around it called this package
        if not _is_library(place[0]):
            return place
    return innermost


def _is_inside(file: str, folder: Path) -> bool:
    return file.startswith(str(folder) + os.sep)


@functools.cache
def _is_library(file: str) -> bool:
    modules = (sys.modules.get(name) for name in _LIBRARIES)
    files = (getattr(module, "__file__", None) for module in modules)
    return any(_is_inside(file, Path(name).parent) for name in files if name)
