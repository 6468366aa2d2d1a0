"""What goes between the chips of a TPU, read from programs of the real compiler.

    make tpu        # in an environment of its own, with libtpu; no TPU is needed

Programs are compiled for topologies, not run. Written to benchmarks/results/tpu.json; the tests in
`tests/tpu` ask for the figures that matter.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu would look for a TPU, and for its host
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import argparse
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire
from benchmarks import timing
from benchmarks.collectives import collectives

TOPOLOGIES = {"v5e:2x2": (4,), "v5e:4x4": (4, 4), "v5p:2x2x1": (4,)}
UNREAD = ("v5p:2x2x1",)
"""libtpu 0.0.52 compiles programs with gathers for these, but fails to give their text back."""

VOCABULARY, BATCH, K = 262_144, 8, 64


def mesh_of(topology: str) -> Mesh:
    """All chips of a topology, on one axis or two."""
    shape = TOPOLOGIES[topology]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices).reshape(shape), ("host", "chip")[-len(shape) :])


def program(function: Callable[..., Any], *args: Any) -> Any:
    """The compiled program for shapes that are spread over a topology's chips."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).compile()


def compiled(function: Callable[..., Any], *args: Any) -> str:
    """The text of that program."""
    return program(function, *args).as_text() or ""


def shape(mesh: Mesh, spec: P, *sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))


def searches(mesh: Mesh) -> dict[str, Callable[[Any], Any]]:
    """Ways to find the greatest K logits of a vocabulary that is spread over all axes."""
    spec = P(None, mesh.axis_names)
    return {
        "lax.top_k": lambda x: lax.top_k(x, K),
        "lax.approx_max_k": lambda x: lax.approx_max_k(x, K),
        "da_top_k, exact": lambda x: hire.da_top_k(x, K, mesh=mesh, spec=spec, recall_target=1.0),
        "da_top_k, 0.99": lambda x: hire.da_top_k(x, K, mesh=mesh, spec=spec),
        "da_top_k, 0.99, butterfly": lambda x: hire.da_top_k(
            x, K, mesh=mesh, spec=spec, merge="butterfly"
        ),
    }


def logits(mesh: Mesh) -> jax.ShapeDtypeStruct:
    return shape(mesh, P(None, mesh.axis_names), BATCH, VOCABULARY)


def head(mesh: Mesh, dtype: Any = jnp.bfloat16) -> tuple[Any, Any]:
    """A head with a search behind it, and its arguments."""
    args = (
        shape(mesh, P(None, mesh.axis_names), 2048, VOCABULARY, dtype=dtype),
        shape(mesh, P(), BATCH, 2048, dtype=dtype),
    )
    return lambda weight, x: lax.top_k((x @ weight).astype(jnp.float32), K), args


def block(mesh: Mesh, dtype: Any = jnp.bfloat16) -> tuple[Any, Any]:
    """A gated block whose hidden axis is spread, and its arguments."""
    weights = {
        "gate": shape(mesh, P(None, mesh.axis_names), 2048, 8192, dtype=dtype),
        "up": shape(mesh, P(None, mesh.axis_names), 2048, 8192, dtype=dtype),
        "down": shape(mesh, P(mesh.axis_names), 8192, 2048, dtype=dtype),
    }

    def run(w: Any, x: Any) -> Any:
        return (jax.nn.relu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

    return run, (weights, shape(mesh, P(), BATCH, 2048, dtype=dtype))


def step(mesh: Mesh, dtype: Any = jnp.bfloat16, layers: int = 4) -> tuple[Any, Any]:
    """A decode step: layers of attention to a cache and blocks under a scan, head and search."""
    axes, d, f, heads, size, length = mesh.axis_names, 1024, 4096, 16, 64, 256

    def weight(spec: P, *sizes: int) -> jax.ShapeDtypeStruct:
        return shape(mesh, spec, *sizes, dtype=dtype)

    weights = {
        "embed": weight(P(), VOCABULARY // 8, d),
        "layers": {
            "qkv": weight(P(None, None, None, axes), layers, d, 3, heads, size),
            "out": weight(P(None, axes), layers, heads, size, d),
            "gate": weight(P(None, None, axes), layers, d, f),
            "up": weight(P(None, None, axes), layers, d, f),
            "down": weight(P(None, axes), layers, f, d),
        },
        "head": weight(P(None, axes), d, VOCABULARY // 8),
    }
    cache = shape(mesh, P(None, None, None, None, axes), layers, 2, BATCH, length, heads, size)

    def run(weights: Any, token: Any, cache: Any, position: Any) -> Any:
        def layer(x: Any, each: Any) -> tuple[Any, Any]:
            w, own = each
            q, k, v = jnp.einsum("bd,dcnh->cbnh", x, w["qkv"])
            new = jnp.stack([k, v])[:, :, None].astype(own.dtype)
            own = lax.dynamic_update_slice_in_dim(own, new, position, axis=2)
            scores = jnp.einsum("bnh,btnh->bnt", q, own[0].astype(q.dtype)) / math.sqrt(size)
            mixed = jnp.einsum("bnt,btnh->bnh", jax.nn.softmax(scores), own[1].astype(q.dtype))
            x = x + jnp.einsum("bnh,nhd->bd", mixed, w["out"])
            x = x + (jax.nn.relu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]
            return x, own

        x, cache = lax.scan(layer, weights["embed"][token], (weights["layers"], cache))
        return lax.top_k((x @ weights["head"]).astype(jnp.float32), K), cache

    token = shape(mesh, P(), BATCH, dtype=jnp.int32)
    position = shape(mesh, P(), dtype=jnp.int32)
    return run, (weights, token, cache, position)


def rewritten(function: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """The rewritten function, and its arguments, with the shapes of a `Packed`."""
    run = hire.transform(
        function, hire.FFN(k=0.05, force=True), hire.Head(k=K, candidates=256, force=True)
    )
    return run, run.pack(*args), *args[1:]


def programs(topology: str) -> Iterator[tuple[str, str]]:
    """Names and texts of all programs for a topology."""
    mesh = mesh_of(topology)
    for name, search in searches(mesh).items():
        yield name, compiled(search, logits(mesh))
    if topology in UNREAD:
        return
    for name, build in (("head", head), ("block", block), ("decode step", step)):
        function, args = build(mesh)
        yield f"{name}, dense", compiled(function, *args)
        yield f"{name}, rewritten", compiled(*rewritten(function, args))


def row(topology: str, name: str, text: str) -> dict[str, Any]:
    """What a program sends."""
    found = collectives(text)
    always = [one.bytes for one in found if not one.branch]
    return {
        "topology": topology,
        "program": name,
        "bytes": sum(always),
        "more in a branch": sum(one.bytes for one in found if one.branch),
        "greatest": max((one.bytes for one in found), default=0),
        "collectives": ", ".join(sorted({one.kind for one in found})),
    }


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.tpu", description=__doc__).parse_args()
    rows = []
    for topology in TOPOLOGIES:
        for name, text in programs(topology):
            rows.append(row(topology, name, text))
            print(*rows[-1].values(), sep="  ", flush=True)
    versions = {"libtpu": importlib.metadata.version("libtpu"), "jax": jax.__version__}
    result = {**versions, "programs": rows}
    print(f"written to {timing.write('tpu', result, 'make tpu')}")


if __name__ == "__main__":
    main()
