"""One of two processes, four devices each; prints what it found as JSON.

python -m tests.processes.program RANK PORT FOLDER
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hire_rewrite as hire

D, WIDTH, VOCABULARY = 64, 256, 4104


def main(rank: int, port: str, folder: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("host", "chip"))
    found = {
        "devices": jax.device_count(),
        "searches": searches(mesh),
        "model": model(mesh, folder),
    }
    print(json.dumps(found))


def searches(mesh: Mesh) -> dict[str, bool]:
    """Whether both processes find what `lax.top_k` does."""
    x = np.random.default_rng(0).normal(size=(3, 4003)).astype(np.float32)
    wanted = [np.asarray(part).tolist() for part in lax.top_k(x, 16)]
    whole = jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda i: x[i])
    found = {}
    for target in (1.0, 0.99):
        for merge in ("gather", "butterfly", None):

            def run(x, target=target, merge=merge):
                x = lax.with_sharding_constraint(jnp.asarray(x), NamedSharding(mesh, P()))
                return hire.da_top_k(
                    x, 16, mesh=mesh, spec=P(None, ("host", "chip")),
                    recall_target=target, merge=merge,
                )  # fmt: skip

            values, indices = jax.jit(run)(whole)
            mine = [np.asarray(part.addressable_data(0)).tolist() for part in (values, indices)]
            found[f"{target} {merge}"] = mine == wanted
    return found


def model(mesh: Mesh, folder: str) -> dict[str, bool]:
    """Whether a rewritten step computes what it does on one device: its tokens, its logits, and
    those of linear layers alone; and whether what both processes save is what both load."""

    def step(params, token):
        x = params["embed"][token]
        x = x + jax.nn.relu(x @ params["up"]) @ params["down"]
        logits = x @ params["head"]
        return lax.top_k(logits, 8)[1], logits

    rng = np.random.default_rng(1)
    shapes = {
        "embed": (VOCABULARY, D),
        "up": (D, WIDTH),
        "down": (WIDTH, D),
        "head": (D, VOCABULARY),
    }
    params = {
        name: np.asarray(rng.normal(size=size) / 8, np.float32) for name, size in shapes.items()
    }
    both = ("host", "chip")
    specs = {"embed": P(), "up": P(None, both), "down": P(both), "head": P(None, both)}
    token = np.array([3, 1, 4, 15], np.int32)
    rules = (hire.FFN(k=0.25, candidates=0.5, parts=8, force=True), hire.Head(k=16, force=True))
    run = hire.transform(step, *rules)
    wanted = run(run.pack(params, token), token)

    def everywhere(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    spread = {name: everywhere(array, specs[name]) for name, array in params.items()}
    where = everywhere(token, P())
    packed = run.pack(spread, where)
    best, logits = jax.jit(run)(packed, where)
    packed.save(folder)
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        for name, array in spread.items()
    }
    loaded = hire.Packed.load(folder, run, shapes, where)
    pairs = zip(jax.tree.leaves(packed), jax.tree.leaves(loaded), strict=True)
    restored = [
        a.sharding == b.sharding
        and all(
            np.array_equal(x.data, y.data)
            for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True)
        )
        for a, b in pairs
    ]
    own = [(shard.index, np.asarray(shard.data)) for shard in logits.addressable_shards]
    near = [np.allclose(data, np.asarray(wanted[1])[index], atol=0.2) for index, data in own]
    tokens = np.asarray(best.addressable_data(0))
    every = hire.transform(step, hire.Linear(encoding=hire.Blocks(4), force=True))
    wanted_of_all = np.asarray(every(every.pack(params, token), token)[1])
    of_all = jax.jit(every)(every.pack(spread, where), where)[1]
    differs = [
        np.abs(np.asarray(shard.data) - wanted_of_all[shard.index]).max()
        for shard in of_all.addressable_shards
    ]
    return {
        "linear": bool(max(differs) < 1e-5),
        "tokens": bool((tokens == np.asarray(wanted[0])).all()),
        "logits": all(near) and len(own) == 4,
        "restored": all(restored) and len(restored) > 4,
        "spread": logits.sharding.spec == P(None, both),
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
