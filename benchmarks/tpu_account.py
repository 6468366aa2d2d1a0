"""Programs for TPU, compiled by the real compiler without a TPU, and the bytes that they move."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu would look for a TPU, and for its host
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import hire_rewrite as hire
from benchmarks.hbm import Traffic, traffic
from hire_rewrite.cost import machine as machines
from hire_rewrite.rules import Rule

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
BANDWIDTH = 819e9  # bytes per second, of a v5e
CLOCK = 1.5e9  # cycles per second, of a v5e
SIDES = ("JAX", "kernels")


@dataclasses.dataclass(frozen=True)
class Account:
    """What a program moves in one call.

    Attributes:
      reads: bytes read of each argument that is read at all, by its path.
      other: bytes that are written, and read of what is no argument.
      kernels: how many calls of kernels the program's text has.
      scratch: bytes that it needs in HBM beside arguments and results.
      cycles: what the compiler thinks that all but the kernels takes.
    """

    reads: dict[str, int]
    other: int
    kernels: int
    scratch: int
    cycles: int

    @property
    def total(self) -> int:
        return sum(self.reads.values()) + self.other


def shapes_for(chip: str) -> Callable[..., jax.ShapeDtypeStruct]:
    """Makes arguments on one chip: `shapes_for("v5e")(2, 3, dtype=jnp.int8)`."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
    sharding = SingleDeviceSharding(device)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    return shape


def program(function: Callable[..., Any], *args: Any, side: str = "kernels") -> Any:
    """The compiled program, with the kernels or in JAX alone."""
    with mock.patch.dict(os.environ, HIRE_REWRITE_KERNELS="1" if side == "kernels" else "0"):
        lowered = jax.jit(lambda *args: function(*args), keep_unused=True).trace(*args)
        return lowered.lower(lowering_platforms=("tpu",)).compile()


def account(compiled: Any, *args: Any, unless: str = "") -> Account:
    """The account of a program that `program` compiled for these arguments.

    Args:
      unless: a name that the code of a branch has, which is not counted: otherwise of a conditional
        all branches are.
    """
    text = compiled.as_text() or ""
    leaves = jax.tree_util.tree_leaves_with_path(args)
    found: Sequence[Traffic] = traffic(text)
    if unless:
        left_out = {one.choice for one in found if one.choice and unless in one.scope}
        found = [one for one in found if one.choice not in left_out]
    reads: dict[str, int] = {}
    for one in found:
        if one.argument is not None:
            path = jax.tree_util.keystr(leaves[one.argument][0])
            reads[path] = reads.get(path, 0) + one.read
    return Account(
        reads,
        sum(one.written + (one.read if one.argument is None else 0) for one in found),
        text.count('custom_call_target="tpu_custom_call"'),
        compiled.memory_analysis().temp_size_in_bytes,
        sum(one.cycles for one in found),
    )


@contextlib.contextmanager
def planning_for(name: str) -> Iterator[None]:
    """Plans are for a machine that the package knows by name."""
    with mock.patch.dict(os.environ, {machines.VARIABLE: name}):
        machine = machines.current.__wrapped__()
    with mock.patch.object(machines, "current", return_value=machine):
        yield


def rewritten(
    function: Any, args: Sequence[Any], shape: Callable[..., Any], rules: Sequence[Rule]
) -> tuple[Any, ...]:
    """The rewritten function, and its arguments with the shapes of a `Packed`."""
    run = hire.transform(function, *rules)
    packed = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=leaf.dtype), run.pack(*args))
    return run, packed, *args[1:]


def mega(size: int) -> float:
    return round(size / 1e6, 1)
