"""A sample of the grid of `values.py`: every kind on usual numbers, and what once went wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from tests.faults.kinds import KINDS, D
from tests.faults.values import Count, of_dtype, of_setting, of_shape, of_values, params_of

SAMPLE = (
    "head", "head, certified", "ffn, its own top k", "gated ffn, positive, proved",
    "linear, 8 bits", "ffn, predicted, 4 bits",
)  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", SAMPLE)
def test_odd_tokens(name):
    count = Count()
    of_values(KINDS[name], count, "normal")
    assert not count.wrong
    assert count.tried > 30
    assert not count.refused


@pytest.mark.parametrize("weights", ["zeros", "tiny", "denormals"])
def test_odd_weights(weights):
    count = Count()
    of_values(KINDS["ffn, its own top k"], count, weights, "up")
    assert not count.wrong


@pytest.mark.sampled(2)
@pytest.mark.parametrize("weights", ["ties", "one row zero"])
def test_candidates_of_numbers_of_any_size(weights):
    """The order of guesses below a threshold does not get lost where they are tiny or huge."""
    count = Count()
    of_values(KINDS["no rules: top k"], count, weights, "up")
    assert not count.wrong


def test_sizes_dtypes_and_settings():
    count = Count()
    of_shape(KINDS["head, all"], count, "1 neuron, 1 row", 1)
    of_shape(KINDS["linear, float32"], count, "nothing", 0)
    of_dtype(KINDS["linear, bfloat16"], count, "int4")
    of_dtype(KINDS["linear, float32"], count, "float64")
    of_setting(KINDS["linear, 8 bits"], count, "debug_nans")
    assert not count.wrong


def test_a_low_rank_guess_of_huge_weights():
    count = Count()
    of_values(KINDS["head, low rank"], count, "huge outlier")
    assert not count.wrong
    assert not count.refused


@pytest.mark.parametrize("name", ["linear, 4 bits", "ffn, predicted, 4 bits"])
def test_weights_too_large_for_how_they_are_stored_are_refused(name):
    kind, x = KINDS[name], jnp.ones((1, D))
    params = params_of(kind, "outlier")
    assert all(np.isfinite(array).all() for array in params.values())
    step = hire.transform(kind.fn, *kind.rules)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(40, D)), jnp.float32)
    with pytest.raises(hire.HireRewriteError, match="numbers too large"):
        step.pack(params, x, calibration=[(tokens,)])
