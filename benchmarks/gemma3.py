"""Gemma 3 270M with its weights read in other ways: how fast is a decode step, what does it say?

`python -m benchmarks.gemma3` measures, and writes `results/gemma3.json`:

* grids: what holds each matrix of the file exactly, by the way in which the file quantizes it;
* step: the time of a decode step and what it says on texts, dense, by all rules of SIDES, and of
  llama.cpp on the same file; and the time of reading prompts at once.

With fewer rounds or shorter texts it is a quick look, and nothing is written. Nothing is measured
where the weights are not installed: they are under the Gemma Terms of Use.
"""

import argparse
import functools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import ReaderTensor, dequantize

import hire_rewrite as hire
from benchmarks import quality, timing, whole_step
from examples.gemma3 import model, tokenizer, weights
from examples.smollm2 import calibration, demo, text
from hire_rewrite.ops.encodings import narrowest
from hire_rewrite.plan import table
from hire_rewrite.rules import Rule

STREAMS, STREAM = 64, 32  # of the text that rules are fitted to: how many, and how long
SIDES: dict[str, tuple[Rule, ...]] = {
    "no rules": (),
    "8 bits": (
        hire.Linear(path="embed"),  # it is on such a grid
        hire.Linear(encoding=hire.Blocks(8), round_inputs=True, force=True),
    ),
    "8 bits, exact parts": whole_step.everything(hire.Blocks(8), neurons=0.02, inputs=0.02),
    "4 bits": whole_step.everything(hire.Blocks(4, minimum=True), neurons=0, inputs=0),
}
"""What is rewritten, by name: to add a way is to add a line."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemma3", description=__doc__)
    for name, most, what in (
        ("rounds", whole_step.ROUNDS, "in which a step is timed"),
        ("length", whole_step.LENGTH, "of the texts that a step reads, in tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, default=most, help=f"{what} (%(default)s)")
    asked = parser.parse_args()
    try:
        weights.find()
    except FileNotFoundError as error:
        print(f"nothing is measured: {error}")
        return
    result = {
        "model": "Gemma 3 270M, float32",
        "rules": {name: [str(rule) for rule in rules] for name, rules in SIDES.items()},
        "calibration": f"{STREAMS} streams of {STREAM} tokens of Python's help topics",
        "grids": grids(),
        "step": step(asked.rounds, asked.length),
    }
    if asked == parser.parse_args([]):
        command = " ".join(["python -m benchmarks.gemma3", *sys.argv[1:]])
        print(f"\nwritten to {timing.write('gemma3', result, command)}")


def grids() -> list[dict[str, Any]]:
    """What holds the matrices of the file exactly, of each name and way to quantize it.

    Without rules a step has one encoding for a matrix of all layers. Where their ways differ, it is
    `together`, and `encoding` is that of the layers of one way.
    """
    rows = []
    for name, tensors in _matrices().items():
        ways = {tensor.tensor_type: None for tensor in tensors}
        together = _exact(tensors)
        for way in ways:
            some = [tensor for tensor in tensors if tensor.tensor_type == way]
            alone = together if len(ways) == 1 else _exact(some)
            rows.append(
                {
                    "tensor": name,
                    "type": way.name,
                    "count": len(some),
                    "file_bytes": int(sum(tensor.n_bytes for tensor in some)),
                    "encoding": alone and str(alone[0]),
                    "bytes": alone[1] if alone else 4 * _numbers(some),
                    "together": together and str(together[0]),
                }
            )
    header = ["tensor", "type", "matrices", "MB in the file", "MB", "exactly held by",
              "all layers by"]  # fmt: skip
    print(table([header, *(_grid_cells(row) for row in rows)]), flush=True)
    return rows


def _matrices() -> Mapping[str, list[ReaderTensor]]:
    """The matrices of the file, those of all layers under one name."""
    found = defaultdict(list)
    for tensor in weights.read().tensors:
        if len(tensor.shape) == 2:
            name = tensor.name.removesuffix(".weight")
            found[name.split(".")[-1] if name.startswith("blk.") else name].append(tensor)
    return found


def _exact(tensors: list[ReaderTensor]) -> tuple[Any, int] | None:
    """The encoding that holds all numbers of the tensors exactly, and its bytes; None if there is
    none."""
    rows = np.stack([dequantize(tensor.data, tensor.tensor_type) for tensor in tensors])
    found = narrowest(rows)
    return found and (found[0], len(rows) * found[0].bytes(*rows.shape[1:]))


def _numbers(tensors: list[ReaderTensor]) -> int:
    return int(sum(tensor.n_elements for tensor in tensors))


def _grid_cells(row: Mapping[str, Any]) -> list[str]:
    sizes = [f"{row[size] / 1e6:.1f}" for size in ("file_bytes", "bytes")]
    held = [row[what] or "float32" for what in ("encoding", "together")]
    return [row["tensor"], row["type"], str(row["count"]), *sizes, *held]


def step(rounds: int, length: int) -> dict[str, Any]:
    """Time and quality of a decode step, dense and rewritten, and of llama.cpp; prompts."""
    params, config = weights.load()
    words = tokenizer.load()
    (first,) = words.encode(tokenizer.BOS).ids
    decode_step = functools.partial(model.decode_step, config)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    dense = jax.jit(decode_step, donate_argnums=2)
    side = functools.partial(whole_step.jax_side, config, first)
    sides, exact, narrow = {"dense": side(dense, params, whole)}, {}, {}
    fitting = text.help_text(STREAMS * STREAM, words)
    for name, rules in SIDES.items():
        fitted = _calls(params, config, fitting, first)
        run, packed, plan = whole_step.rewrite(decode_step, rules, params, config, fitted)
        size = demo.weight_bytes(params, plan)[1]
        sides[name] = side(run, packed, size)
        narrow[name] = rules, packed
        if not rules:
            exact = _say(plan, whole, size)
    forward = jax.jit(functools.partial(model.forward, config))
    texts = {kind: rows[0, :length] for kind, rows in quality.texts(words, first)[1].items()}
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        weights.join(file)
        measured = whole_step.measure(
            sides,
            texts,
            lambda tokens: forward(params, jnp.asarray(tokens)[None])[0],
            rounds,
            first=first,
            path=Path(file.name),
            size=int(sum(tensor.n_bytes for tensor in weights.read().tensors)),
        )
    prefill = functools.partial(model.prefill, config)
    read = whole_step.prompts(prefill, params, narrow, config, fitting, rounds)
    return {"without rules": exact, **measured, "prompts": read}


def _calls(
    params: model.Params, config: model.Config, tokens: np.ndarray, first: int
) -> Iterator[Any]:
    """What rules are fitted to: calls of the step on tokens: i32[n]."""
    prefill = jax.jit(functools.partial(model.prefill, config), donate_argnames="cache")
    return calibration.streams(prefill, params, config, tokens, STREAMS, STREAM, first)


def _say(plan: hire.Plan, before: int, after: int) -> dict[str, int]:
    """How much a step without rules reads in fewer bytes."""
    found = sum(site.status == "rewritten" for site in plan.sites)
    print(f"\nwithout rules\n{plan}")
    print(f"{found} sites from the same numbers in fewer bytes: {before / 1e6:.1f} MB dense, "
          f"{after / 1e6:.1f} MB", flush=True)  # fmt: skip
    return {"sites": found, "bytes_before": before, "bytes_after": after}


if __name__ == "__main__":
    main()
