"""The short examples do what they show: a toy, three libraries, eight devices."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from examples import toy
from examples.libraries import equinox_model, linen_model, nnx_model
from examples.libraries.sizes import ROPE_BASE, Sizes
from examples.smollm2 import model as reference

ROOT = Path(__file__).parents[2]
SMALL = Sizes(vocabulary=8192, d=128, hidden=256, layers=2, heads=4, max_len=32)


def test_the_toy_finds_what_the_dense_one_says():
    dense, rewritten = toy.main()
    np.testing.assert_array_equal(dense.argmax(-1), rewritten.argmax(-1))
    best = lax.top_k(dense, 64)[1]
    near = jnp.take_along_axis(rewritten - dense, best, -1)
    assert 0 < float(jnp.abs(near).max()) < 0.05


# The same decoder in three libraries


@pytest.mark.sampled(3)
@pytest.mark.parametrize("example", [nnx_model, linen_model, equinox_model])
def test_models_of_libraries_choose_the_same_tokens(example):
    plan, dense, rewritten = example.main(SMALL, n=20)
    assert len(plan.rewritten) == 1 + 7 * SMALL.layers
    assert len(plan["head"]) == 1
    assert dense.shape[-1] == 20
    assert len(np.unique(dense)) > 5
    np.testing.assert_array_equal(dense, rewritten)


def expected(blocks, embed, eps, tokens):
    """Logits: f32[seq, vocab] at each of tokens, without a cache, by the example of SmolLM2."""
    config = reference.Config(
        SMALL.vocabulary, SMALL.d, SMALL.hidden, SMALL.layers, SMALL.heads, SMALL.heads,
        ROPE_BASE, eps,
    )  # fmt: skip
    layers = jax.tree.map(lambda *arrays: jnp.stack(arrays), *blocks)
    norms = {"attn_norm": jnp.ones((SMALL.layers, SMALL.d))}
    norms["ffn_norm"] = norms["attn_norm"]
    params = {"embed": embed, "final_norm": jnp.ones(SMALL.d), "layers": layers | norms}
    return reference.forward(config, params, tokens[None])[0]


NAMES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
TOKENS = jnp.array([5, 4, 5, 99, 1000])


def layers_of(block):
    attention = block.attention
    own = (attention.query, attention.key, attention.value, attention.out)
    return dict(zip(NAMES, (*own, block.gate, block.up, block.down), strict=True))


def test_the_nnx_model_remembers_what_it_read():
    model = nnx_model.Decoder(SMALL, 1, nnx.Rngs(0))
    blocks = [
        {name: layer.kernel[...] for name, layer in layers_of(block).items()}
        for block in model.blocks
    ]
    want = expected(blocks, model.embed.embedding[...], 1e-6, TOKENS)
    step = nnx.jit(lambda model, token: model(token))
    got = jnp.concatenate([step(model, token[None]) for token in TOKENS])
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_equinox_model_remembers_what_it_read():
    model, state = eqx.nn.make_with_state(equinox_model.Decoder)(SMALL, jax.random.key(0))
    model = eqx.tree_at(lambda model: model.head.weight, model, model.embed.weight)
    blocks = [
        {name: layer.weight.T for name, layer in layers_of(block).items()} for block in model.blocks
    ]
    want = expected(blocks, model.embed.weight, 1e-5, TOKENS)
    step, got = eqx.filter_jit(model), []
    for token in TOKENS:
        logits, state = step(token, state)
        got.append(logits)
    np.testing.assert_allclose(jnp.stack(got), want, atol=1e-3)


def test_the_linen_model_remembers_what_it_read():
    """With one layer, the last of all tokens at once sees the same as the last one by one."""
    sizes = dataclasses.replace(SMALL, layers=1, max_len=len(TOKENS))
    model = linen_model.Decoder(sizes)
    want, variables = jax.jit(model.init_with_output)(jax.random.key(0), TOKENS[None])
    cache = variables["cache"]
    step = jax.jit(functools.partial(model.apply, mutable=["cache"]))
    for token in TOKENS:
        got, updated = step({"params": variables["params"], "cache": cache}, token[None, None])
        cache = updated["cache"]
    np.testing.assert_allclose(got, want, atol=1e-4)


# Eight devices

PROGRAM = """
import json
from examples.eight_devices import main
import jax
found = main()
sent = {name: [each.bytes for each in results[1]] for name, results in found.items()}
(dense, _), (rewritten, _) = found.values()
same = float((dense == rewritten).mean()), float((dense[:, 0] == rewritten[:, 0]).mean())
print(json.dumps({"devices": jax.device_count(), "sent": sent, "same": same}))
"""


def test_eight_devices_send_few_values_in_place_of_all_logits():
    """In a process of its own, which has one device until the example asks for eight."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    logits = 8 * 32_768 * 4
    assert max(found["sent"]["dense"]) >= logits
    assert sum(found["sent"]["rewritten"]) < logits / 10
    assert found["same"][0] > 0.9
    assert found["same"][1] == 1.0
