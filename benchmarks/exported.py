"""Exported and compiled ahead of time: are the tokens those of the process that made the program?

python -m benchmarks.exported [--tokens 64]

A small decoder with a cache is rewritten with each set of rules, exported for CPU, TPU and CUDA at
once, and saved; its arrays go beside it in NumPy's files. A process that cannot import this package
loads both and decodes on the platform that this one runs on. It is given the tokens that this one
chose, where the kernels ran, so that one tie that falls otherwise is counted once.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import hire_rewrite as hire
from benchmarks import timing

LAYERS, D, HIDDEN, VOCABULARY, POSITIONS = 3, 64, 256, 4104, 128
PLATFORMS = ("cpu", "tpu", "cuda")
BATCHES = (1, 3)

RULES: Mapping[str, tuple[Any, ...]] = {
    "none": (),
    "head": (hire.Head(k=16, force=True),),
    "head of 4 bits": (hire.Head(k=16, predictor=hire.Quantized(4), force=True),),
    "head, cascade": (
        hire.Head(k=16, predictor=hire.Cascade(hire.Quantized(4), hire.Quantized()), force=True),
    ),
    "head, certified": (hire.Head(k=16, certify=True, force=True),),
    "head, nested": (hire.Head(k=16, exact=hire.Nested(), force=True),),
    "all of 8 bits": (
        hire.Linear(encoding=hire.Blocks(8), force=True),
        hire.Head(k=16, force=True),
    ),
    "all of 4 bits, inputs exact": (
        hire.Linear(k=0.05, encoding=hire.Blocks(4), force=True),
        hire.Head(k=16, force=True),
    ),
    "bfloat16": (hire.Linear(encoding=hire.Float("bfloat16"), force=True),),
    "block, others zero": (hire.FFN(k=0.25, candidates=0.5, max_tokens=None, force=True),),
    "block, others guessed": (hire.FFN(k=0.1, tail="predicted", max_tokens=None, force=True),),
    "block, where positive": (hire.FFN(k="positive", max_tokens=None, force=True),),
}

LOADER = """
import json, sys
sys.modules["hire_rewrite"] = None  # nobody can import it
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path

def argmaxes(folder, call, arrays):
    cache, chosen = jnp.asarray(np.load(folder / "cache.npy")), []
    for position, token in enumerate(np.load(folder / "tokens.npy")):
        logits, cache = call(arrays, jnp.asarray(token), jnp.int32(position), cache)
        chosen.append(np.asarray(logits.argmax(-1)).tolist())
    return chosen

found = {}
for folder in map(Path, sys.argv[1:]):
    exported = jax.export.deserialize(bytearray((folder / "step.bin").read_bytes()))
    with np.load(folder / "packed.npz") as file:
        arrays = {name: jnp.asarray(array) for name, array in file.items()}
    stored = json.loads((folder / "dtypes.json").read_text())
    arrays = {name: array.view(jnp.dtype(stored[name])) for name, array in arrays.items()}
    chosen = argmaxes(folder, jax.jit(exported.call), arrays)
    found[str(folder)] = {"platforms": exported.platforms, "argmaxes": chosen}
print(json.dumps(found))
"""
"""What runs without the package: prints what it chose, as JSON, by folder."""


def model() -> dict[str, Any]:
    """Random weights of a decoder with a tied head, layers stacked."""
    rng = np.random.default_rng(0)
    shapes = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, HIDDEN), "down": (HIDDEN, D)}
    layers = {
        name: jnp.asarray(rng.normal(size=(LAYERS, *shape)) / shape[0] ** 0.5, jnp.float32)
        for name, shape in shapes.items()
    }
    embed = jnp.asarray(rng.normal(size=(VOCABULARY, D)), jnp.float32)
    return {"layers": layers, "embed": embed}


def decode_step(params: Any, token: Array, position: Array, cache: Array) -> tuple[Array, Array]:
    """Logits: [batch, VOCABULARY], and the cache: [LAYERS, 2, batch, POSITIONS, D].

    Args:
      token: i32[batch].
      position: i32[].
    """

    def layer(x: Array, given: tuple[Any, Array]) -> tuple[Array, Array]:
        w, cache = given
        q, k, v = jnp.split(x @ w["qkv"], 3, axis=-1)
        new = jnp.stack([k, v])[:, :, None]
        cache = lax.dynamic_update_slice_in_dim(cache, new, position, axis=2)
        scores = jnp.einsum("bd,bpd->bp", q, cache[0]) / D**0.5
        scores = jnp.where(jnp.arange(POSITIONS) <= position, scores, -jnp.inf)
        x = x + jnp.einsum("bp,bpd->bd", jax.nn.softmax(scores), cache[1]) @ w["out"]
        return x + jax.nn.relu(x @ w["up"]) @ w["down"], cache

    x, cache = lax.scan(layer, params["embed"][token], (params["layers"], cache))
    return x @ params["embed"].T, cache


def empty_cache(batch: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((LAYERS, 2, batch, POSITIONS, D), jnp.float32)


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)


def call_of(batch: Any) -> tuple[Any, Any, Any]:
    """Shapes of the arguments after the weights."""
    i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    return i32((batch,)), i32(()), empty_cache(batch)


def decoded(call: Any, weights: Any, batch: int, tokens: int) -> np.ndarray:
    """i32[tokens + 1, batch]: those that a step chooses, after the first."""
    token = jnp.arange(1, batch + 1, dtype=jnp.int32)
    cache, chosen = jnp.zeros_like(empty_cache(batch)), [token]
    for position in range(tokens):
        logits, cache = call(weights, token, jnp.int32(position), cache)
        token = logits.argmax(-1).astype(jnp.int32)
        chosen.append(token)
    return np.stack(list(map(np.asarray, chosen)))


def save(folder: Path, step: Any, packed: hire.Packed, batch: Any) -> str:
    """Export a step for all platforms and save it with its arrays; return the program's text."""

    def served(arrays: Any, *call: Any) -> Any:
        return step(packed.with_arrays(arrays), *call)

    arrays = packed.arrays
    export = jax.export.export(jax.jit(served), platforms=PLATFORMS)
    exported = export(shapes_of(arrays), *call_of(batch))
    folder.mkdir(parents=True)
    (folder / "step.bin").write_bytes(exported.serialize())
    # NumPy's files do not know bfloat16: such an array goes as the bits it has.
    plain = {name: _bits(np.asarray(array)) for name, array in arrays.items()}
    np.savez(folder / "packed.npz", **plain)  # type: ignore[arg-type]
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    (folder / "dtypes.json").write_text(json.dumps(dtypes))
    return str(exported.mlir_module())


