"""What calibration looks at in a block: which groups are active, and what a smaller k would lose.

Everything is a sum over tokens, so that reports of several batches can be added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hire_rewrite.ops.ffn.block import FFNSpec
from hire_rewrite.ops.ffn.importance import importance, places
from hire_rewrite.ops.quality import relative_error

_STEPS = 33
"""Values of k that are tried, from 1/64 of the groups to all of them."""


class Activity(NamedTuple):
    """Sums over tokens.

    Attributes:
      tokens: f32[], how many.
      kept: f32[G], how often each group was among the k greatest.
      chosen: f32[G], how often it was among the candidates, had they been predicted exactly.
      share: f32[n], for each of `tried_groups` what so many groups keep: of non-zero neurons
        their share (times the non-zero ones there are), of any others 1 − relative error.
      whole: f32[], what all groups keep, in the same unit.
    """

    tokens: Array
    kept: Array
    chosen: Array
    share: Array
    whole: Array


def tried_groups(groups: int) -> list[int]:
    """Numbers of groups, ascending, for which `Activity` tells what they keep."""
    counts = np.ceil(groups * np.geomspace(1 / 64, 1.0, _STEPS) - 1e-6).astype(int)
    return sorted({max(1, int(count)) for count in counts})


def activity(
    h: Array,
    norms: Array | None,
    spec: FFNSpec,
    down: Callable[[Array], Array],
    *,
    shares: bool,
) -> Activity:
    """The activity of a block.

    Args:
      h: [tokens, f], exact activations.
      norms: as in `importance`.
      down: the rest of the block, from [tokens, f] to its output.
      shares: whether to find what each k keeps; zeros otherwise.
    """
    tokens, groups = h.shape[0], spec.groups
    place = places(importance(h, norms, spec.group), spec)
    tried = tried_groups(groups)
    share, whole = jnp.zeros(len(tried)), jnp.float32(tokens)
    if shares and spec.sparse:
        active = (h != 0).reshape(tokens, groups, spec.group).sum(-1).astype(jnp.float32)
        share = jnp.stack([jnp.where(place < count, active, 0.0).sum() for count in tried])
        whole = active.sum()
    elif shares:
        wanted = down(h)

        def kept_by(count: Array) -> Array:
            mask = jnp.repeat(place < count, spec.group, axis=1)
            got = down(jnp.where(mask, h, jnp.zeros_like(h)))
            return (1.0 - relative_error(got, wanted)).sum()

        share = lax.map(kept_by, jnp.asarray(tried))
    return Activity(
        tokens=jnp.float32(tokens),
        kept=(place < spec.k_groups).sum(0).astype(jnp.float32),
        chosen=(place < spec.candidate_groups).sum(0).astype(jnp.float32),
        share=share,
        whole=jnp.asarray(whole, jnp.float32),
    )


def smallest_k(seen: Activity, keep: float, groups: int) -> int:
    """The least of `tried_groups` that keeps `keep` in every layer; `seen` has a layer axis."""
    whole = np.asarray(seen.whole)[:, None]
    # A layer without any active neuron loses nothing.
    share = np.where(whole > 0, np.asarray(seen.share) / np.maximum(whole, 1e-30), 1.0)
    enough = np.min(share, axis=0) >= keep
    tried = tried_groups(groups)
    return next((count for count, fits in zip(tried, enough, strict=True) if fits), groups)


def expected_union(seen: Activity, tokens: int) -> float:
    """Groups that `tokens` independent tokens ask for together, in the layer that asks for most.

    Each group is a candidate of a token with the frequency p that the calibration saw, so it is
    one of some token's with 1 − (1 − p)^tokens.
    """
    chance = np.asarray(seen.chosen) / np.asarray(seen.tokens)[:, None]
    return float((1.0 - (1.0 - np.clip(chance, 0.0, 1.0)) ** tokens).sum(1).max())
