"""Tests of a rewritten model, to copy: put your own model in place of `decode_step`.

pytest examples/test_my_model.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite import testing

LAYERS, D, HIDDEN, VOCABULARY = 2, 64, 256, 8192


def decode_step(params, token):
    """Two gated blocks and a tied head."""
    x = params["embed"][token]
    for w in params["layers"]:
        x = x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]
    return x @ params["embed"].T


# Models of tests are too small to gain anything: without `force` all would stay dense.
RULES = (
    hire.FFN(k=0.05, tail="predicted", encoding=hire.Blocks(8), force=True),
    hire.Head(k=64, force=True),
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def matrix(n, d):
        return jnp.asarray(rng.standard_normal((n, d)) / d**0.5, jnp.float32)

    layers = [
        {"gate": matrix(D, HIDDEN), "up": matrix(D, HIDDEN), "down": matrix(HIDDEN, D)}
        for _ in range(LAYERS)
    ]
    return {"embed": matrix(VOCABULARY, D), "layers": layers}


@pytest.fixture(scope="module")
def batches():
    """Text that the model may see: real tokens, where there are some."""
    rng = np.random.default_rng(1)
    return [(jnp.asarray(rng.integers(0, VOCABULARY, 4)),) for _ in range(16)]


def test_what_is_rewritten(params, batches):
    step = hire.transform(decode_step, *RULES)
    testing.assert_rewrites(step, params, *batches[0], ffn=LAYERS, head=1)


def test_nothing_is_taken_for_what_it_is_not(params, batches):
    testing.assert_same_at_full_budget(decode_step, params, *batches[0])


def test_it_says_what_the_dense_model_says(params, batches):
    step = hire.transform(decode_step, *RULES)
    testing.assert_no_change_of_meaning(step, params, batches, same_token=0.95, kl=1e-3)


def test_the_head_finds_the_greatest_logits(params, batches):
    step = hire.transform(decode_step, hire.Head(k=64, force=True))
    testing.assert_recall(step, step.pack(params, *batches[0]), batches, at_least=0.99)
