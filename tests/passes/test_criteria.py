"""What ranks neurons is the same on packed and on raw weights, however a block is written."""

import jax
import numpy as np
import pytest

import hire_rewrite as hire
from tests.cases import FEW, close, inputs, packed, run
from tests.cases_ffn import FFN_CASES, D, T

RULE, HEAD = FEW
NAMED = {case.name: case for case in FFN_CASES}
SOME = [
    "gated relu",
    "gated with biases",
    "gated silu",
    "fused by slices, gate second",
    "fused over two axes in a scan",
    "fused, interleaved",
    "gated experts",
    "joined with another input",
    "scales in a gated block",
    "down to two axes",
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", SOME)
def test_packed_equals_raw(name):
    case = NAMED[name]
    rule = RULE.replace(criterion="output")
    step = hire.transform(case.fn, rule, HEAD)
    (site,) = step.plan(case.params, *case.args).sites
    if name == "gated experts":
        assert site.status == "dense"
        assert "experts" in site.reason
        return
    weights = packed(step, case.params, *case.args)
    assert site.status == "rewritten"
    exact = hire.transform(case.fn, rule, HEAD, mode="exact")
    want = run(exact, case.params, *case.args)
    close(run(step, weights, *case.args), want)
    close(run(exact, weights, *case.args), want)


def test_the_choice_is_by_the_norm_of_the_second_row():
    """Of two neurons that are equally active the one that matters is kept."""
    up = np.zeros((D, 64), np.float32)
    up[:, [5, 40]] = 1.0
    down = np.array(inputs(64, D, seed=3))
    down[40] *= 100.0
    params = {"up": up, "down": down}

    def block(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["down"]

    x = abs(inputs(T, D))
    for criterion, kept in (("hidden", 5), ("output", 40)):
        rule = RULE.replace(k=1, candidates=4, group=1, criterion=criterion)
        step = hire.transform(block, rule)
        got = step(packed(step, params, x), x)
        want = np.asarray(x).sum(1, keepdims=True) * down[kept]
        np.testing.assert_allclose(got, want, rtol=1e-4)
