"""Run a function on batches of arguments and add up what its sites report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.reports import combine
from hire_rewrite.graph.trace import abstract, holds_numbers
from hire_rewrite.settings import is_iterable
from hire_rewrite.sites import MatchedSite


class Numbered(list[Any]):
    """Some batches of a list of the user's, with the numbers that they have there."""

    def __init__(self, batches: Sequence[Any], numbers: Iterable[int]) -> None:
        self.numbers = tuple(numbers)
        super().__init__(batches[number] for number in self.numbers)


def numbers_of(batches: Iterable[Any]) -> Iterable[int]:
    """The numbers of batches, for messages: their places in what the user gave."""
    return batches.numbers if isinstance(batches, Numbered) else itertools.count()


def accumulate(
    what: str,
    batches: Iterable[tuple[Any, ...]],
    example: Sequence[Any] | None,
    prepare: Callable[[tuple[Any, ...]], tuple[Hashable, Any]],
    build: Callable[[Any], Callable[[Any], Any]],
    check: Callable[[str, Any], None] = lambda *_: None,
) -> Any:
    """The sum of the reports of all batches; None if there is no batch.

    Args:
      what: what the batches are, for messages.
      batches: tuples of the arguments after the weights.
      example: those arguments in a call, or None for those of the first batch.
      prepare: a batch to its kind of call, and the operands of the function of that kind.
      build: a kind of call to its function, to be compiled, which returns dictionaries of pytrees
        of sums. Calls of different kinds may report different sites.
      check: given what each batch is called and what it reports; raises HireRewriteError if that
        is not to be added.

    Raises:
      HireRewriteError: a batch has another structure than `example`.
    """
    if not is_iterable(batches):
        raise HireRewriteError(
            f"{what}: a {type(batches).__name__} is given: give tuples of the arguments after the "
            "weights, in a list"
        )
    compiled: dict[Hashable, Callable[[Any], Any]] = {}
    total: dict[str, Any] | None = None
    for number, batch in zip(numbers_of(batches), batches, strict=False):
        if not isinstance(batch, tuple):
            raise HireRewriteError(
                f"{what} {number} is a {type(batch).__name__}: give tuples of the arguments "
                "after the weights"
            )
        example = batch if example is None else example
        _check(f"{what} {number}", batch, example)
        try:
            kind, operands = prepare(batch)
            if kind not in compiled:
                compiled[kind] = jax.jit(build(kind))
            report = jax.tree.map(_in_context, compiled[kind](operands))
        except (TypeError, ValueError) as error:
            shapes = ", ".join(jax.typeof(leaf).str_short() for leaf in jax.tree.leaves(batch))
            error.add_note(f"This was {what} {number}, of {shapes}.")
            raise
        check(f"{what} {number}", report)
        # One batch at a time: programs that run ahead hold their batches, and on host devices their
        # collectives wait for each other's threads.
        total = jax.block_until_ready(report if total is None else _merge(total, report))
    return total


def by_layer(report: Any, site: MatchedSite, *, experts: bool = False) -> Any:
    """A report with one leading axis for shards, scans and experts, as packed arrays have it."""
    region = site.sharding.region
    sharded = region is not None and bool(region.axes)
    axes = len(site.loops) + sharded + (experts and site.experts > 1)

    def merge(leaf: Any) -> Any:
        if sharded:
            leaf = jnp.moveaxis(leaf, region.outer_loops, 0)
        return leaf.reshape(math.prod(leaf.shape[:axes]), *leaf.shape[axes:])

    return jax.tree.map(merge, report)


def _merge(total: Any, report: Any) -> Any:
    """Both reports, combined where both have one."""
    if not isinstance(total, dict):
        return _combined(total, report)
    both = {name: _merge(total[name], report[name]) for name in total if name in report}
    return total | report | both


_combined = jax.jit(combine)


def _in_context(leaf: Any) -> Any:
    """An array of a mesh as the mesh that is set has it, so that sums of it can be taken."""
    here = jax.sharding.get_abstract_mesh()
    if here.empty or not isinstance(leaf.sharding, NamedSharding):
        return leaf
    return jax.device_put(leaf, NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec))


def _check(what: str, batch: Any, example: Sequence[Any]) -> None:
    if len(batch) != len(example):
        raise HireRewriteError(
            f"{what} has {len(batch)} argument(s), but a call has {len(example)} after the "
            "weights: give those alone, without weights"
        )
    for i, (given, wanted) in enumerate(zip(batch, example, strict=True)):
        got: Any = jax.tree.structure(given)
        want: Any = jax.tree.structure(wanted)
        if got != want:
            raise HireRewriteError(
                f"{what} has the structure {got} where the call has {want}, in argument {i} after "
                "the weights: give batches structured as in a call"
            )
        for leaf in jax.tree.leaves(given):
            if not holds_numbers(leaf):
                raise HireRewriteError(
                    f"{what} holds a {type(leaf).__name__} in argument {i} after the weights: give "
                    "arrays, as in a call"
                )
    for a, b in zip(
        map(abstract, jax.tree.leaves(batch)), map(abstract, jax.tree.leaves(example)), strict=True
    ):
        if a.dtype != b.dtype or len(a.shape) != len(b.shape):
            raise HireRewriteError(
                f"{what} holds {a.dtype}{list(a.shape)} where the call has "
                f"{b.dtype}{list(b.shape)}: only leading sizes may differ"
            )
