"""All models of the zoo."""

from __future__ import annotations

from tests.zoo import (
    equinox,
    equinox_vision,
    haiku,
    keras,
    linen,
    linen_gemma,
    linen_moe,
    linen_t5,
    linen_vision,
    nnx,
    nnx_moe,
    penzai,
    plain,
    plain_heads,
    plain_loops,
    plain_moe,
    plain_other,
    plain_products,
)
from tests.zoo.model import Model

__all__ = ["MODELS"]

MODELS: list[Model] = [
    *linen.MODELS,
    *linen_gemma.MODELS,
    *linen_t5.MODELS,
    *linen_moe.MODELS,
    *linen_vision.MODELS,
    *haiku.MODELS,
    *keras.MODELS,
    *nnx.MODELS,
    *nnx_moe.MODELS,
    *equinox.MODELS,
    *equinox_vision.MODELS,
    *penzai.MODELS,
    *plain.MODELS,
    *plain_heads.MODELS,
    *plain_other.MODELS,
    *plain_moe.MODELS,
    *plain_products.MODELS,
    *plain_loops.MODELS,
]
