"""Models in plain JAX that read one weight in several places: in loops, branches and outside."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.zoo.model import Built, Model, ffn, head
from tests.zoo.plain import norm, normal

D, V, T = 32, 256, 4
LAYERS, EXPERTS = 4, 4


def _params(dtype: Any, **more: Any) -> dict[str, Any]:
    embed, lm_head = normal(90, V, D, dtype=dtype), normal(91, D, V, dtype=dtype)
    return more | {"embed": embed, "norm": jnp.ones(D, dtype), "lm_head": lm_head}


def _logits(params: Any, x: jax.Array) -> jax.Array:
    return norm(x, params["norm"]) @ params["lm_head"]


def _inside_and_outside(dtype: Any) -> Built:
    """Stacked weights are scanned forth, back and in pairs, and single ones of them read outside;
    one weight is the same in all iterations and behind them."""
    stack = {"a": normal(0, LAYERS, D, D, dtype=dtype), "b": normal(1, LAYERS, D, D, dtype=dtype)}
    params = _params(dtype, layers=stack, shared=normal(2, D, D, dtype=dtype))

    def forward(params, tokens):
        layers, shared = params["layers"], params["shared"]

        def layer(x, w):
            h = jnp.tanh(norm(x, params["norm"]) @ w["a"]) + jnp.sin(x @ shared)
            return x + 0.5 * jnp.tanh(h) @ w["b"], jnp.sum(h)

        def pair(x, w):
            for i in (0, 1):
                x, _ = layer(x, jax.tree.map(lambda a, i=i: a[i], w))
            return x, None

        def counted(i, x):
            return x + 0.1 * jnp.tanh(x @ layers["a"][LAYERS - 1 - i])

        x = params["embed"][tokens]
        x, sums = lax.scan(layer, x, layers)
        x, back = lax.scan(layer, x, layers, reverse=True)
        x, _ = lax.scan(pair, x, jax.tree.map(lambda a: a.reshape(2, 2, D, D), layers))
        x = lax.fori_loop(0, LAYERS, counted, x)
        x = x + jnp.tanh(x @ layers["a"][1]) + jnp.tanh(x @ layers["b"][-1].T) @ shared
        return _logits(params, x), sums, back

    return Built(forward, params, (jnp.arange(T)[None],))


def _halting(dtype: Any) -> Built:
    """A `while_loop` whose condition reads a weight too; its weights are also read outside."""
    params = _params(
        dtype,
        w=normal(0, D, D, dtype=dtype), halt=normal(1, D, 1, dtype=dtype),
        stack=normal(2, LAYERS, D, D, dtype=dtype),
    )  # fmt: skip

    def forward(params, tokens):
        def unfinished(carry):
            step, x = carry
            done = jax.nn.sigmoid(x @ params["halt"]).astype(jnp.float32).mean()
            return (step < LAYERS) & (done < 2)

        def block(carry):
            step, x = carry
            x = x + jnp.tanh(norm(x, params["norm"]) @ params["w"])
            return step + 1, x + 0.1 * jnp.tanh(x) @ params["stack"][step]

        x = jnp.tanh(params["embed"][tokens] @ params["w"])
        _, x = lax.while_loop(unfinished, block, (0, x))
        return _logits(params, x), x @ params["halt"]

    return Built(forward, params, (jnp.arange(T)[None],))


def _branches(dtype: Any) -> Built:
    """One weight in both branches of a `cond`, layers as branches of a `switch`, a layer for each
    token under `map`, and what is computed again for gradients."""
    params = _params(
        dtype,
        w=normal(0, D, D, dtype=dtype), b=normal(1, D, dtype=dtype),
        layers=[normal(2 + i, D, D, dtype=dtype) for i in range(3)],
        last=normal(5, D, D, dtype=dtype),
    )  # fmt: skip

    def forward(params, tokens, place):
        x, w = params["embed"][tokens], params["w"]
        x = lax.cond(
            place > 1,
            lambda x: x + jnp.tanh(x @ w + params["b"]),
            lambda x: x - jnp.tanh((x + params["b"]) @ w.T),
            x,
        )
        branches = [lambda x, w=w: jnp.tanh(x @ w) for w in params["layers"]]
        x = x + lax.switch(place, branches, norm(x, params["norm"]))
        x = x + lax.map(lambda token: jnp.tanh(token @ w), x[0])[None]
        again = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))
        return _logits(params, x + again(x, params["last"]))

    return Built(forward, params, (jnp.arange(T)[None], jnp.int32(2)))


def _tied(dtype: Any) -> Built:
    """An embedding that is looked up in several ways, is a memory, and is the head."""
    params = _params(dtype, w=normal(0, D, D, dtype=dtype))
    del params["lm_head"]

    def forward(params, tokens):
        embed = params["embed"]
        x = embed[tokens] + jnp.take(embed, tokens + 1, axis=0, mode="clip")
        x = x + embed[V - 1] + embed.at[tokens + V - 2].get(mode="fill", fill_value=0)
        x = x + jax.vmap(lambda token: embed[token])(tokens[0])[None]
        h = norm(x, params["norm"]) @ params["w"]
        found = jax.nn.softmax((h @ embed.T).astype(jnp.float32)).astype(h.dtype) @ embed
        x = x + found + jnp.tanh(x @ embed[:D])
        return jnp.einsum("btd,vd->btv", norm(x, params["norm"]), embed)

    return Built(forward, params, (jnp.arange(T)[None],))


def _balanced(dtype: Any) -> Built:
    """Experts whose router's logits are also two losses; all experts are computed."""
    layers = [
        {"router": normal(i, D, EXPERTS, dtype=dtype),
         "up": normal(i + 2, EXPERTS, D, D, dtype=dtype),
         "shared": normal(i + 4, D, D, dtype=dtype)}
        for i in (0, 1)
    ]  # fmt: skip
    params = _params(dtype, layers=layers)

    def forward(params, tokens):
        x, losses = params["embed"][tokens], []
        for w in params["layers"]:
            h = norm(x, params["norm"])
            logits = (h @ w["router"]).astype(jnp.float32)
            gates = jax.nn.softmax(logits)
            z = jnp.square(jax.nn.logsumexp(logits, axis=-1)).mean()
            chosen = jax.nn.one_hot(jnp.argmax(logits, axis=-1), EXPERTS)
            losses += [z, EXPERTS * jnp.sum(chosen.mean((0, 1)) * gates.mean((0, 1)))]
            experts = jnp.tanh(jnp.einsum("btd,edf->btef", h, w["up"]))
            mixed = jnp.einsum("btef,bte->btf", experts, (gates * chosen).astype(h.dtype))
            x = x + mixed + jnp.tanh(h @ w["shared"])
        return _logits(params, x), jnp.stack(losses)

    return Built(forward, params, (jnp.arange(T)[None],))


_HEAD = head("params/lm_head", D, V)

MODELS = [
    Model("JAX", "weights in a scan and outside", "forward", _inside_and_outside, (
        ffn("params/shared", D, D, "tanh"), _HEAD), linears=14),
    Model("JAX", "adaptive depth in a while_loop", "forward", _halting, (_HEAD,), linears=4),
    Model("JAX", "weights in branches", "forward", _branches, (_HEAD,), linears=7),
    Model("JAX", "embedding read in five ways", "forward", _tied, (head("params/embed", D, V),),
          linears=4),
    Model("JAX", "router with balance losses", "forward", _balanced, (_HEAD,), linears=6),
]  # fmt: skip
