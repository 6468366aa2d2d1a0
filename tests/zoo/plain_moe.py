"""Mixtures of experts, and models over several devices, in plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.zoo.model import Built, Model, ffn, head
from tests.zoo.plain import attention, layers_of, model_of, norm, normal, swiglu

D, G, V, T, EXPERTS, CHOSEN = 32, 96, 256, 4, 4, 2


def _experts(dtype: Any) -> Any:
    params = model_of(dtype)
    stack = (3, EXPERTS)
    params["layers"] |= {
        "w_gate": normal(31, *stack, D, G, dtype=dtype),
        "w_up": normal(32, *stack, D, G, dtype=dtype),
        "w_down": normal(33, *stack, G, D, dtype=dtype),
        "router": normal(34, 3, D, EXPERTS, dtype=dtype),
    }
    return params


def _mixture(dtype: Any, block: Callable[[Any, jax.Array], jax.Array]) -> Built:
    def forward(params, tokens):
        def layer(x, w):
            x = x + attention(w, norm(x, w["attention_norm"]))
            h = norm(x, w["ffn_norm"])
            return x + block(w, h.reshape(-1, D)).reshape(h.shape), None

        x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
        return norm(x, params["norm"]) @ params["lm_head"]

    return Built(forward, _experts(dtype), (jnp.arange(T)[None],))


def _chosen(w: Any, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixtral: a softmax over the chosen experts' scores."""
    scores, experts = jax.lax.top_k((h @ w["router"]).astype(jnp.float32), CHOSEN)
    return jax.nn.softmax(scores).astype(h.dtype), experts


def _ragged(w: Any, h: jax.Array) -> jax.Array:
    weights, experts = _chosen(w, h)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat)
    rows, sizes = jnp.take(h, order // CHOSEN, axis=0), jnp.bincount(flat, length=EXPERTS)
    gate, up = (jax.lax.ragged_dot(rows, w[name], sizes) for name in ("w_gate", "w_up"))
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, w["w_down"], sizes)
    out = out * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(h).at[order // CHOSEN].add(out)


def _scanned(w: Any, h: jax.Array) -> jax.Array:
    """Every expert sees every token; those not chosen count nothing."""
    weights, experts = _chosen(w, h)
    dense = jnp.einsum("tk,tke->te", weights, jax.nn.one_hot(experts, EXPERTS, dtype=h.dtype))

    def expert(total, one):
        matrices, weight = one
        return total + weight[:, None] * swiglu(matrices, h), None

    matrices = {name: w[name] for name in ("w_gate", "w_up", "w_down")}
    total, _ = jax.lax.scan(expert, jnp.zeros_like(h), (matrices, dense.T))
    return total


def _batched(w: Any, h: jax.Array) -> jax.Array:
    """The same as one product with a batch of matrices."""
    weights, experts = _chosen(w, h)
    gate = jnp.einsum("td,edf->etf", h, w["w_gate"])
    up = jnp.einsum("td,edf->etf", h, w["w_up"])
    out = jnp.einsum("etf,efd->etd", jax.nn.silu(gate) * up, w["w_down"])
    picked = out[experts, jnp.arange(len(h))[:, None]]
    return jnp.einsum("tkd,tk->td", picked, weights)


def _tensor_parallel(dtype: Any) -> Built:
    """Each of two devices holds half of the neurons."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    specs = {"w_gate": P(None, "model"), "w_up": P(None, "model"), "w_down": P("model", None)}

    @jax.shard_map(mesh=mesh, in_specs=(specs, P()), out_specs=P())
    def parallel(w, h):
        return jax.lax.psum(swiglu(w, h), "model")

    def forward(params, tokens):
        x = params["embed"][tokens]
        for w in params["layers"]:
            x = x + attention(w, norm(x, w["attention_norm"]))
            x = x + parallel({name: w[name] for name in specs}, norm(x, w["ffn_norm"]))
        return norm(x, params["norm"]) @ params["lm_head"]

    params = model_of(dtype) | {"layers": [layers_of(20 * i, dtype) for i in (0, 1)]}
    return Built(forward, params, (jnp.arange(T)[None],))


def _explicit(dtype: Any) -> Built:
    """Shardings are part of the types; the weights are gathered where they are used."""
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Explicit,), devices=jax.devices()[:2])
    specs = {"w_gate": P(None, "model"), "w_up": P(None, "model"), "w_down": P("model", None)}

    def block(w, h):
        gate = jax.nn.silu(jnp.einsum("btd,df->btf", h, w["w_gate"]))
        up = jnp.einsum("btd,df->btf", h, w["w_up"])
        whole = P(None, None, None)
        return jnp.einsum("btf,fd->btd", gate * up, w["w_down"], out_sharding=whole)

    def forward(params, tokens):
        tokens = jax.reshard(tokens, NamedSharding(mesh, P(None, None)))
        x = params["embed"].at[tokens].get(out_sharding=NamedSharding(mesh, P(None, None, None)))
        for w in params["layers"]:
            x = x + attention(w, norm(x, w["attention_norm"]))
            x = x + block(w, norm(x, w["ffn_norm"]))
        lm_head = jax.reshard(params["lm_head"], NamedSharding(mesh, P(None, None)))
        return jnp.einsum("btd,dv->btv", norm(x, params["norm"]), lm_head)

    params = model_of(dtype) | {"layers": [layers_of(20 * i, dtype) for i in (0, 1)]}
    params["lm_head"] = jax.device_put(params["lm_head"], NamedSharding(mesh, P(None, "model")))

    def place(path, leaf):
        spec = specs.get(getattr(path[-1], "key", None), P())
        return leaf if path[0].key == "lm_head" else jax.device_put(leaf, NamedSharding(mesh, spec))

    params = jax.tree_util.tree_map_with_path(place, params)

    def under(params, tokens):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return forward(params, tokens)

    return Built(under, params, (jax.device_put(jnp.arange(T)[None], NamedSharding(mesh, P())),))


_HEAD = head("params/lm_head", D, V)
_EXPERTS = {"gated": True, "experts": EXPERTS, "repeats": 3}
_FFNS = tuple(
    ffn(f"params/layers/{i}/w_down", D, G, "silu", gated=True) for i in (0, 1)
)  # fmt: skip

MODELS = [
    # Which rows of `ragged_dot` meet which expert is known at run time.
    Model("JAX", "Mixtral by ragged_dot", "forward", lambda dtype: _mixture(dtype, _ragged),
          (_HEAD,), mapped=False, linears=5),
    # A scan over the experts is a repeated FFN, each with its own weights.
    Model("JAX", "Mixtral by a scan", "forward", lambda dtype: _mixture(dtype, _scanned), (
        ffn("params/layers/w_down", D, G, "silu", gated=True, repeats=3 * EXPERTS), _HEAD,
    ), linears=5),
    Model("JAX", "Mixtral by batched products", "forward", lambda dtype: _mixture(dtype, _batched),
          (ffn("params/layers/w_down", D, G, "silu", **_EXPERTS), _HEAD), linears=5),
    # What one device does: half of the width.
    Model("JAX", "FFN under shard_map", "forward", _tensor_parallel, (
        *(ffn(f"params/layers/{i}/w_down", D, G // 2, "silu", gated=True) for i in (0, 1)), _HEAD,
    ), linears=8),
    Model("JAX", "explicit shardings", "forward", _explicit, (
        *_FFNS, head("params/lm_head", D, V),
    ), linears=8),
]  # fmt: skip
