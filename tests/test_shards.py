"""Functions with a `shard_map` of their own: each device rewrites what it has."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from tests.test_spread import TOKEN, batches, quick, weights

FORCED = {"force": True, "predictor": hire.Quantized()}
HEAD = hire.Head(k=16, candidates=64, min_width=1024, **FORCED)

SPECS = {
    "embed": P(),
    "layers": {
        "gate": P(None, None, "model"),
        "up": P(None, None, "model"),
        "bias": P(None, "model"),
        "down": P(None, "model", None),
    },
    "head": P(None, "model"),
}


def ffn(**settings):
    return hire.FFN(k=0.25, candidates=0.5, **FORCED | settings)


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    devices = np.array(jax.devices()[:count]).reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes))


def block(x, w):
    h = jax.nn.relu(x @ w["gate"]) * (x @ w["up"] + w["bias"])
    return x + lax.psum(h @ w["down"], "model")


def forward(params, token):
    x, _ = lax.scan(lambda x, w: (block(x, w), None), params["embed"][token], params["layers"])
    return x @ params["head"]


def whole(mesh, check_vma=True):
    """All of the model in one `shard_map`."""
    data = "data" if "data" in mesh.axis_names else None
    return jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(SPECS, P(data)),
        out_specs=P(data, "model"),
        check_vma=check_vma,
    )


def blocks(mesh, check_vma=True):
    """A `shard_map` in each iteration of a scan."""
    specs = {name: P(*spec[1:]) for name, spec in SPECS["layers"].items()}
    each = jax.shard_map(
        block, mesh=mesh, in_specs=(P(), specs), out_specs=P(), check_vma=check_vma
    )

    def step(params, token):
        x, _ = lax.scan(lambda x, w: (each(x, w), None), params["embed"][token], params["layers"])
        return x @ params["head"]

    return step


def one_device(params, token):
    def layer(x, w):
        h = jax.nn.relu(x @ w["gate"]) * (x @ w["up"] + w["bias"])
        return x + h @ w["down"], None

    x, _ = lax.scan(layer, params["embed"][token], params["layers"])
    return x @ params["head"]


def laid_out(mesh):
    put = functools.partial(jax.device_put)
    return jax.tree.map(lambda a, s: put(a, NamedSharding(mesh, s)), weights(), SPECS)


FORMS = {
    "whole": (whole, mesh_of(model=4), True),
    "whole, unchecked": (whole, mesh_of(model=4), False),
    "whole, data and model": (whole, mesh_of(data=2, model=4), True),
    "blocks": (blocks, mesh_of(model=4), True),
    "blocks, unchecked": (blocks, mesh_of(data=2, model=4), False),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("predictor", [hire.Quantized(), hire.LowRank(48)], ids=str)
def test_blocks_take_the_top_k_of_each_device(name, predictor):
    form, mesh, check_vma = FORMS[name]
    calibration = batches() if predictor.wants_calibration else None
    run = hire.transform(form(mesh, check_vma), ffn(predictor=predictor))
    got = quick(run)(run.pack(laid_out(mesh), TOKEN, calibration=calibration), TOKEN)
    alone = hire.transform(one_device, ffn(predictor=predictor, parts=4))
    want = alone(alone.pack(weights(), TOKEN, calibration=calibration), TOKEN)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    dense = one_device(weights(), TOKEN)
    assert np.abs(got - dense).max() > 0.05  # it does take a top k


def test_heads_take_the_top_k_of_each_device():
    mesh = mesh_of(data=2, model=4)
    run = hire.transform(whole(mesh), HEAD)
    got = quick(run)(run.pack(laid_out(mesh), TOKEN), TOKEN)
    parts = []
    for head in np.split(weights()["head"], 4, axis=1):
        own = weights() | {"head": head}
        alone = hire.transform(one_device, HEAD)
        parts.append(alone(alone.pack(own, TOKEN), TOKEN))
    np.testing.assert_allclose(got, np.concatenate(parts, axis=1), rtol=2e-4, atol=2e-4)
