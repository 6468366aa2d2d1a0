"""Grids that are found from numbers alone, against the quantizers that made them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.smollm2 import weights
from hire_rewrite.ops.encodings import Blocks, Encoding, Float, Nested, narrowest
from tests.cases import optimized

L, N, DIM = 2, 24, 256
BFLOAT16 = jnp.dtype("bfloat16")


def normal(seed, *shape):
    """f32, numbers of sizes that differ from row to row."""
    rng = np.random.default_rng(seed)
    return np.float32(rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 0, (*shape[:-1], 1)))


@functools.partial(jax.jit, static_argnums=0)
def decode(encoding, stored, layer):
    return encoding.decode(stored, layer)


def found_in(rows):
    """The narrowest encoding, after its numbers were compared."""
    found = narrowest(rows)
    if found is None:
        return None
    encoding, stored = found
    assert isinstance(encoding, Encoding)
    encoding.check(*rows.shape[1:])
    assert all(array.shape[:1] == rows.shape[:1] for array in stored.values())
    size = encoding.bytes(*rows.shape[1:])
    assert sum(array.nbytes for array in stored.values()) == len(rows) * size
    assert len(rows) * size < rows.nbytes
    for layer in range(len(rows)):
        decoded = np.asarray(decode(encoding, jax.tree.map(jnp.asarray, stored), layer))
        assert decoded.dtype == np.float32
        assert (decoded == rows[layer].astype(np.float32)).all()
    return encoding


def gguf(kind, rows):
    kind = GGMLQuantizationType[kind]
    return dequantize(quants.quantize(rows, kind), kind)


def scaled(rows, block, bits, dtype="float32", ends=True):
    """Symmetric integers with a scale for each block: the grids of qwix, and of others."""
    blocks = rows.reshape(L, N, -1, block)
    highest = 2 ** (bits - 1) - 1
    scale = (np.abs(blocks).max(-1, keepdims=True) / (highest + 0.5 * (not ends))).astype(dtype)
    scale = scale.astype(np.float32)
    integers = np.clip(np.rint(blocks / scale), -highest - 1, highest)
    return (integers * scale).reshape(rows.shape)


def gptq(rows, block, dtype="float16", zero=None):
    """4 bits with a scale and a zero point for each block: scale · (integer − zero)."""
    blocks = rows.reshape(L, N, -1, block)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    scale = ((high - low) / 15).astype(dtype).astype(np.float32)
    zeros = np.rint(-low / scale) if zero is None else np.float32(zero)
    integers = np.clip(np.rint(blocks / scale) + zeros, 0, 15)
    return (scale * (integers - zeros)).reshape(rows.shape)


ROWS = normal(0, L, N, DIM)
FORMATS = {
    "Q4_0": (gguf("Q4_0", ROWS), Blocks(4)),
    "Q4_1": (gguf("Q4_1", ROWS), Blocks(4, minimum=True)),
    "Q8_0": (gguf("Q8_0", ROWS), Blocks(8)),
    "qwix, int8 rows": (scaled(ROWS, DIM, 8, ends=False), Blocks(8, None, scale="float32")),
    "qwix, int4 rows": (scaled(ROWS, DIM, 4, ends=False), Blocks(4, None, scale="float32")),
    "qwix, int4 tiles": (scaled(ROWS, 128, 4, ends=False), Blocks(4, 128, scale="float32")),
    "int8, small bfloat16 scales": (
        scaled(ROWS * np.float32(1e-6), 32, 8, "bfloat16"),
        Blocks(8, scale="bfloat16"),
    ),
    "int8 rows, float16 scales": (scaled(ROWS, DIM, 8, "float16"), Blocks(8, None)),
    "int4 tiles of 64": (scaled(ROWS, 64, 4, "bfloat16"), Blocks(4, 64)),
    "GPTQ": (gptq(ROWS, 128), Blocks(4, 128, minimum=True, scale="float32")),
    "GPTQ, bfloat16 scales": (gptq(ROWS, 64, "bfloat16"), Blocks(4, 64, minimum=True)),
    "GPTQ, symmetric": (gptq(ROWS, 128, zero=8), Blocks(4, 128)),
    "GPTQ, symmetric, float32": (gptq(ROWS, 32, "float32", 8), Blocks(4, scale="float32")),
    "GPTQ, zero points, float32": (gptq(ROWS, 64, "float32"), Blocks(8, 64, scale="float32")),
    "bfloat16": (ROWS.astype(BFLOAT16).astype(np.float32), Float("bfloat16")),
    "ternary": (np.float32(0.37) * np.sign(np.rint(ROWS)), Blocks(4, None, scale="float32")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_grids_of_formats(name):
    rows, want = FORMATS[name]
    assert found_in(rows) == want


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "GPTQ", "GPTQ, symmetric, float32"])
def test_programs_decode_the_same_numbers(name):
    """Optimized ones may round scale · integer + minimum once instead of twice."""
    rows, encoding = FORMATS[name]
    stored = jax.tree.map(jnp.asarray, encoding.store_exactly(rows))
    decode = optimized(lambda stored, layer: encoding.decode(stored, layer))
    for layer in range(L):
        np.testing.assert_array_equal(decode(stored, layer), rows[layer])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "GPTQ"])
def test_views_and_pieces(name):
    """Rows are most often a transposed view, of more numbers than are looked at together."""
    rows, want = FORMATS[name]
    many = np.tile(rows, (1, 20, 1)).swapaxes(1, 2).copy().swapaxes(1, 2)
    assert not many.flags.c_contiguous
    assert found_in(many) == want


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([4, 8]),
    st.sampled_from([None, 32, 64]),
    st.booleans(),
    st.sampled_from(["float16", "bfloat16", "float32"]),
    st.sampled_from(["ends", "inner", "sparse", "few"]),
)
def test_all_grids(seed, bits, block, minimum, scale, used):
    """Whatever part of a grid is in use, of either sign, what is found is as narrow."""
    rng = np.random.default_rng(seed)
    encoding = Blocks(bits, block, minimum, scale)
    shape = (1, 12, 128 // (block or 128))
    low = 0 if bits == 4 and minimum else -(2 ** (bits - 1))
    ends = np.sort(rng.integers(low, low + 2**bits, (2, *shape, 1)), axis=0)
    first, last = ends if used == "inner" else (low, low + 2**bits - 1)
    integers = rng.integers(first, last + 1, (*shape, block or 128)).astype(np.float32)
    if used in ("sparse", "few"):
        integers[rng.random(integers.shape) < (0.8 if used == "sparse" else 0.98)] = first
    short = "float16" if scale == "float32" and minimum else scale
    scales = rng.normal(size=shape) * 0.02
    scales = scales.astype(jnp.dtype(short)).astype(np.float32)[..., None]
    rows = integers * scales
    if minimum and scale == "float32":
        rows = rows - scales * rng.integers(0, 16, (*shape, 1)).astype(np.float32)
    elif minimum:
        minimums = rng.normal(size=(*shape, 1)) * 0.3
        rows = rows + minimums.astype(jnp.dtype(scale)).astype(np.float32)
    found = found_in(rows.reshape(1, 12, 128))
    assert found is not None
    assert found.bytes(12, 128) <= encoding.bytes(12, 128)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "GPTQ", "bfloat16", "qwix, int8 rows"])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 23, 255), (1, 12, 100)])
def test_one_number_off_the_grid(name, place):
    rows, encoding = FORMATS[name]
    for other in (np.nextafter(rows[place], np.float32(9)), np.nan, np.inf, -np.inf):
        changed = rows.copy()
        changed[place] = other
        assert encoding.store_exactly(rows) is not None
        assert encoding.store_exactly(changed) is None
        # A minimum more, and float32 scales, may hold the first; nothing is as narrow.
        found = found_in(changed)
        assert found is None or found.bytes(N, DIM) > encoding.bytes(N, DIM)
        assert found is None or np.isfinite(other)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_that_are_unlike_others(name):
    rows = ROWS.copy()
    rows[0, 0], rows[0, 1, :32], rows[0, 2, :64] = 0.0, 0.25, -1.5
    rows[0, 3, :32] = 0.0
    rows[0, 3, 5], rows[1, 4, 7] = 6e4, -6e4  # far from all others
    rows[1, 5] *= np.float32(1e-6)  # scales that float16 rounds much
    rows[1, 6, 32:] = 0.0
    rows = gguf(name, rows)
    rows[1, 6, 40] = -0.0
    assert found_in(rows) == FORMATS[name][1]


def test_numbers_that_platforms_take_for_zero():
    """Below 2⁻¹²⁶ a decoded number might be lost."""
    tiny = np.float32(2.0**-130)
    rows = np.float32(np.random.default_rng(0).integers(-8, 8, (L, N, DIM))) * tiny
    assert Blocks(4, scale="float32").store_exactly(rows) is None
    assert Blocks(4, scale="bfloat16").store_exactly(rows * np.float32(16)) is not None
    assert found_in(np.zeros((L, N, DIM), np.float32)) == Blocks(4, None)


def test_numbers_that_are_narrow_already():
    assert narrowest(ROWS.astype(BFLOAT16)) is None
    assert narrowest(ROWS.astype(np.float16)) is None
    integers = np.clip(np.rint(ROWS * 4), -8, 7)
    for dtype in (BFLOAT16, np.float16, np.float64):
        assert found_in((integers / 8).astype(dtype)) == Blocks(4, None)
    for dtype in ("float4_e2m1fn", "int4", "int8", "int32"):
        assert narrowest(integers.astype(jnp.dtype(dtype))) is None
    assert found_in(integers.astype(jnp.dtype("float8_e4m3fn"))) == Blocks(4, None)
    assert narrowest(np.float64(ROWS) + 1e-12) is None
    assert narrowest(np.zeros((2, 0, 8), np.float32)) is None
    assert narrowest(np.zeros((0, 8, 8), np.float32)) is None
    assert found_in(integers[..., :33]) == Blocks(8, None)


@pytest.mark.parametrize(
    "encoding", [Float("bfloat16"), Nested(), Blocks(4), Blocks(8, 64, minimum=True)], ids=str
)
def test_what_was_stored_is_stored_exactly(encoding):
    stored = jax.jit(jax.vmap(encoding.store))(jnp.asarray(ROWS))
    rows = np.stack([np.asarray(encoding.decode(stored, layer)) for layer in range(L)])
    again = encoding.store_exactly(rows)
    assert again is not None
    for name, array in again.items():
        assert (array.shape, array.dtype) == (stored[name].shape, stored[name].dtype)
    for layer in range(L):
        decoded = encoding.decode(jax.tree.map(jnp.asarray, again), layer)
        np.testing.assert_array_equal(decoded, rows[layer])
    assert encoding.store_exactly(ROWS) is None


@pytest.mark.parametrize(("block", "dtype"), [(32, "float16"), (None, "float32")])
def test_nested_rows_hold_every_grid_of_8_bits(block, dtype):
    """Q8_0's and one scale for each row, with blocks that use both ends."""
    rng = np.random.default_rng(0)
    integers = np.float32(rng.integers(-127, 128, (L, N, DIM // (block or DIM), block or DIM)))
    integers[..., 0], integers[..., 1] = 127, -127
    integers[0, 0, 0, 2] = -128
    scale = np.float32(rng.uniform(1e-3, 1e-2, integers.shape[:3]).astype(dtype))
    rows = (integers * scale[..., None]).reshape(L, N, DIM)
    stored = Nested(block, dtype).store_exactly(rows)
    stored = jax.tree.map(jnp.asarray, stored)
    for layer in range(L):
        np.testing.assert_array_equal(Nested(block, dtype).decode(stored, layer), rows[layer])
    rows[1, 2, 3] *= 1.001
    assert Nested(block, dtype).store_exactly(rows) is None


def test_other_numbers_are_refused_by_a_few_of_them():
    """These rows would be 40 terabytes."""
    rows = np.broadcast_to(np.float32(ROWS[:1, :1]), (100, 10**8, DIM))
    for dtype in (np.float32, BFLOAT16):
        assert narrowest(np.broadcast_to(rows[0, 0].astype(dtype), rows.shape)) is None


def test_weights_of_a_real_model():
    """SmolLM2's file: Q4_1 in all layers, the query and key rows permuted, and Q8_0."""
    tensors = {tensor.name: tensor for tensor in weights.read().tensors}
    for ours, theirs in weights._MATRICES.items():
        tensor = tensors[f"blk.7.{theirs}.weight"]
        rows = dequantize(tensor.data, tensor.tensor_type)[None]
        if ours in ("wq", "wk"):
            rows = weights._contiguous_halves(rows, 64)
        assert found_in(rows) == Blocks(4, 32, minimum=True, scale="float16")
    tensor = tensors["token_embd.weight"]
    rows = dequantize(tensor.data[:5000], tensor.tensor_type)[None]
    assert found_in(rows) == Blocks(8, 32, scale="float16")
