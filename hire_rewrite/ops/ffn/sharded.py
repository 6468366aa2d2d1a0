"""Sites whose rows are spread over the devices of a mesh.

Each device guesses, chooses and fetches among its own rows, all at the same time, inside a
`shard_map`. Tokens are spread over the other axes of the mesh (a data-parallel batch is so
already), so that no device computes what another one does. The results of a block are added up:
that is the all-reduce that the dense block has too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from hire_rewrite import _compat
from hire_rewrite.ops.ffn.block import Activation, FFNSpec, FFNState
from hire_rewrite.ops.ffn.ffn import hire_ffn
from hire_rewrite.ops.head.spec import HeadSpec, HeadState
from hire_rewrite.ops.predictors import Predictor

__all__ = ["Spread", "spread_ffn", "state_specs"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Axes of a mesh, over all of which together rows are spread, the major one first."""

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return " × ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.axes)

    @property
    def parts(self) -> int:
        """How many devices share the rows."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def along(self, axis: int) -> PartitionSpec:
        """Of an array whose axis `axis` is spread."""
        return PartitionSpec(*(None,) * axis, self.axes)

    def tokens(self, count: int) -> tuple[str, ...]:
        """The other axes of the mesh, for so many tokens; none if they do not divide them."""
        others = tuple(str(axis) for axis in self.mesh.axis_names if axis not in self.axes)
        return others if count % math.prod(self.mesh.shape[axis] for axis in others) == 0 else ()

    def groups(self, count: int) -> int:
        """Into how many groups so many tokens are spread."""
        return math.prod(self.mesh.shape[axis] for axis in self.tokens(count))

    def map(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """`function` on each device, of its own parts of the arguments."""
        return jax.shard_map(
            function,
            mesh=_compat.mesh_around(self.mesh),
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=False,
        )


def spread_ffn(
    x: Array,
    state: FFNState,
    layer: Array | int,
    *,
    spec: FFNSpec,
    activation: Activation,
    predictor: Predictor,
    spread: Spread,
    together: bool,
    budget: int | None = None,
) -> Array:
    """`hire_ffn` on state that is spread as `state_specs` says; `spec.parts` are the devices.

    Args:
      together: keep the tokens together, for the activation knows something of each.
    """

    count = x.shape[0]

    def on_some(pre: tuple[Array, ...], vectors: tuple[Array, ...]) -> Array:
        """The activation, which is written for all tokens, of some."""
        missing = ((0, count - pre[0].shape[0]), (0, 0))
        h = activation(tuple(jnp.pad(array, missing) for array in pre), vectors)
        return h[: pre[0].shape[0]]

    def own(x: Array, state: FFNState, layer: Array) -> Array:
        part = None if budget is None else -(-budget // spec.parts)
        y = hire_ffn(
            x,
            state,
            layer,
            spec=spec.part,
            activation=on_some,
            predictor=predictor,
            budget=part,
        )
        return lax.psum(y, spread.axes)

    tokens = PartitionSpec(() if together else spread.tokens(count))
    specs = state_specs(state, spec, predictor, spread)
    return spread.map(own, (tokens, specs, PartitionSpec()), tokens)(x, state, layer)


def state_specs(
    state: FFNState | HeadState, spec: FFNSpec | HeadSpec, predictor: Predictor, spread: Spread
) -> Any:
    """How the arrays of a packed site are spread: its rows, and what belongs to them.

    Args:
      state: of arrays or shapes.

    Returns:
      Of the structure of `state`, with a `PartitionSpec` for each array.
    """
    rows: Any = spread.along(1)
    if isinstance(state, HeadState):
        assert isinstance(spec, HeadSpec)
        fitted = _fitted_specs(predictor, state.rows, state.rows.shape[1], spec.candidates, spread)
        return HeadState(rows, fitted, {})
    assert isinstance(spec, FFNSpec)
    return FFNState(
        up=rows,
        down=rows,
        vectors=(rows,) * len(state.vectors),
        predictor=_fitted_specs(predictor, state.up, spec.scored_rows, None, spread),
        norms=None if state.norms is None else rows,
    )


def _fitted_specs(
    predictor: Predictor, rows: Any, n: int, top: int | None, spread: Spread
) -> dict[str, Any]:
    """Of a predictor's arrays, those of which an axis grows with the number of rows are spread."""

    def shapes(n: int) -> dict[str, Any]:
        some = jax.ShapeDtypeStruct((n, rows.shape[-1]), rows.dtype)
        return dict(jax.eval_shape(lambda some: predictor.fit(some, None, top), some))

    once, twice = shapes(n), shapes(2 * n)
    specs: dict[str, Any] = {}
    for name, array in once.items():
        sizes = enumerate(zip(array.shape, twice[name].shape, strict=True))
        axis = next((i for i, pair in sizes if pair == (n, 2 * n)), None)
        specs[name] = PartitionSpec() if axis is None else spread.along(axis + 1)
    return specs
