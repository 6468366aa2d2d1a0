"""Weights that are stored in few bits, and cast where the model casts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite.ops import gather, narrow, quantize
from hire_rewrite.ops.ffn.ffn import exact_ffn, hire_ffn
from hire_rewrite.ops.head.head import hire_head
from hire_rewrite.ops.predictors import LowRank, Quantized
from hire_rewrite.ops.top_k.keys import has_keys
from hire_rewrite.ops.top_k.select import top_k
from tests.cases import run
from tests.ops.cases import ffn, head, normal

F32 = jnp.dtype("float32")
FLOATS = [name for name in dir(jnp) if name.startswith(("float8_", "float4_"))]
SIGNED = [name for name in FLOATS if name != "float8_e8m0fnu"]
INTEGERS = ["int4", "int8"]


def relu(pre, vectors):
    return jax.nn.relu(pre[0]) * pre[1]


def every(x, rows):
    """What reads rows: [L, 40, 64], for x: f32[3, 64]."""
    lists = jnp.array([[1, 2], [3, 4], [1, 1]], jnp.int32)
    settings = {"out_dtype": F32, "precision": None}
    groups = rows.reshape(2, 10, 4, 64)
    fits = [p.fit(rows[1]) for p in (Quantized(), Quantized(4), LowRank(8))]
    return (
        gather.gather_rows(rows, 1, lists).astype(F32),
        narrow.matmul(x, rows, 1),
        gather.gathered_matmul(x, rows, 1, lists, compute_dtype=F32, **settings),
        gather.gathered_matmul(x, rows, 1, lists[0], compute_dtype=F32, **settings),
        gather.gathered_sum(x[:, :8].reshape(3, 2, 4), groups, 1, lists[0], **settings),
        [(fit.get("rows"), fit["scale"]) for fit in fits],
        quantize.dequantize_blocks(*quantize.quantize_blocks(rows[1], 32)),
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [*SIGNED, *INTEGERS])
def test_rows_are_read_as_if_they_were_wide(dtype):
    rows, x = (normal(0, 2, 40, 64) * 2).astype(dtype), normal(1, 3, 64)
    got, want = run(every, x, rows), run(every, x, rows.astype(F32))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=1e-5, atol=1e-4)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", [*SIGNED, *INTEGERS])
@pytest.mark.parametrize("tokens", [1, 3])
def test_blocks_and_heads(dtype, tokens):
    x, predictor = normal(1, tokens, 64), Quantized()
    spec, state, _ = ffn(predictor, d=64)
    logits, rows = head(predictor, d=64)
    narrow = (
        (state.up * 20).astype(dtype),
        (state.down * 20).astype(dtype),
        (2 * rows.rows).astype(dtype),
    )

    def fn(x, up, down, weight):
        block, given = state._replace(up=up, down=down), {"spec": spec, "activation": relu}
        return (
            hire_ffn(x, block, 0, predictor=predictor, **given),
            exact_ffn(x, block, 0, **given),
            hire_head(x, rows._replace(rows=weight), 0, spec=logits, endpoints=lambda z: (z,),
                      predictor=predictor),
        )  # fmt: skip

    got = run(fn, x, *narrow)
    want = run(fn, x, *(array.astype(F32) for array in narrow))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [name for name in FLOATS if "8" in name])
def test_top_k_of_all_numbers_there_are(dtype):
    bits = jnp.asarray(np.random.default_rng(0).permutation(256), jnp.uint8)
    scores = jax.lax.bitcast_convert_type(bits, dtype)
    got, want = jax.jit(lambda x: top_k(x, 256))(scores), jax.lax.top_k(scores, 256)
    for one, other in zip(got, want, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    if has_keys(dtype):
        # XLA may lose the sign of NaN in 8 bits, and with it the end at which it stands.
        got = (np.float32(v) for v in (hire.da_top_k(scores, 256, axis_name=())[0], want[0]))
        np.testing.assert_array_equal(*(values[~np.isnan(values)] for values in got))


@pytest.mark.parametrize("dtype", ["float4_e2m1fn", "int4", "float8_e8m0fnu", "float8_e5m2fnuz"])
def test_numbers_that_cannot_be_sent_in_order(dtype):
    with pytest.raises(hire.HireRewriteError, match=f"x is {dtype}"):
        hire.da_top_k(jnp.zeros(8, dtype), 2, axis_name=())
