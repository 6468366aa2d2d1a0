"""SmolLM2-135M on eight host devices: the tokens that one device chooses?

`python -m benchmarks.mesh` spreads the vocabulary and the FFNs over meshes of eight CPU devices,
and follows greedy decoding of the rewritten model on one device, token by token: how often do the
devices together choose the same one, and are their ten best the same? Written to
`results/mesh.json`. Nothing is timed: eight devices on two cores say nothing about speed.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import argparse
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

import hire_rewrite as hire
from benchmarks import timing
from examples.smollm2 import model, text, tokenizer, weights
from hire_rewrite.plan import table

STREAMS, PROMPT, STEPS, BEST = 2, 32, 128, 10
KINDS = {"help": text.help_text, "code": text.code_text}
MESHES: dict[str, tuple[dict[str, int], dict[str, P]]] = {
    "tensor": (
        {"model": 8},
        {"embed": P("model"), "up": P(None, None, "model"), "down": P(None, "model")},
    ),
    "data, tensor": (
        {"data": 2, "model": 4},
        {"embed": P("model"), "up": P(None, None, "model"), "down": P(None, "model")},
    ),
    "stored in shards": (
        {"data": 8},
        {"embed": P(None, "data"), "up": P(None, "data"), "down": P(None, None, "data")},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mesh", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each stream (%(default)s)")
    asked = parser.parse_args()
    bench = Bench(asked.steps)
    rows = [bench.row(name, target) for name in MESHES for target in (1.0, 0.99)]
    print(table([list(rows[0]), *([str(value) for value in row.values()] for row in rows)]))
    result = {"model": "SmolLM2-135M-Instruct, float32", "rules": str(rules(8, 1.0)), "rows": rows}
    if asked.steps == STEPS:
        print(f"written to {timing.write('mesh', result, 'python -m benchmarks.mesh')}")


def rules(parts: int, recall_target: float) -> tuple[hire.FFN, hire.Head]:
    """Few neurons, so that they are predicted and fetched for two tokens as well."""
    ffn = hire.FFN(k=0.25, candidates=0.375, parts=parts, force=True)
    return ffn, hire.Head(recall_target=recall_target, force=True)


class Bench:
    """The model, and what it says on one device with its neurons in so many parts."""

    def __init__(self, steps: int) -> None:
        self.params, self.config = weights.load()
        self.steps = steps
        words = tokenizer.load()
        self.prompts = {
            kind: jnp.asarray(read(STREAMS * PROMPT, words).reshape(STREAMS, PROMPT))
            for kind, read in KINDS.items()
        }
        self._followed: dict[int, Mapping[str, Any]] = {}

    def step(self, params: Any, token: Any, cache: Any) -> Any:
        """The best tokens: i32[streams, BEST], and the cache."""
        logits, cache = model.decode_step(self.config, params, token, cache)
        return lax.top_k(logits, BEST)[1], cache

    def row(self, name: str, target: float) -> dict[str, Any]:
        """How often the devices of a mesh choose what one device does."""
        sizes, specs = MESHES[name]
        devices = np.array(jax.devices()).reshape(tuple(sizes.values()))
        mesh = Mesh(devices, tuple(sizes))
        parts = devices.size if name == "stored in shards" else sizes["model"]
        params = jax.tree.map(lambda array: _put(array, mesh, P()), self.params)
        layers = dict(params["layers"])
        for weight, spec in (("w_gate", "up"), ("w_up", "up"), ("w_down", "down")):
            layers[weight] = _put(layers[weight], mesh, specs[spec])
        params |= {"embed": _put(params["embed"], mesh, specs["embed"]), "layers": layers}
        run = hire.transform(self.step, *rules(parts, target))
        token, cache = jnp.zeros(STREAMS, jnp.int32), self._cache()
        packed = run.pack(params, token, cache)
        found = {
            kind: self._follow(jax.jit(run, donate_argnums=2), packed, kind, alone)
            for kind, alone in self._alone(parts).items()
        }
        pairs = [(found[kind], self._alone(parts)[kind]) for kind in KINDS]
        same = np.concatenate([mine[..., 0] == theirs[..., 0] for mine, theirs in pairs])
        shared = np.concatenate(
            [(mine[..., None] == theirs[..., None, :]).any(-1) for mine, theirs in pairs]
        )
        return {
            "mesh": name,
            "recall_target": target,
            "tokens": int(same.size),
            "same token": round(float(same.mean()), 5),
            f"same of the best {BEST}": round(float(shared.mean()), 5),
        }

    def _alone(self, parts: int) -> Mapping[str, Any]:
        """For each kind of text the best tokens at each step of one device, [steps, streams, k]."""
        if parts not in self._followed:
            run = hire.transform(self.step, *rules(parts, 1.0))
            token, cache = jnp.zeros(STREAMS, jnp.int32), self._cache()
            packed = run.pack(self.params, token, cache)
            compiled = jax.jit(run, donate_argnums=2)
            self._followed[parts] = {
                kind: self._follow(compiled, packed, kind, None) for kind in KINDS
            }
        return self._followed[parts]

    def _follow(self, run: Any, packed: Any, kind: str, forced: Any) -> np.ndarray:
        """The best tokens of each step, after those of `forced`, or its own."""
        prefill = jax.jit(functools.partial(model.prefill, self.config))
        logits, cache = prefill(self.params, self.prompts[kind], self._cache())
        token, found = logits.argmax(-1).astype(jnp.int32), []
        cache = jax.tree.map(np.asarray, cache)
        for i in tqdm(range(self.steps), desc=kind, leave=False, delay=2):
            best, cache = run(packed, np.asarray(token), cache)
            found.append(np.asarray(best))
            token = (found if forced is None else forced)[i][:, 0]
        return np.stack(found)

    def _cache(self) -> Any:
        return model.init_cache(self.config, STREAMS, PROMPT + self.steps)


def _put(array: Any, mesh: Mesh, spec: P) -> Any:
    return jax.device_put(array, NamedSharding(mesh, spec))


if __name__ == "__main__":
    main()
