"""Every model of the zoo: the expected sites and no others, and nothing changes at full budget."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from tests.cases import FULL, close, packed, run
from tests.zoo.catalog import MODELS
from tests.zoo.coverage import document, plan_of
from tests.zoo.model import Built, Expected, Model

POSITIVE = [model for model in MODELS if model.sites]


@functools.cache
def built(model: Model, dtype: str = "float32") -> Built:
    return model.build(jnp.dtype(dtype))


def floats(results):
    """What of a result a gradient or a rounding error is meaningful for."""
    return [r for r in jax.tree.leaves(results) if jnp.issubdtype(r.dtype, jnp.floating)]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_sites(model):
    plan = plan_of(model)
    names = [field.name for field in dataclasses.fields(Expected)]
    found = {Expected(**{name: getattr(site, name) for name in names}) for site in plan.sites}
    assert found == set(model.sites)
    assert len(plan.sites) == len(model.sites)


def test_the_page_is_current():
    """docs/coverage.md; `make docs` writes it anew."""
    page = Path(__file__).parents[2] / "docs" / "coverage.md"
    assert page.read_text() == document((model, plan_of(model)) for model in MODELS)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.zoo)])
@pytest.mark.parametrize("model", POSITIVE, ids=str)
def test_full_budget(model, dtype):
    one = built(model, dtype)
    step = hire.transform(one.fn, *FULL)
    weights = packed(step, one.weights, *one.args)
    got, want = run(step, weights, *one.args), run(one.fn, one.weights, *one.args)
    if dtype == "bfloat16" and model.discrete:
        got, want = floats(got), floats(want)
    close(got, want, 1e-4 if dtype == "float32" else 5e-2)


@pytest.mark.parametrize(
    "model", [m for m in POSITIVE if m.form != "generate" and m.mapped], ids=str
)
def test_full_budget_under_vmap(model):
    one = built(model)
    step = hire.transform(one.fn, *FULL)
    weights = packed(step, one.weights, *one.args)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one.args)
    mapped = [
        jax.vmap(fn, in_axes=(None, *(0 for _ in one.args))) for fn in (step, one.fn)
    ]  # fmt: skip
    close(run(mapped[0], weights, *batch), run(mapped[1], one.weights, *batch))


@pytest.mark.parametrize(
    "model",
    # Raw weights with explicit shardings are refused there: tests/test_spread.py.
    [m for m in POSITIVE if not m.discrete and m.name != "explicit shardings"],
    ids=str,
)
def test_gradient_in_mode_exact(model):
    one = built(model)
    step = hire.transform(one.fn, *FULL, mode="exact")

    def loss(fn):
        return lambda weights: sum(jnp.square(r).mean() for r in floats(fn(weights, *one.args)))

    grads = [
        run(jax.grad(loss(fn), allow_int=True), one.weights) for fn in (step, one.fn)
    ]  # fmt: skip
    close(*grads, 1e-3)
