"""A diff of every model of the zoo: none with itself, and one with any other."""

from __future__ import annotations

import random

import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from hire_rewrite.graph.trace import trace
from hire_rewrite.passes.diff import compare
from tests.zoo.catalog import MODELS
from tests.zoo.test_zoo import SOME, mostly_long

PAIRS = random.Random(0).sample([(a, b) for a in range(len(SOME)) for b in range(a)], 10)


def traced(model):
    built = model.build(jnp.dtype("float32"))
    return trace(built.fn, (built.weights, *built.args), {}, (0,))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("model", mostly_long(MODELS, every=4), ids=str)
def test_a_model_and_itself(model):
    built = model.build(jnp.dtype("float32"))
    found = hire.diff(built.fn, built.fn, built.weights, *built.args)
    assert not found.regions
    assert str(found) == ""


@pytest.fixture(scope="module")
def some():
    return [traced(model) for model in MODELS if str(model) in SOME]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_two_models(some, pair):
    first, second = (some[number] for number in pair)
    leaves = min(first.out_tree.num_leaves, second.out_tree.num_leaves)
    results = [(i, i) for i in range(leaves)]
    found = compare(
        ("one", "other"), (first.closed, second.closed), (first.paths, second.paths), results
    )
    assert found.changed
    assert found.to_html()
    assert found.to_json()
    assert len(str(found).splitlines()) < 1000
