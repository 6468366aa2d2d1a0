"""How what was made of rows, such as a fitted predictor, is sharded with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from hire_rewrite.ops.predictors.protocol import Predictor
from hire_rewrite.sharding.rows import RowSharding

__all__ = ["fitted_specs", "specs_of"]


def fitted_specs(
    predictor: Predictor, rows: Any, n: int, top: int | None, sharding: RowSharding
) -> dict[str, Any]:
    """A `PartitionSpec` for each array of a fitted predictor (see `specs_of`).

    Args:
      top: as in `Predictor.fit`.
    """
    return specs_of(lambda some: predictor.fit(some, None, top), rows, n, sharding)


def specs_of(
    make: Callable[[Any], dict[str, Any]], rows: Any, n: int, sharding: RowSharding
) -> dict[str, Any]:
    """A `PartitionSpec` for each array: those of which an axis grows with the rows are sharded.

    Args:
      make: rows [n, d] to the arrays of one layer.
      rows: an array or shape with the dtype and the last axis of the rows.
      n: how many rows there are.
    """

    def shapes(n: int) -> dict[str, Any]:
        some = jax.ShapeDtypeStruct((n, rows.shape[-1]), rows.dtype)
        return dict(jax.eval_shape(make, some))

    once, twice = shapes(n), shapes(2 * n)
    specs: dict[str, Any] = {}
    for name, array in once.items():
        sizes = enumerate(zip(array.shape, twice[name].shape, strict=True))
        axis = next((i for i, pair in sizes if pair == (n, 2 * n)), None)
        specs[name] = PartitionSpec() if axis is None else sharding.along(axis + 1)
    return specs
