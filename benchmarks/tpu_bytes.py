"""HBM bytes of programs for TPU, by account: compiled by the real compiler, not run.

    make tpu        # in an environment of its own, with libtpu; no TPU is needed

Decoding is bound by the bytes that are read. They are counted from the compiled programs (see
`benchmarks.hbm`): a decode step of a 1.24 B decoder, blocks and heads alone, blocks without their
zeros, and scoring alone; dense, rewritten in JAX alone, and rewritten with the kernels for TPU.
Written to benchmarks/results/tpu_bytes.json and docs/tpu.md; `tests/tpu` asks for the figures that
matter.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import hire_rewrite as hire
from benchmarks import timing, tpu_relu
from benchmarks.tpu_account import (
    BANDWIDTH,
    CLOCK,
    SIDES,
    Account,
    account,
    mega,
    program,
    rewritten,
    shapes_for,
)
from benchmarks.tpu_models import HEAD, RULES, block, decode, head, selected
from benchmarks.tpu_page import page
from hire_rewrite.ops import narrow
from hire_rewrite.ops.top_k.listed import listed

BATCHES = (1, 4)
PAGE = Path(__file__).parents[1] / "docs" / "tpu.md"


def site_of(path: str) -> str:
    """Which part of the decode step an argument belongs to."""
    parts = {
        "FFN, scoring": ("w_down'].predictor",),
        "FFN": ("w_gate", "w_up", "w_down"),
        "head, scoring": ("embed'].predictor",),
        "head": ("embed",),
        "attention": ("wq", "wk", "wv", "wo"),
    }
    for name, keys in parts.items():
        if any(key in path for key in keys):
            return name
    return "cache and other"


def by_site(found: Account) -> dict[str, int]:
    """Bytes by part of the decode step."""
    total: dict[str, int] = {"cache and other": found.other}
    for path, read in found.reads.items():
        total[site_of(path)] = total.get(site_of(path), 0) + read
    return total


def steps(shape: Callable[..., Any]) -> list[dict[str, Any]]:
    """The decode step, by batch, predictor and side."""
    rows = []
    for batch in BATCHES:
        function, args = decode(shape, batch)
        dense = account(program(function, *args), *args)
        rows.append({"batch": batch, "step": "dense", **figures(dense, dense)})
        for name, rules in RULES.items():
            for side in SIDES:
                run, *given = rewritten(function, args, shape, rules)
                found = account(program(run, *given, side=side), *given)
                row = {"batch": batch, "step": f"{name}, {side}"}
                rows.append({**row, **figures(found, dense)})
                print(rows[-1], flush=True)
    return rows


def alone(shape: Callable[..., Any]) -> list[dict[str, Any]]:
    """A block and a head that are in no loop."""
    rows = []
    for name, build in (("block 2048 → 8192", block), ("head 1024 → 32000", head)):
        function, args = build(shape, 1)
        dense = account(program(function, *args), *args)
        row = {"layer": name, "dense MB": mega(dense.total)}
        for side in SIDES:
            rules = (selected(hire.LowRank(128)), HEAD)
            run, *given = rewritten(function, args, shape, rules)
            row[f"{side} MB"] = mega(account(program(run, *given, side=side), *given).total)
        rows.append(row)
        print(row, flush=True)
    return rows


def scoring(shape: Callable[..., Any]) -> list[dict[str, Any]]:
    """All rows of one of 16 layers, [16384, 2048]: what is moved, and how long XLA's form takes."""
    layers, n, d = 16, 16_384, 2048
    layer = shape(dtype=jnp.int32)
    packed, scale = shape(layers, n, d // 2, dtype=jnp.int8), shape(layers, n, d // 32)
    forms: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "int8": (narrow.matmul, (shape(layers, n, d, dtype=jnp.int8), layer)),
        "int4": (narrow.block_matmul, (packed, scale, layer)),
    }
    rows = []
    for name, (function, args) in forms.items():
        for tokens in (1, 8):
            given = (shape(tokens, d, dtype=jnp.float32), *args)
            plain = account(program(function, *given, side="JAX"), *given)
            mine = account(program(function, *given), *given)
            row = {
                "rows": name,
                "tokens": tokens,
                "JAX MB": mega(plain.total),
                "kernel MB": mega(mine.total),
                "kernel's bytes ms": round(mine.total / BANDWIDTH * 1e3, 3),
                "JAX cycles ms": round(plain.cycles / CLOCK * 1e3, 3),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def lists(shape: Callable[..., Any]) -> list[dict[str, Any]]:
    """Lists of a mask, half as long: by a scatter, and by a sort."""
    rows = []
    for tokens in BATCHES:
        for n in (8192, 16_384):
            mask = shape(tokens, n, dtype=jnp.bool_)
            row: dict[str, Any] = {"tokens": tokens, "neurons": n}
            for side, name in zip(SIDES, ("scatter", "sort"), strict=True):
                compiled = program(functools.partial(listed, k=n // 2), mask, side=side)
                cycles = account(compiled, mask).cycles
                row |= {f"{name}, cycles": cycles, f"{name} µs": round(cycles / CLOCK * 1e6, 1)}
            rows.append(row)
            print(row, flush=True)
    return rows


def relu(shape: Callable[..., Any]) -> list[dict[str, Any]]:
    """Blocks without their zeros."""
    rows = []
    for row in tpu_relu.rows(shape):
        rows.append(row)
        print(row, flush=True)
    return rows


def figures(found: Account, dense: Account) -> dict[str, Any]:
    return {
        "GB": round(found.total / 1e9, 3),
        "of dense": round(found.total / dense.total, 3),
        "ms": round(found.total / BANDWIDTH * 1e3, 2),
        "kernels": found.kernels,
        "scratch MB": mega(found.scratch),
        "sites MB": {name: mega(read) for name, read in sorted(by_site(found).items())},
    }


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "steps": steps,
    "alone": alone,
    "relu": relu,
    "lists": lists,
    "scoring": scoring,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_bytes", description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the others stay as they are"
    )
    parts = parser.parse_args().parts
    shape = shapes_for("v5e")
    versions = {"libtpu": importlib.metadata.version("libtpu"), "jax": jax.__version__}
    written = timing.read("tpu_bytes") if len(parts) < len(PARTS) else {}
    if written and any(written[name] != version for name, version in versions.items()):
        parser.error("other versions made the rest: write all parts")
    result = {**written, **versions} | {part: PARTS[part](shape) for part in parts}
    print(f"written to {timing.write('tpu_bytes', result, 'make tpu')}")
    PAGE.write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
