"""The decode step of `benchmarks.decode_1b` written by hand on `hire_rewrite.ops`.

It calls the operations that the rewriter has chosen, on the arrays that it has packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from examples.layers import attend_cache, remember, rms_norm, rotate
from examples.smollm2 import model
from hire_rewrite.ops.ffn.ffn import hire_ffn
from hire_rewrite.ops.head.head import hire_head
from hire_rewrite.ops.linear.linear import hire_linears
from hire_rewrite.packed import Packed
from hire_rewrite.sites.ffn.operation import FFNOperation
from hire_rewrite.sites.head.operation import HeadOperation
from hire_rewrite.sites.linear.operation import LinearOperation
from hire_rewrite.sites.operation import Operation
from hire_rewrite.transformed import Transformed

LAYERS, EMBED, BLOCK = "params/layers/", "params/embed", "params/layers/w_down"
NORMS = ("attn_norm", "ffn_norm")


def by_hand(config: model.Config, step: Transformed, *args: Any) -> Callable[..., Any]:
    """The step by hand.

    Args:
      args: of a call of `step`, which says what it has chosen.
    """
    analysis = step._analyses.of(args[0], args, {})
    ops = {decision.packed_name: decision.op for decision in analysis.decisions if decision.packs}

    def run(packed: Packed, token: Array, cache: model.Cache) -> tuple[Array, model.Cache]:
        read = Reader(ops, packed)
        pos, length = cache["pos"], cache["v"].shape[3]
        positions, filled = pos + jnp.arange(1), pos + 1
        mask = positions[:, None] >= jnp.arange(length)
        dense = {
            path.removeprefix(LAYERS): weight
            for path, weight in packed.weights.items()
            if path.startswith(LAYERS)
        }

        def layer(carry: Any, scanned: Any) -> tuple[Any, None]:
            x, keys, values = carry  # x: [batch, d_model]
            w, index = scanned
            h = rms_norm(x, w["attn_norm"], config.norm_eps)
            q, k, v = _heads(config, read.linears(h, ("wq", "wk", "wv"), w, index), positions)
            keys, values = remember((keys, values), index, pos, k, v)
            mixed = attend_cache(q, (keys, values), index, filled, mask)[:, 0]
            x = x + read.linears(mixed, ("wo",), w, index)[0]
            h = rms_norm(x, w["ffn_norm"], config.norm_eps)
            return (x + read.block(h, w, index), keys, values), None

        carry = (packed.weights[EMBED][token], cache["k"], cache["v"])
        scanned = (dense, jnp.arange(config.layers))
        (x, keys, values), _ = lax.scan(layer, carry, scanned)
        logits = read.head(rms_norm(x, packed.weights["params/final_norm"], config.norm_eps))
        return logits, {"k": keys, "v": values, "pos": pos + 1}

    return run


class Reader:
    """The products of the step, by the operations of its sites.

    Args:
      ops: by the name of what they are packed to.
    """

    def __init__(self, ops: Mapping[str, Operation], packed: Packed) -> None:
        self._ops, self._sites = ops, packed.sites

    def linears(
        self, h: Array, names: Sequence[str], dense: Mapping[str, Array], index: Array
    ) -> list[Array]:
        """h: [batch, in] times the weights of these names in a layer, read together."""
        op = self._ops.get(LAYERS + names[0])
        if op is None:
            return [h @ dense[name] for name in names]
        assert isinstance(op, LinearOperation)
        return hire_linears(h, [self._sites[LAYERS + name] for name in names], index, spec=op.spec)

    def block(self, h: Array, dense: Mapping[str, Array], index: Array) -> Array:
        """The FFN of a layer on h: [batch, d_model]."""
        op = self._ops[BLOCK]
        if not isinstance(op, FFNOperation):
            gate, up = self.linears(h, ("w_gate", "w_up"), dense, index)
            return self.linears(jax.nn.silu(gate) * up, ("w_down",), dense, index)[0]
        gated = op.spec.gate
        return hire_ffn(
            h,
            self._sites[BLOCK],
            index,
            spec=op.spec,
            activation=lambda pre, _: jax.nn.silu(pre[gated]) * pre[1 - gated],
            predictor=op.predictor,
            budget=op.budget,
        )

    def head(self, x: Array) -> Array:
        """The logits of x: [batch, d_model]."""
        op, arrays = self._ops[EMBED], self._sites[EMBED]
        if isinstance(op, LinearOperation):
            return hire_linears(x, [arrays], 0, spec=op.spec)[0]
        assert isinstance(op, HeadOperation)
        (logits,) = hire_head(
            x, arrays, 0, spec=op.spec, endpoints=lambda z: (z,), predictor=op.predictor
        )
        return logits


def _heads(
    config: model.Config, products: Sequence[Array], positions: Array
) -> tuple[Array, Array, Array]:
    """What `model._qkv` returns for its three products, each [batch, n]."""
    q, k, v = (product.reshape(len(product), 1, -1, config.head_dim) for product in products)
    q = q.reshape(len(q), 1, config.kv_heads, config.group, config.head_dim)
    q = rotate(jnp.einsum("bskgh->bkgsh", q), positions, config.rope_base)
    k = rotate(jnp.einsum("bskh->bksh", k), positions, config.rope_base)
    return q, jnp.einsum("bksh->bkhs", k), jnp.einsum("bskh->bksh", v)
