"""`bench`: the time of a call, dense and rewritten."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import click
import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hire_rewrite.arguments import check_numbers, with_packed
from hire_rewrite.command.target import Target, command, packed_by, print_json

_WARM_UP = 2


@command
@click.option("--rounds", default=31, show_default=True, type=click.IntRange(1))
@click.option("--calibration", metavar="MODULE:NAME", help="Batches to fit the predictors to.")
@click.option("--json", "as_json", is_flag=True, help="The times as JSON.")
def bench(target: Target, rounds: int, calibration: str | None, as_json: bool) -> None:
    """The time of a call, dense and rewritten, in alternating calls of one process.

    Medians, and their ratio. Each call is waited for, and no argument is
    donated.

    \b
    Examples:
      hire-rewrite bench hire_rewrite.command.demo:model --rule 'Head(k=64, force=True)'
    """
    step = target.step
    check_numbers(target.fn, step.name, target.args, {})
    held = with_packed(target.args, target.weights, packed_by(step, target, calibration))
    sides = {
        "dense": functools.partial(jax.jit(target.fn), *target.args),
        "rewritten": functools.partial(jax.jit(step), *held),
    }
    times = _alternating(sides, rounds, quiet=as_json)
    medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    ratio = medians["dense"] / medians["rewritten"]
    if as_json:
        print_json({"median_ms": medians, "ratio": ratio, "rounds": rounds})
        return
    shown = Table("", "median ms", "least", title=f"{rounds} rounds")
    for name, median in medians.items():
        shown.add_row(name, f"{median:.3f}", f"{1e3 * min(times[name]):.3f}")
    Console().print(shown)
    click.echo(f"rewritten is {ratio:.2f} times as fast")


def _alternating(
    sides: Mapping[str, Callable[[], Any]], rounds: int, *, quiet: bool
) -> dict[str, list[float]]:
    """Seconds of each call; the sides take turns in random order, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order, numbers = random.Random(0), range(-_WARM_UP, rounds)
    for number in track(numbers, "timing", transient=True, disable=quiet):
        for name in order.sample(list(sides), len(sides)):
            start = time.perf_counter()
            jax.block_until_ready(sides[name]())
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times
