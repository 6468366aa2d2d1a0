"""Every model of the zoo with a ReLU, without the neurons that it makes zero: nothing changes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from tests.cases import close, packed, run
from tests.zoo.catalog import MODELS
from tests.zoo.model import Model

ALWAYS = ("Linen/OPT/decode", "Linen/Switch (vmapped experts)/forward", "JAX/RWKV/forward")
RULES = {
    "without rules": (),
    "told by the first product": (hire.FFN(k="positive", max_tokens=None, force=True),),
    "proved": (
        hire.FFN(k="positive", predictor=hire.Quantized(), max_tokens=None, force=True),
    ),
}  # fmt: skip


def blocks(model: Model) -> set[str]:
    """The names of its blocks with a ReLU."""
    return {site.name for site in model.sites if site.kind == "ffn" and "relu" in site.activation}


def some_long(dtype: str) -> list[Any]:
    """Models with a ReLU; all but a few are tested by `make zoo` alone."""
    return [
        model
        if str(model) in ALWAYS and dtype == "float32"
        else pytest.param(model, marks=pytest.mark.zoo)
        for model in MODELS
        if blocks(model)
    ]


def check(model: Model, dtype: str, tolerance: float) -> None:
    one = model.build(jnp.dtype(dtype))
    want = run(one.fn, one.weights, *one.args)
    for name, rules in RULES.items():
        step = hire.transform(one.fn, *rules)
        weights = packed(step, one.weights, *one.args)
        close(run(step, weights, *one.args), want, tolerance)
        rewritten = {site.name for site in step.plan(weights, *one.args).rewritten}
        assert not rules or blocks(model) <= rewritten, name


@pytest.mark.sampled(3)
@pytest.mark.parametrize("model", some_long("float32"), ids=str)
def test_nothing_is_lost(model):
    check(model, "float32", 1e-5)


@pytest.mark.parametrize("model", some_long("bfloat16"), ids=str)
def test_nothing_is_lost_in_bfloat16(model):
    check(model, "bfloat16", 5e-2)
