"""Programs of the real TPU compiler: that the kernels compile, and what is read from HBM."""

import math

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu")

from benchmarks import tpu_account, tpu_models, tpu_relu
from benchmarks.hbm import traffic
from hire_rewrite.ops.kernels.tpu import blocks, picked, rows, scores

CHIPS, RULES = list(tpu_account.CHIPS), list(tpu_models.RULES.values())


def packed(x, steps, integers, scale, layer):
    return blocks.block_product(x, steps, integers, scale, None, layer, bits=4)


def minimal(x, integers, scale, minimum, layer):
    return blocks.block_product(x, None, integers, scale, minimum, layer, bits=8)


def kernels(shape, tokens):
    """Kernels at sizes of the 1 B model, their arguments, and the most that they may read."""
    integers, single = shape(16, 16_384, 1024, dtype=jnp.int8), shape(32_000, 1, 1024)
    x, layer = shape(tokens, 2048), shape(dtype=jnp.int32)
    wide = shape(tokens, 2048, dtype=jnp.float32)
    yield scores.matmul, (wide, shape(16, 16_384, 2048, dtype=jnp.int8), layer), 16_384 * 2048
    yield scores.matmul, (wide, shape(16, 1000, 2048), layer), 1000 * 2048 * 2
    rounded = (shape(tokens, 2048, dtype=jnp.int8), shape(tokens, 64, dtype=jnp.float32))
    stored = (integers, shape(16, 16_384, 64), layer)
    yield packed, (*rounded, *stored), 16_384 * (1024 + 64 * 2)
    whole, numbers = shape(4, 2048, 8192, dtype=jnp.int8), shape(4, 2048, 64)
    yield minimal, (shape(tokens, 8192), whole, numbers, numbers, layer), 2048 * (8192 + 2 * 64 * 2)
    if tokens == 1:
        rounded = (shape(1, 4096, dtype=jnp.int8), shape(1, 128, dtype=jnp.float32))
        stored = (shape(4, 16_384, 2048, dtype=jnp.int8), shape(4, 16_384, 128), layer)
        yield packed, (*rounded, *stored), 16_384 * (2048 + 128 * 2)
    for members in (8, 16, 64):
        groups, most = shape(1 << 18 // members, members, 2048), 104 * members * 2048 * 2
        chosen = shape(1, 103, dtype=jnp.int32)
        yield rows.gathered_matmul, (x, groups, chosen), most
        h = shape(tokens, 103, members)
        yield rows.gathered_sum, (h, groups, shape(103, dtype=jnp.int32)), most
    lists, ends = shape(tokens, 1024, dtype=jnp.int32), shape(tokens, dtype=jnp.int32)
    for kind, width in ((jnp.float32, 4096), (jnp.uint32, 2048)):
        every, most = shape(16 * 8192, width, dtype=kind), tokens * 1024 * width * 4
        yield picked.picked_products, (shape(tokens, 4096), every, lists, ends), most
        yield picked.picked_sum, (shape(tokens, 1024), every, lists, ends), most
    own = shape(tokens, 256, dtype=jnp.int32)
    yield rows.gathered_matmul, (shape(tokens, 1024), single, own), tokens * 256 * 8 * 1024 * 2


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("tokens", [1, 8])
def test_kernels_compile_and_copy_no_weight(chip, tokens):
    for function, args, most in kernels(tpu_account.shapes_for(chip), tokens):
        compiled = tpu_account.program(function, *args)
        assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * most
        if chip == "v5p":  # libtpu does not give the text of all of them back
            continue
        found = tpu_account.account(compiled, *args)
        results = jax.eval_shape(function, *args).size * 4
        small = sum(leaf.size * leaf.dtype.itemsize for leaf in args if leaf.size < 1 << 20)
        assert found.kernels == 1
        assert most * 0.98 < found.total < most + 140 * small + 3 * results  # x once for each block


def whole(args):
    """Bytes of all arguments, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(args)
    return {
        jax.tree_util.keystr(path): math.prod(leaf.shape) * leaf.dtype.itemsize
        for path, leaf in leaves
    }


def test_a_decode_step_reads_a_quarter():
    shape = tpu_account.shapes_for("v5e")
    function, args = tpu_models.decode(shape, 1)
    dense = tpu_account.account(tpu_account.program(function, *args), *args)
    sizes = whole(args)
    for path, size in sizes.items():
        if size > 1 << 20:  # the account of what is known: every weight once
            assert size <= dense.reads[path] < 1.01 * size
    run, *given = tpu_account.rewritten(function, args, shape, RULES[0])
    compiled = tpu_account.program(run, *given)
    found = tpu_account.account(compiled, *given)
    assert found.kernels == 4
    assert found.scratch < 1 << 20
    assert found.total <= 0.25 * dense.total
    sizes = whole(given)
    for name in (".up", ".down", ".rows"):
        (path,) = (path for path in sizes if path.endswith(name))
        assert 0 < found.reads[path] < 0.11 * sizes[path]
    assert not any(one.branch for one in traffic(compiled.as_text()))


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("LowRank(rank=128), attention in 4 bits", 0.15),
        ("8 bits, exact parts", 0.55),
        ("4 bits, exact parts", 0.35),
    ],
)
def test_every_weight_of_a_decode_step_is_read_narrow(name, most):
    shape = tpu_account.shapes_for("v5e")
    function, args = tpu_models.decode(shape, 1)
    run, *given = tpu_account.rewritten(function, args, shape, tpu_models.RULES[name])
    compiled = tpu_account.program(run, *given)
    found = tpu_account.account(compiled, *given)
    assert found.total <= most * sum(whole(args).values())
    assert found.scratch < 4 << 20


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("form", tpu_relu.FORMS, ids=lambda form: form.name)
def test_a_block_without_its_zeros_reads_the_rows_that_are_listed(form, tokens):
    shape, d, share = tpu_account.shapes_for("v5e"), 2048, 0.1
    found = tpu_relu.counted(shape, form, d, share, tokens)["kernels"]
    assert found.scratch < 1 << 20
    matrix = d * 4 * d * 2
    assert 2 * matrix <= found.dense < 2.01 * matrix
    # The first matrix in bfloat16 or in 8 bits, and of each token so many rows.
    first, fetched = (matrix, 1) if form.predictor is None else (matrix / 2, 2)
    want = first + form.read[d, share] * fetched * tokens * matrix
    assert want < found.expected < 1.06 * want
    # Where less is saved than the machine's margin, a plan leaves the block dense.
    if found.expected * 1.2 >= found.dense:
        assert not tpu_relu.pays(shape, form, d, share, tokens)


def test_a_weight_that_fits_into_vmem_is_not_brought_there():
    shape = tpu_account.shapes_for("v5e")
    for build, name in ((tpu_models.block, ".up"), (tpu_models.head, ".rows")):
        function, args = build(shape, 1)
        parts = {}
        for side in tpu_account.SIDES:
            run, *given = tpu_account.rewritten(function, args, shape, RULES[0])
            found = tpu_account.account(tpu_account.program(run, *given, side=side), *given)
            (path,) = (path for path in whole(given) if path.endswith(name))
            parts[side] = found.reads[path] / whole(given)[path]
        assert parts["JAX"] >= 1
        assert parts["kernels"] < 0.3


def test_a_decode_step_compiles_for_the_other_chip():
    shape = tpu_account.shapes_for("v5p")
    function, args = tpu_models.decode(shape, 1)
    run, *given = tpu_account.rewritten(function, args, shape, RULES[1])
    compiled = tpu_account.program(run, *given)
    # Less than a layer's packed rows, the smallest weight that a kernel reads.
    assert compiled.memory_analysis().temp_size_in_bytes < 16_384 * 1024
