"""Models in plain JAX that differ in what becomes of their logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.zoo.model import Built, Model, ffn, head
from tests.zoo.plain import attention, layers_of, model_of, norm, normal, trunk

D, F, G, V, T = 32, 128, 96, 256, 4


def _padded(dtype: Any) -> Built:
    """A vocabulary of 251 in a matrix padded to 256 rows."""

    def forward(params, tokens):
        return (trunk(params, tokens) @ params["lm_head"])[:, :, :251]

    return Built(forward, model_of(dtype), (jnp.arange(T)[None],))


def _several_tokens(dtype: Any) -> Built:
    """Medusa: a residual block and a head of its own for each of the tokens to come."""
    params = model_of(dtype) | {
        "medusa": [
            {"w": normal(50 + i, D, D, dtype=dtype), "b": normal(60 + i, D, dtype=dtype),
             "lm_head": normal(70 + i, D, V, dtype=dtype)}
            for i in (0, 1)
        ]
    }  # fmt: skip

    def forward(params, tokens):
        x = trunk(params, tokens)[:, -1]
        heads = [x @ params["lm_head"]]
        for w in params["medusa"]:
            heads.append((x + jax.nn.silu(x @ w["w"] + w["b"])) @ w["lm_head"])
        return jnp.stack(heads)

    return Built(forward, params, (jnp.arange(T)[None],))


def _translator(dtype: Any) -> Built:
    """Encoder and decoder; one head spells the source, the other writes the target."""
    plain = {"width": F, "gated": False}
    params = {
        "source": normal(90, V, D, dtype=dtype), "target": normal(91, V, D, dtype=dtype),
        "encoder": layers_of(0, dtype, (3,), **plain), "decoder": layers_of(10, dtype, **plain),
        "cross": layers_of(20, dtype, **plain) | {"norm": jnp.ones(D, dtype)},
        "ctc": {"w": normal(30, D, V, dtype=dtype), "b": normal(31, V, dtype=dtype)},
    }  # fmt: skip
    del params["cross"]["w_up"], params["cross"]["w_down"]

    def relu(w, x):
        return x + jnp.maximum(norm(x, w["ffn_norm"]) @ w["w_up"], 0) @ w["w_down"]

    def forward(params, source, target):
        def encode(x, w):
            return relu(w, x + attention(w, norm(x, w["attention_norm"]), causal=False)), None

        memory, _ = jax.lax.scan(encode, params["source"][source], params["encoder"])
        w, across = params["decoder"], params["cross"]
        x = params["target"][target]
        x = x + attention(w, norm(x, w["attention_norm"]))
        x = relu(w, x + attention(across, norm(x, across["norm"]), causal=False, memory=memory))
        logits = jnp.einsum("btd,vd->btv", x, params["target"]) * D**-0.5
        return logits, jax.nn.log_softmax(memory @ params["ctc"]["w"] + params["ctc"]["b"])

    tokens = jnp.arange(2 * T).reshape(2, T)
    return Built(forward, params, (tokens, tokens + 9))


def _loss(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    logits = (trunk(params, tokens) @ params["lm_head"]).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


def _evaluation(dtype: Any) -> Built:
    tokens = jnp.arange(2 * T).reshape(2, T)
    return Built(_loss, model_of(dtype), (tokens, tokens + 1))


def _training(dtype: Any) -> Built:
    """The backward pass reads every neuron and every logit again."""

    def step(params, tokens, targets):
        loss, grads = jax.value_and_grad(_loss)(params, tokens, targets)
        return loss, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

    tokens = jnp.arange(2 * T).reshape(2, T)
    return Built(step, model_of(dtype), (tokens, tokens + 1))


_FFN = ffn("params/layers/w_down", D, G, "silu", gated=True, repeats=3)
_HEAD = head("params/lm_head", D, V)

MODELS = [
    Model("JAX", "padded vocabulary", "forward", _padded, (_FFN, _HEAD), linears=4),
    Model("JAX", "Medusa", "forward", _several_tokens, (
        _FFN, _HEAD, *(head(f"params/medusa/{i}/lm_head", D, V) for i in (0, 1)),
    ), linears=6),
    Model("JAX", "translator with two heads", "forward", _translator, (
        ffn("params/encoder/w_down", D, F, "relu", repeats=3),
        ffn("params/decoder/w_down", D, F, "relu"),
        head("params/target", D, V), head("params/ctc/w", D, V),
    ), linears=12),
    Model("JAX", "cross-entropy", "forward", _evaluation, (_FFN, _HEAD), linears=4),
    Model("JAX", "training step", "forward", _training, linears=16),
]  # fmt: skip
