import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite import _compat
from hire_rewrite.ops import narrow
from hire_rewrite.ops.gather import gather_rows
from hire_rewrite.ops.kernels import register_kernel
from hire_rewrite.ops.narrow import block_matmul, matmul
from hire_rewrite.ops.quantize import (
    dequantize_blocks,
    quantize_blocks,
    quantize_rows,
    rounded_blocks,
    unpack,
)
from tests.ops.cases import as_other_backends, normal


@pytest.fixture(params=["kernels", "fused", "chunks", "other backends"])
def form(request, monkeypatch):
    """Each way of computing a product, with chunks small enough to have several."""
    monkeypatch.setattr(_compat, "cpu_fuses_widening", request.param == "fused")
    monkeypatch.setattr(narrow, "_CHUNK", 100)
    with contextlib.ExitStack() as stack:
        if request.param == "other backends":
            stack.enter_context(as_other_backends())
        elif request.param != "kernels":
            for operation in (matmul, block_matmul):
                stack.enter_context(register_kernel(operation, "cpu", operation.reference))
        yield request.param


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, "int8"), (4, "float32"), (9, "int8"), (2, "bfloat16")]
)
def test_equals_the_plain_product(form, tokens, dtype):
    x = normal(0, tokens, 12)
    rows = (normal(1, 3, 53, 12) * 40).astype(dtype)
    got = jax.jit(matmul)(x, rows, jnp.int32(2))
    want = np.asarray(x) @ np.asarray(rows[2], np.float32).T
    assert got.dtype == jnp.float32
    # Other backends round x to bfloat16 where rows are narrow.
    rounded = form == "other backends" and dtype != "float32"
    sizes = np.abs(np.asarray(x)) @ np.abs(np.asarray(rows[2], np.float32)).T
    assert (np.abs(got - want) <= (2**-8 if rounded else 1e-5) * sizes).all()


def test_nan_stays_with_its_token(form):
    x = normal(0, 3, 12).at[1, 5].set(jnp.nan)
    got = jax.jit(matmul)(x, (normal(1, 1, 53, 12) * 40).astype(jnp.int8), 0)
    assert np.isnan(got[1]).all()
    assert not np.isnan(got[jnp.array([0, 2])]).any()


def test_bfloat16_vectors_give_float32_scores(form):
    x = normal(0, 2, 12, dtype=jnp.bfloat16)
    rows = (normal(1, 1, 53, 12) * 40).astype(jnp.int8)
    got = jax.jit(matmul)(x, rows, 0)
    assert got.dtype == jnp.float32
    want = np.asarray(x, np.float32) @ np.asarray(rows[0], np.float32).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_under_vmap_and_scan(form):
    x, rows = normal(0, 5, 2, 12), (normal(1, 4, 53, 12) * 40).astype(jnp.int8)
    want = np.einsum("btd,lnd->lbtn", np.asarray(x), np.asarray(rows, np.float32))
    got = jax.jit(jax.vmap(lambda row: matmul(row, rows, 1)))(x)
    np.testing.assert_allclose(got, want[1], rtol=1e-2, atol=1.0)
    _, layers = jax.lax.scan(lambda c, i: (c, matmul(x[0], rows, i)), 0, jnp.arange(4))
    np.testing.assert_allclose(layers, want[:, 0], rtol=1e-2, atol=1.0)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_lowers_for_every_platform(platform):
    x, rows = jnp.ones((1, 12)), jnp.ones((2, 53, 12), jnp.int8)
    text = jax.jit(matmul).trace(x, rows, 1).lower(lowering_platforms=(platform,)).as_text()
    # Accelerators multiply what they read; none of them is to get the CPU's loops or copies.
    assert ("bf16" in text) == (platform != "cpu")


def test_quantized_rows_are_off_by_half_a_step_at_most():
    rows = jnp.asarray(np.asarray(normal(0, 7, 20)) * 10.0 ** np.arange(-3.0, 4.0)[:, None])
    integers, scale = jax.jit(quantize_rows)(rows)
    assert integers.dtype == jnp.int8
    integers, scale = np.asarray(integers), np.asarray(scale)[:, None]
    assert (np.abs(integers * scale - rows) <= scale * 0.5001).all()
    assert (np.abs(integers).max(1) == 127).all()


