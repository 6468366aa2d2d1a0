"""Every model of the zoo with its weights sharded over a mesh. Long: `make mesh` runs it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from benchmarks.collectives import collectives
from tests.cases import FEW, FULL, close, packed, run
from tests.zoo.catalog import MODELS
from tests.zoo.model import Built, Model

pytestmark = pytest.mark.mesh

DEVICES = 4
PAIRS = 40  # the greatest k of a model that searches its logits itself; FEW has 8
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def spread(model: Model, last: bool) -> Built:
    """A model whose matrices are spread along their first or last axis that devices divide."""
    one = model.build(jnp.dtype("float32"))
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("model",))

    def put(array):
        order = range(array.ndim)
        axes = [i for i in (reversed(order) if last else order) if array.shape[i] % DEVICES == 0]
        if array.ndim < 2 or not axes:
            return jax.device_put(array, NamedSharding(mesh, P()))
        spec = P(*("model" if i == axes[0] else None for i in range(array.ndim)))
        return jax.device_put(array, NamedSharding(mesh, spec))

    whole = NamedSharding(mesh, P())
    args = jax.tree.map(lambda array: jax.device_put(array, whole), one.args)
    return Built(one.fn, jax.tree.map(put, one.weights), args)


OWN_MESH = ("FFN under shard_map", "explicit shardings")
POSITIVE = [model for model in MODELS if model.sites and model.name not in OWN_MESH]
BOTH_WAYS = pytest.mark.parametrize("last", [True, False], ids=["last axes", "first axes"])


@BOTH_WAYS
@pytest.mark.parametrize("model", POSITIVE, ids=str)
def test_full_budget(model, last):
    one = spread(model, last)
    step = hire.transform(one.fn, *FULL)
    weights = packed(step, one.weights, *one.args)
    close(run(step, weights, *one.args), run(one.fn, one.weights, *one.args))


@BOTH_WAYS
@pytest.mark.parametrize("model", POSITIVE, ids=str)
def test_nothing_grows_with_the_weights(model, last):
    """What goes between devices is a few numbers for each token, or goes between them anyway."""
    one = spread(model, last)
    step = hire.transform(one.fn, *FEW)
    sites = [s for s in step.plan(one.weights, *one.args).sites if s.status == "rewritten"]
    if not sites:
        pytest.skip("all of its sites stay dense")
    weights = packed(step, one.weights, *one.args)
    mine, dense = (
        collectives(jax.jit(fn).lower(first, *one.args).compile(QUICK).as_text())
        for fn, first in ((step, weights), (one.fn, one.weights))
    )
    few = max(site.tokens * max(DEVICES * PAIRS * 8, 4 * site.d_model) for site in sites)
    allowed = max([few, *(each.bytes for each in dense)])
    assert all(each.bytes <= allowed for each in mine), (allowed, mine)
