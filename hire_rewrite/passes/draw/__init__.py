"""A plan as a drawing: `boxes` folds the layers and says where each box stands, `picture` draws
them with matplotlib (the extra `plot`, imported only then), in the colors of `theme`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hire_rewrite.errors import EXTRA, HireRewriteError
from hire_rewrite.files import local, write
from hire_rewrite.passes.draw.boxes import boxes_of

if TYPE_CHECKING:
    from hire_rewrite.plan import Plan

__all__ = ["draw"]


def draw(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw a plan; see `Plan.draw`."""
    name = local("draw", path)
    ending = os.path.splitext(name)[1].lower()
    if ending not in (".svg", ".png"):
        raise HireRewriteError(f"draw: {name} has to end in .svg or .png")
    try:
        from hire_rewrite.passes.draw.picture import picture
    except ModuleNotFoundError as missing:
        raise HireRewriteError(
            f"draw: {missing.name} is missing: {EXTRA.format('plot')}"
        ) from missing
    write("draw", name, picture(boxes_of(plan.layers), ending.removeprefix(".")))
