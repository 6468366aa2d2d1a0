"""The kernels for CPU against the same in JAX. (`check.cc` has more sizes of each.)"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from hire_rewrite.ops import gather, kernels, narrow, quantize
from hire_rewrite.ops.top_k.select import top_k

needed = pytest.mark.skipif(
    kernels.cpu.status() != "in use", reason=f"kernels for CPU are {kernels.cpu.status()}"
)


def normal(*shape, dtype=np.float32, seed=0):
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def close(got, want, d):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6 * d)


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif("HIRE_REWRITE_KERNELS" in os.environ, reason="another form is asked for")
def test_they_are_built_where_they_can_be():
    assert kernels.cpu.status() == "in use"
    x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    head = jax.ShapeDtypeStruct((64, 8192), jnp.float32)
    plan = hire.inspect(lambda head, x: x @ head, head, x)
    assert str(plan).endswith("kernels for CPU: in use")


@needed
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("n", "d"), [(5, 7), (1000, 129)])
def test_product(dtype, tokens, n, d):
    rows, x = (normal(3, n, d) * 20).astype(dtype), normal(tokens, d, seed=1)
    for layer in (0, 2):
        got = jax.jit(narrow.matmul)(x, rows, jnp.int32(layer))
        want = np.asarray(x, np.float64) @ np.asarray(rows[layer], np.float64).T
        close(got, want, 20 * d)


@needed
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("n", "d", "block"), [(100, 512, 64), (333, 576, 32)])
def test_block_product(tokens, n, d, block):
    packed, scale = jax.jit(lambda rows: quantize.quantize_blocks(rows, block))(normal(2, n, d))
    x = normal(tokens, d, seed=1)
    got = jax.jit(narrow.block_matmul)(x, packed, scale, jnp.int32(1))

    @jax.jit
    def wide(x, packed, scale):
        return quantize.rounded_blocks(x, block), quantize.dequantize_blocks(packed, scale)

    x, rows = (np.asarray(a, np.float64) for a in wide(x, packed[1], scale[1]))
    close(got, x @ rows.T, d)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("block", [8, 32, 64])
def test_tokens_are_rounded_to_8_bits_in_blocks(block):
    x = normal(3, 128).at[1, :block].set(0).at[2, 0].set(jnp.nan).at[2, block].set(jnp.inf)
    got = quantize.rounded_blocks(x, block)
    step = jnp.abs(x).reshape(3, -1, block).max(-1).repeat(block, axis=1) / 127
    assert (jnp.abs(got - x) <= 0.5001 * step)[:2].all()
    np.testing.assert_array_equal(got[1, :block], 0)
    assert np.isnan(got[2, : 2 * block]).any()
    slope = jax.grad(lambda x: (quantize.rounded_blocks(x, block) * x[0]).sum())(x[:1])
    np.testing.assert_allclose(slope, x[:1] + quantize.rounded_blocks(x[:1], block), rtol=1e-5)


def test_blocks_that_do_not_divide_the_halves_are_left_to_jax():
    packed, scale = quantize.quantize_blocks(normal(1, 10, 96), 32)
    x = normal(2, 96, seed=1)
    want = quantize.rounded_blocks(x, 32) @ quantize.dequantize_blocks(packed[0], scale[0]).T
    close(narrow.block_matmul(x, packed, scale, 0), want, 96)


@needed
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "lists"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize(("count", "members", "d"), [(7, 3, 33), (50, 16, 64)])
def test_fetched_product(dtype, tokens, lists, count, members, d):
    rows, x = normal(60, members, d, dtype=dtype), normal(tokens, d, seed=1)
    index = jnp.asarray(np.random.default_rng(2).integers(0, 60, (lists, count)), jnp.int32)
    chosen = index if lists == tokens else index[0]
    got = GATHERED(x, rows[None], jnp.int32(0), chosen)
    each = jnp.broadcast_to(index, (tokens, count))
    want = jnp.einsum("td,tcmd->tcm", x, rows[each].astype(jnp.float32), precision="highest")
    close(got, want.reshape(tokens, -1), d)


@needed
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("count", "members", "d"), [(7, 3, 33), (50, 8, 256)])
def test_fetched_sum(dtype, tokens, count, members, d):
    rows, h = normal(60, members, d, dtype=dtype), normal(tokens, count, members, seed=1)
    index = jnp.asarray(np.random.default_rng(2).integers(0, 60, count), jnp.int32)
    got = SUMMED(h, rows[None], jnp.int32(0), index)
    want = jnp.einsum("tcm,cmd->td", h, rows[index].astype(jnp.float32), precision="highest")
    close(got, want, 4 * count * members)


SETTINGS = {"out_dtype": jnp.float32, "precision": None}
GATHERED = jax.jit(functools.partial(gather.gathered_matmul, compute_dtype=jnp.float32, **SETTINGS))
SUMMED = jax.jit(functools.partial(gather.gathered_sum, **SETTINGS))
SPECIAL = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1.0, 1.0], "f")


@needed
@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_of_special_values(k):
    rng = np.random.default_rng(0)
    scores = jnp.asarray(np.stack([rng.permutation(SPECIAL) for _ in range(20)]).reshape(4, 5, 10))
    got, want = jax.jit(functools.partial(top_k, k=k))(scores), lax.top_k(scores, k)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.int32), np.asarray(other).view("i4"))


@needed
@pytest.mark.parametrize("n", [1, 100, 8192, 50_000])
def test_top_k(n):
    scores = normal(3, n)
    ordered, sampled = jnp.sort(scores), scores.at[:, 32::64].add(100)
    others = (sampled, jnp.round(scores), jnp.ones((3, n)))
    for values in (scores, ordered, ordered[:, ::-1], *others):
        for k in {1, min(n, 64), n}:
            got, want = top_k(values, k), lax.top_k(values, k)
            jax.tree.map(np.testing.assert_array_equal, got, tuple(want))


@needed
def test_derivatives_and_batching_are_the_references():
    rows, x = normal(2, 50, 24), normal(3, 24, seed=1)
    layer = jnp.int32(1)

    def total(x, rows):
        return (narrow.matmul(x, rows, layer) ** 2).sum()

    def plain(x, rows):
        return (lax.dot(x, rows[1].T, precision="highest") ** 2).sum()

    got, want = jax.grad(total, (0, 1))(x, rows), jax.grad(plain, (0, 1))(x, rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), got, want)
    layers = jnp.arange(2)
    each = jax.vmap(lambda layer: narrow.matmul(x, rows, layer))(layers)
    close(each, jnp.einsum("td,lnd->ltn", x, rows, precision="highest"), 24)
    batched = jax.vmap(lambda s: top_k(s, 3)[1])(normal(5, 2, 30))
    np.testing.assert_array_equal(batched, lax.top_k(normal(5, 2, 30), 3)[1])


@needed
def test_exported_programs_call_no_kernel():
    weight, x = normal(64, 8192), normal(2, 64, seed=1)
    step = hire.transform(lambda w, x: x @ w, hire.Head(k=8, force=True))
    leaves, tree = jax.tree.flatten(step.pack(weight, x))

    def run(leaves, x):
        return step(jax.tree.unflatten(tree, leaves), x)

    batched = jax.vmap(run, in_axes=(None, 0))
    for one, inputs in ((run, x), (batched, jnp.stack([x, 2 * x]))):
        function = jax.jit(one)
        assert "hire_product" in function.lower(leaves, inputs).as_text()
        exported = jax.export.export(function, platforms=("cpu", "tpu"))(leaves, inputs)
        assert "hire_product" not in exported.mlir_module()
        again = jax.export.deserialize(exported.serialize())
        np.testing.assert_allclose(
            again.call(leaves, inputs), function(leaves, inputs), rtol=1e-4, atol=1e-4
        )


def test_values_that_are_no_numbers():
    rows = normal(1, 8, 16).at[0, 2, 3].set(jnp.nan).at[0, 5, 0].set(jnp.inf)
    got = np.asarray(narrow.matmul(jnp.ones((1, 16)), rows, 0))[0]
    assert np.isnan(got[2])
    assert np.isinf(got[5])
    assert np.isfinite(np.delete(got, [2, 5])).all()
    h = jnp.ones((1, 2, 1))
    stacked = normal(1, 4, 1, 16).at[0, 1].set(jnp.nan)
    assert np.isnan(gather.gather_rows(stacked, 0, jnp.array([1]))).all()
    assert np.isnan(SUMMED(h, stacked, jnp.int32(0), jnp.array([0, 1], jnp.int32))).all()


@pytest.mark.long
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer, tmp_path):
    compiler, folder = shutil.which("c++"), Path(kernels.cpu.__file__).parent
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program, flags = tmp_path / "check", [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    flags += ["-std=c++17", "-O0", "-Wno-psabi", "-pthread", f"-I{folder}", "-o", str(program)]
    sources = [Path(__file__).with_name("check.cc"), *folder.glob("rows_*.cc")]
    (tmp_path / "empty.cc").write_text("int main() {}")
    if subprocess.run([compiler, *flags, str(tmp_path / "empty.cc")], check=False).returncode:
        pytest.skip(f"the compiler has no library for -fsanitize={sanitizer}")
    subprocess.run([compiler, *flags, *map(str, sources)], check=True)
    parts = ["threads"] if sanitizer == "thread" else []
    done = subprocess.run([str(program), *parts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("form", "some"),
    [
        ("0", "values"),
        *(
            pytest.param(form, "product and (test_cpu or 576)", marks=pytest.mark.long)
            for form in ("portable", "avx2")
        ),
    ],
)
def test_other_forms(form, some):
    """Without the kernels, and with those for other processors, products are the same. (More
    sizes of each form: check.cc, and `make fuzz-kernels`.)"""
    environment = os.environ | {"HIRE_REWRITE_KERNELS": form, "JAX_PLATFORMS": "cpu"}
    if "HIRE_REWRITE_KERNELS" in os.environ:
        pytest.skip("this is one of the other forms")
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        some,
        __file__,
        str(Path(__file__).with_name("test_blocks.py")),
    ]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
