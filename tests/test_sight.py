"""Raw weights where a `Packed` belongs, in calls of several kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite import Float, Linear
from tests.cases import close, inputs, rand

D = 64
COPY = Linear(encoding=Float("float32"), force=True)
X, IMAGE = inputs(2, D), inputs(3, D)[2:]

pytestmark = pytest.mark.filterwarnings("ignore:.*raw weights are packed")


def rounded(weight):
    """Numbers that are stored without loss in half the bytes."""
    return weight.astype(jnp.bfloat16).astype(jnp.float32)


def seeing(params, x, image=None):
    if image is not None:
        x = x + image @ params["vision"]
    return x @ params["head"]


def arrays(step):
    return {id(leaf) for packed in step._sight._seen[1] for leaf in jax.tree.leaves(packed)}


@pytest.mark.parametrize("order", [(False, True, False), (True, False, True)])
@pytest.mark.parametrize("path", ["head", "."])
def test_a_call_that_reads_another_weight(order, path):
    """Dense, or in a site of its own; nothing is packed twice."""
    params = {"vision": rand(D, D), "head": rand(D, 3 * D, seed=1)}
    step = hire.transform(seeing, Linear(encoding=Float("float32"), force=True, path=path))
    for sees in order:
        rest = (X, IMAGE) if sees else (X,)
        close(step(params, *rest), seeing(params, *rest), 1e-4)
    assert len(arrays(step)) == 2
    want = {"head"} if path == "head" else {"head", "vision"}
    assert {site.split("/")[-1] for p in step._sight._seen[1] for site in p.sites} == want


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("rules", [(), (Linear(force=True),)])
def test_a_call_that_has_another_site_to_look_at(rules, closed):
    params = {"vision": rounded(rand(512, 512)), "head": rounded(rand(512, 640, seed=1))}
    x, image = inputs(1, 512), inputs(2, 512)[1:]
    fn = (lambda *rest: seeing(params, *rest)) if closed else seeing
    step = hire.transform(fn, *rules, weights=() if closed else 0)
    given = () if closed else (params,)
    for _ in range(2):
        for rest in ((x,), (x, image)):
            close(step(*given, *rest), seeing(params, *rest), 1e-4)
            leaves = () if closed else tuple(jax.tree.leaves(params))
            packed = step._sight.pack(leaves, (*given, *rest), {})
            plan = step.plan(packed, *rest) if given else None
            assert len(packed.sites) == len(rest)
            assert plan is None or len(plan.rewritten) == len(rest)


def test_a_call_whose_rule_asks_for_another_layout_of_the_same_weight():
    def phases(params, x):
        with jax.named_scope("decode" if len(x) == 1 else "prefill"):
            return x @ params["head"]

    params = {"head": rounded(rand(D, 3 * D))}
    decode = Linear(encoding=Float("float32"), force=True, path="decode:")
    prefill = Linear(encoding=Float("bfloat16"), force=True, path="prefill:")
    for first in (1, 2):
        step = hire.transform(phases, decode, prefill, on_miss="ignore")
        for count in (first, 3 - first, first, 3 - first):
            close(step(params, X[:count]), phases(params, X[:count]), 1e-4)
        kinds = {leaf.dtype for p in step._sight._seen[1] for leaf in jax.tree.leaves(p.sites)}
        assert len(step._sight._seen[1]) == len(kinds) == 2


def test_asking_what_serves_a_call_leaves_nothing_behind():
    """An analysis for each kind of call and for the Packed that serves it, and none besides."""
    params = {"vision": rand(D, D), "head": rand(D, 3 * D, seed=1)}
    step = hire.transform(seeing, Linear(encoding=Float("float32"), force=True, path="head"))
    for rest in ((X,), (X, IMAGE)):
        step(params, *rest)
    assert len(step._sight._seen[1]) == 2
    assert len(step._analyses._known) == 4


def test_what_is_kept_by_hand_serves_every_call():
    params = {"vision": rand(D, D), "head": rand(D, 3 * D, seed=1)}
    step = hire.transform(lambda *rest: seeing(params, *rest), COPY, weights=())
    packed = step.pack(X)
    close(step(X, IMAGE), seeing(params, X, IMAGE), 1e-4)
    assert step._sight.pack((), (X, IMAGE), {}) is packed


def test_other_weights_are_packed_anew():
    step = hire.transform(seeing, COPY)
    for seed in range(2):
        params = {"vision": rand(D, D, seed=seed), "head": rand(D, 3 * D, seed=2 + seed)}
        for rest in ((X,), (X, IMAGE)):
            np.testing.assert_allclose(step(params, *rest), seeing(params, *rest), rtol=1e-3)
