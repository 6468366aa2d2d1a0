"""Products with some rows as they are stored, against sums of decoded rows in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite.ops import kernels
from hire_rewrite.ops.encodings import Blocks, Float, Nested, Words, picked_products, picked_sums

LAYERS, N, D, K = 2, 40, 192, 7
ENCODINGS = (
    Blocks(8),
    Blocks(4, minimum=True),
    Blocks(4, 96),
    Blocks(8, None, scale="float32"),
    Blocks(4, 16, scale="bfloat16"),
    Float("bfloat16"),
    Words(),
    Nested(),
    Nested(None),
)


def picked_sum(encoding, onto, h, stored, layer, picked):
    return picked_sums(encoding, [onto], h, [stored], layer, picked)[0]


def case(encoding, tokens):
    rng = np.random.default_rng(tokens)
    rows = rng.standard_normal((LAYERS, N, D)).astype(np.float32)
    stored = jax.vmap(encoding.store)(jnp.asarray(rows))
    x, h, onto = (rng.standard_normal((tokens, n)).astype(np.float32) for n in (D, K, D))
    picked = rng.integers(0, N, (tokens, K)).astype(np.int32)
    picked[:, 0], picked[:, 1] = 0, N - 1
    return stored, *map(jnp.asarray, (x, h, onto, picked))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_and_sums(encoding, tokens):
    stored, x, h, onto, picked = case(encoding, tokens)
    for layer in range(LAYERS):
        rows = np.asarray(encoding.decode(stored, layer), np.float64)[picked]
        products = jax.jit(picked_products, static_argnums=0)(encoding, x, stored, layer, picked)
        sums = jax.jit(picked_sum, static_argnums=0)(encoding, onto, h, stored, layer, picked)
        np.testing.assert_allclose(products, np.einsum("tkd,td->tk", rows, x), atol=1e-4)
        np.testing.assert_allclose(sums, onto + np.einsum("tkd,tk->td", rows, h), atol=1e-4)


@pytest.mark.skipif(kernels.cpu.status() != "in use", reason="needs the kernels for CPU")
@pytest.mark.parametrize(
    ("encoding", "read"), [(Blocks(8), True), (Blocks(4), True), (Blocks(4, 16), False)], ids=str
)
def test_which_rows_the_library_reads(encoding, read):
    stored, _, h, onto, picked = case(encoding, 2)
    run = jax.jit(lambda *arrays: picked_sum(encoding, *arrays))
    assert ("hire_picked_sum" in run.lower(onto, h, stored, 0, picked).as_text()) == read


@pytest.mark.parametrize("encoding", [Blocks(8), Float("float32")], ids=str)
def test_batches_and_derivatives(encoding):
    stored, _, h, onto, picked = case(encoding, 3)
    layers = jnp.arange(LAYERS)
    every = jax.vmap(lambda layer: picked_sum(encoding, onto, h, stored, layer, picked))(layers)
    for layer in range(LAYERS):
        alone = picked_sum(encoding, onto, h, stored, layer, picked)
        np.testing.assert_allclose(every[layer], alone, atol=1e-5)
    slope = jax.grad(lambda h: picked_sum(encoding, onto, h, stored, 1, picked).sum())(h)
    want = encoding.decode(stored, 1)[picked].sum(-1)
    np.testing.assert_allclose(slope, want, atol=1e-4)


def test_values_that_are_no_numbers_stay_with_their_token():
    stored, _, h, onto, picked = case(Blocks(8), 3)
    got = np.asarray(picked_sum(Blocks(8), onto, h.at[1, 2].set(jnp.nan), stored, 0, picked))
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()
