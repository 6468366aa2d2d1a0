"""One of two processes, four devices each; prints what it found as JSON.

python -m tests.processes.program RANK PORT
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hire_rewrite import da_top_k


def main(rank: int, port: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("host", "chip"))
    x = np.random.default_rng(0).normal(size=(3, 4003)).astype(np.float32)
    wanted = [np.asarray(part).tolist() for part in lax.top_k(x, 16)]
    whole = jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda i: x[i])
    found = {}
    for target in (1.0, 0.99):
        for merge in ("gather", "butterfly", None):

            def run(x, target=target, merge=merge):
                x = lax.with_sharding_constraint(jnp.asarray(x), NamedSharding(mesh, P()))
                return da_top_k(
                    x, 16, mesh=mesh, spec=P(None, ("host", "chip")),
                    recall_target=target, merge=merge,
                )  # fmt: skip

            values, indices = jax.jit(run)(whole)
            mine = [np.asarray(part.addressable_data(0)).tolist() for part in (values, indices)]
            found[f"{target} {merge}"] = mine == wanted
    print(json.dumps({"devices": jax.device_count(), "found": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
