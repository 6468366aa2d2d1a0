"""Operations under the settings that a program may have JAX run with."""

import re

import jax
import pytest

from hire_rewrite.errors import HireRewriteError
from tests.cases import close, run
from tests.ops.cases import normal
from tests.ops.every import EVERY, SCORES, D

PLATFORMS = ("cpu", "tpu")
X = normal(7, 3, D)


def lowered(name, platform):
    fn = EVERY[name]()
    traced = jax.jit(lambda x: fn(x)).trace(X)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_promoted_by_itself(name):
    EVERY[name]()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for platform in PLATFORMS:
            lowered(name, platform)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_wider_with_x64(name):
    fn = EVERY[name]()
    want = jax.eval_shape(fn, X)
    with jax.enable_x64(True):
        got = jax.eval_shape(fn, X)
        for platform in PLATFORMS:  # scalars of Python are float64 for a moment
            assert "xf64" not in lowered(name, platform)
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, want)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["greatest", "block, common groups", "head, certified"])
def test_results_are_the_same_with_x64(name):
    fn = EVERY[name]()
    want = run(fn, X)
    with jax.enable_x64(True):
        close(run(lambda x: fn(x), X), want)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("precision", ["highest", "BF16_BF16_F32"])
def test_what_is_guessed_does_not_depend_on_the_precision_that_is_set(name, precision):
    def products():
        jax.clear_caches()  # a kernel for TPU holds where it was traced first, by whichever test
        lines = re.findall(r"dot_general .*|@tpu_custom_call.*", lowered(name, "tpu"))
        return sorted(re.sub(r"[%@][\w#]+", "", line) for line in lines)

    want = products()
    with jax.default_matmul_precision(precision):
        assert products() == want


def test_exact_products_have_the_precision_that_is_set_where_they_are_called():
    fn = EVERY["gathered float32"]()
    assert "HIGHEST" not in lowered("gathered float32", "cuda")
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(lambda x: fn(x)).trace(X)
    assert "HIGHEST" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_no_proof_where_the_rounding_of_products_is_not_known():
    fn = EVERY["head, certified"]()
    for precision in ("bfloat16", "highest"):
        with jax.default_matmul_precision(precision):
            jax.eval_shape(fn, X)
    with (
        jax.default_matmul_precision("BF16_BF16_F32"),
        pytest.raises(HireRewriteError, match="precision=BF16_BF16_F32 is not known"),
    ):
        jax.eval_shape(fn, X)