def _bits(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")


def load_without_package(folders: list[Path]) -> dict[str, Any]:
    """What a process without the package makes of saved steps, by folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", LOADER, *map(str, folders)],
        env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


class Counts:
    """How often each thing was tried, and was wrong."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}

    def add(self, what: str, tried: int, wrong: int) -> None:
        row = self.rows.setdefault(what, [0, 0])
        row[0] += tried
        row[1] += wrong


def exported(folder: Path, tokens: int, rules: Mapping[str, Any], counts: Counts) -> None:
    """Export steps, load them without the package, and compare what they choose."""
    params, wanted = model(), {}
    (symbol,) = jax.export.symbolic_shape("batch")
    for number, (name, chosen) in enumerate(rules.items()):
        step = hire.transform(decode_step, *chosen, on_miss="ignore")
        packed = step.pack(params, *call_of(1))
        run = jax.jit(step)
        from_shapes = step.pack(shapes_of(params), *call_of(1))
        for batch in BATCHES:
            best = decoded(run, packed, batch, tokens)
            for kind, size in (("fixed", batch), ("symbolic", symbol)):
                here = folder / f"{number}-{batch}-{kind}"
                text = save(here, step, packed, size)
                foreign = "custom_call @hire" in text
                counts.add("programs without a call of the package's kernels", 1, foreign)
                np.save(here / "tokens.npy", best[:-1])
                np.save(here / "cache.npy", np.zeros(empty_cache(batch).shape, np.float32))
                wanted[str(here)] = best[1:]
            if from_shapes.info == packed.info:
                ahead = run.lower(from_shapes, *call_of(batch)).compile()
                wrong = int((decoded(ahead, packed, batch, tokens) != best).sum())
                counts.add(
                    "tokens of steps that were compiled from shapes alone", best[1:].size, wrong
                )
        print(name, flush=True)
    for where, found in load_without_package(list(map(Path, wanted))).items():
        missing = set(PLATFORMS) - set(found["platforms"])
        counts.add(
            "steps (rules × batch, fixed and symbolic) × platforms, exported and loaded without "
            "the package",
            len(PLATFORMS),
            len(missing),
        )
        wrong = int((np.asarray(found["argmaxes"]) != wanted[where]).sum())
        counts.add(f"tokens chosen on {_here()} without the package", wanted[where].size, wrong)


def _here() -> str:
    """The platform that programs run on, as a page names it."""
    return jax.default_backend().upper()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    counts = Counts()
    warnings.simplefilter("ignore", hire.HireRewriteWarning)
    with tempfile.TemporaryDirectory() as folder:
        exported(Path(folder), options.tokens, RULES, counts)
    rows = [
        {"what": k, "tried": tried, "wrong": wrong} for k, (tried, wrong) in counts.rows.items()
    ]
    about = (
        f"A small decoder with a cache, rewritten with {len(RULES)} sets of rules, at batches of "
        f"{BATCHES[0]} and {BATCHES[1]}, {options.tokens} tokens each: exported for "
        f"{', '.join(PLATFORMS)}, and run on {_here()} by a process that has jax alone. Programs "
        "for other platforms are made and loaded, not run."
    )
    result = {"about": about, "rows": rows}
    name = timing.of_backend("reliability_export")
    path = timing.write(name, result, f"python -m benchmarks.exported --tokens {options.tokens}")
    print(path, json.dumps(result["rows"], indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
