"""All models of the zoo."""

from __future__ import annotations

from tests.zoo import haiku
from tests.zoo.model import Model

__all__ = ["MODELS"]

MODELS: list[Model] = [
    *haiku.MODELS,
]
