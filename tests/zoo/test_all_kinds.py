"""Every model of the zoo with all three kinds of sites: nothing changes where nothing is lost.

Copies of all weights in float32 are what every run looks at; `make zoo` does the rest.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from hire_rewrite import Blocks, Float
from tests.cases import FULL, close, packed, run
from tests.zoo.catalog import MODELS
from tests.zoo.model import Built, Model
from tests.zoo.test_zoo import floats, mostly_long

ROUNDED = Blocks(8, None, scale="float32")


def rules(k: float, encoding: Any, **linear: Any) -> tuple[hire.Rule, ...]:
    """FFNs and linear layers from an encoding, `k` of the neurons and inputs exactly."""
    ffn = hire.FFN(k=k, tail="predicted", encoding=encoding, max_tokens=None, force=True)
    return ffn, FULL[1], hire.Linear(k=k, encoding=encoding, force=True, **linear)


COPIES = rules(0, Float("float32"), lookups=True)
CHOICES = rules(1.0, ROUNDED)


@functools.cache
def built(model: Model, dtype: str = "float32", rounded: bool = False) -> tuple[Built, Any]:
    """A model, and its results.

    Args:
      rounded: whether its float32 weights are numbers of bfloat16.
    """
    one = model.build(jnp.dtype(dtype))
    if rounded:
        half = [
            w.astype(jnp.bfloat16).astype(w.dtype) if w.dtype == jnp.float32 else w
            for w in jax.tree.leaves(one.weights)
        ]
        one = Built(one.fn, jax.tree.unflatten(jax.tree.structure(one.weights), half), one.args)
    return one, run(one.fn, one.weights, *one.args)


def check(model: Model, which: Any, dtype: str = "float32", **settings: Any) -> hire.Plan:
    """Compare a rewritten model with the original; the plan of what was run."""
    one, want = built(model, dtype, **settings)
    step = hire.transform(one.fn, *which)
    weights = packed(step, one.weights, *one.args)
    got = run(step, weights, *one.args)
    if dtype == "bfloat16" and model.discrete:
        got, want = floats(got), floats(want)
    close(got, want, 1e-4 if dtype == "float32" else 5e-2)
    return step.plan(weights, *one.args)


def check_sites(model: Model, plan: hire.Plan) -> None:
    """What a rule asks for is rewritten, but for what cannot be: that is dense and says why."""
    sites = Counter((site.kind, site.status) for site in plan.sites)
    wanted = Counter(site.kind for site in model.sites)
    assert sites["head", "rewritten"] == wanted["head"]
    assert sites["ffn", "rewritten" if model.predicted else "dense"] == wanted["ffn"]
    assert sites["ffn", "dense" if model.predicted else "rewritten"] == 0
    assert sites["linear", "rewritten"] == model.linears
    assert all(site.reason for site in plan.sites)
    dense = [site for site in plan.sites if (site.kind, site.status) == ("linear", "dense")]
    assert not dense or model.name == "explicit shardings"


@pytest.mark.sampled(10)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.zoo)])
@pytest.mark.parametrize("model", mostly_long(MODELS, every=4), ids=str)
def test_copies_that_hold_the_same_numbers(model, dtype):
    check_sites(model, check(model, COPIES, dtype))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.zoo)])
@pytest.mark.parametrize("model", mostly_long(MODELS), ids=str)
def test_all_neurons_and_inputs_exactly(model, dtype):
    check_sites(model, check(model, CHOICES, dtype))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("model", mostly_long(MODELS), ids=str)
def test_without_rules(model):
    """The same numbers in fewer bytes, of whatever is not a site of a kind that needs a rule."""
    check(model, ())
    plan = check(model, (), rounded=True)
    linears = [site for site in plan.sites if site.kind == "linear"]
    computed = model.name == "weights made at each call"  # sums of bfloat16 numbers are float32
    kept = [site for site in linears if computed and "fit no grid" in site.reason]
    assert len(kept) < len(linears)
    assert all(site.bytes_after < site.bytes_before for site in linears if site not in kept)
