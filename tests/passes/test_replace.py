"""A rewritten function computes what the original does, however its sites are written."""

import jax
import pytest

import hire_rewrite as hire
from tests.zoo import FEW, FULL, close, packed
from tests.zoo_ffn import FFN_CASES
from tests.zoo_head import HEAD_CASES


def tolerance(case):
    return 2e-2 if "bf16" in str(jax.make_jaxpr(case.fn)(case.params, *case.args)) else 1e-4


@pytest.mark.parametrize("case", FFN_CASES + HEAD_CASES, ids=str)
def test_full_budget(case):
    step = hire.transform(case.fn, *FULL)
    weights = packed(step, case.params, *case.args)
    assert [site.status for site in step.plan(weights, *case.args).sites] == ["rewritten"]
    close(step(weights, *case.args), case.fn(case.params, *case.args), tolerance(case))


@pytest.mark.parametrize("case", FFN_CASES + HEAD_CASES, ids=str)
def test_few_candidates(case):
    """The predicted and gathered top k is the exact one."""
    step = hire.transform(case.fn, *FEW)
    weights = packed(step, case.params, *case.args)
    exact = hire.transform(case.fn, *FEW, mode="exact")
    close(step(weights, *case.args), exact(case.params, *case.args), tolerance(case))
