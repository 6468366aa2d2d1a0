"""Every model of the zoo: the expected sites and no others, and nothing changes at full budget.

`make zoo` runs the long ones: in bfloat16, and for every model under `vmap` and differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from tests.cases import FULL, close, packed, run
from tests.zoo.catalog import MODELS
from tests.zoo.coverage import HEADER, document, row
from tests.zoo.model import Built, Expected, Model

SOME = (
    "Equinox/GPT/forward",
    "Haiku/Grok/decode",
    "JAX/Llama, layers scanned/decode",
    "JAX/translator with two heads/forward",
    "Linen/GPT-2/decode",
    "NNX/Qwen3-MoE/forward",
)
UNDIFFERENTIATED = (
    "explicit shardings",  # raw weights of such types are refused there: tests/sharding
    "adaptive depth in a while_loop",  # of which JAX knows no gradient
)
FIELDS = [field.name for field in dataclasses.fields(Expected)]

PAGE = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.removeprefix(HEADER).splitlines() if line.startswith("| ")]


def built(model: Model, dtype: str = "float32") -> Built:
    return model.build(jnp.dtype(dtype))


def mostly_long(models: Iterable[Model], *, every: int | None = None) -> list[Any]:
    """All but a few of them, and one of `every`, are tested by `make zoo` alone."""
    return [
        m
        if str(m) in SOME or (every and i % every == 0)
        else pytest.param(m, marks=pytest.mark.zoo)
        for i, m in enumerate(models)
    ]


def floats(results):
    """What of a result a gradient or a rounding error is meaningful for."""
    return [r for r in jax.tree.leaves(results) if jnp.issubdtype(r.dtype, jnp.floating)]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.zoo)])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_sites(model, dtype):
    one = built(model, dtype)
    plan = hire.transform(one.fn, *FULL).plan(one.weights, *one.args)
    assert not plan.hints  # its weights are weights, and all of them
    sites = [Expected(**{name: getattr(site, name) for name in FIELDS}) for site in plan.sites]
    if dtype == "float32":
        assert sorted(sites, key=str) == sorted(model.sites, key=str)
        assert row(model, plan) in ROWS, "docs/coverage.md is old: `make docs` writes it"


@pytest.mark.sampled(10)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.zoo)])
@pytest.mark.parametrize("model", [m for m in MODELS if m.sites], ids=str)
def test_results_at_full_budget(model, dtype):
    one = built(model, dtype)
    step = hire.transform(one.fn, *FULL)
    weights = packed(step, one.weights, *one.args)
    got, want = run(step, weights, *one.args), run(one.fn, one.weights, *one.args)
    if dtype == "bfloat16" and model.discrete:
        got, want = floats(got), floats(want)
    close(got, want, 1e-4 if dtype == "float32" else 5e-2)


def test_the_page_has_each_model_once():
    """docs/coverage.md; that its rows are current is tested with the models."""
    assert document(ROWS) == PAGE
    assert len(ROWS) == len(MODELS)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "model",
    mostly_long(m for m in MODELS if m.sites and m.form != "generate" and m.mapped),
    ids=str,
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


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "model",
    mostly_long(m for m in MODELS if m.sites and not m.discrete and m.name not in UNDIFFERENTIATED),
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