def test_rows_of_zeros_and_rows_that_are_not_finite():
    rows = jnp.ones((4, 3)).at[0].set(0.0).at[1, 1].set(jnp.nan).at[2, 1].set(jnp.inf)
    integers, scale = jax.jit(quantize_rows)(rows)
    scores = matmul(jnp.ones((1, 3)), integers[None], 0) * scale
    assert scores[0, 0] == 0.0
    assert np.isnan(scores[0, 1])
    assert not np.isfinite(scores[0, 2])
    assert scores[0, 3] == pytest.approx(3.0)


def test_numbers_of_four_bits_come_back_half_a_row_apart():
    packed = jnp.arange(-128, 128, dtype=jnp.int8).reshape(16, 16)
    got = np.asarray(unpack(packed))
    assert (got.min(), got.max()) == (-8, 7)
    np.testing.assert_array_equal((got[:, :16] & 15) | (got[:, 16:] << 4), packed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_blocks_are_off_by_half_a_step_at_most(dtype):
    sizes = 10.0 ** np.arange(-36.0, 37.0, 12.0)[:, None]
    rows = jnp.asarray(np.asarray(normal(0, 7, 48)) * sizes, dtype)
    packed, scale = jax.jit(lambda r: quantize_blocks(r, 12))(rows)
    assert (packed.shape, scale.shape) == ((7, 24), (7, 4))
    assert (packed.dtype, scale.dtype) == (jnp.int8, jnp.bfloat16)
    off = np.abs(np.asarray(dequantize_blocks(packed, scale), np.float64) - np.asarray(rows, float))
    step = np.asarray(scale, np.float64)[..., None]
    # The scale was rounded, by 2⁻⁸ at most: of 7.5 steps, 0.03.
    assert (off.reshape(7, 4, 12) <= 0.53 * step).all()
    integers = np.asarray(unpack(packed)).reshape(7, 4, 12)
    assert (np.abs(integers).max(-1) >= 7).all()


def test_blocks_of_zeros_and_blocks_that_are_not_finite():
    rows = jnp.ones((4, 4)).at[0].set(0.0).at[1, 1].set(jnp.nan).at[2, 1].set(jnp.inf)
    packed, scale = jax.jit(lambda r: quantize_blocks(r, 2))(rows)
    scores = block_matmul(jnp.ones((1, 4)), packed[None], scale[None], 0)
    assert scores[0, 0] == 0.0
    assert np.isnan(scores[0, 1])
    assert not np.isfinite(scores[0, 2])
    assert scores[0, 3] == pytest.approx(4.0, rel=0.1)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_product_with_blocks(form, tokens):
    x, rows = normal(0, tokens, 24), normal(1, 3, 53, 24)
    packed, scale = quantize_blocks(rows, 6)
    got = jax.jit(block_matmul)(x, packed, scale, jnp.int32(2))
    want = np.asarray(rounded_blocks(x, 6)) @ np.asarray(dequantize_blocks(packed, scale)[2]).T
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    _, layers = jax.lax.scan(lambda c, i: (c, block_matmul(x, packed, scale, i)), 0, jnp.arange(3))
    np.testing.assert_allclose(layers[2], want, rtol=1e-5, atol=1e-4)


def test_no_widened_copy_of_all_rows():
    """On CPU a product reads what is stored; a copy in float32 would be eight times that."""
    n, d = 1 << 15, 64
    stored = jnp.ones((1, n, d // 2), jnp.int8), jnp.ones((1, n, 2), jnp.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow, "_CHUNK", 1 << 14)
        compiled = jax.jit(block_matmul).lower(jnp.ones((1, d)), *stored, 0).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * d


def test_rows_are_fetched_from_their_layer():
    rows = normal(0, 3, 10, 4)
    chosen = jnp.array([[9, 0], [3, 3]])
    np.testing.assert_array_equal(
        gather_rows(rows, 2, chosen), np.asarray(rows)[2][np.asarray(chosen)]
    )
