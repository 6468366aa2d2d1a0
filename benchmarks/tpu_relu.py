"""Blocks without their zeros on TPU, by account: of each token the rows of as many neurons as are
expected, and beside them those of a full list.

A kernel declares what it reads at most, all places of its lists; it stops where a list ends. So
from what is counted the rows behind the end are taken away. In JAX alone a whole list is gathered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
from jax import lax

import hire_rewrite as hire
from benchmarks.tpu_account import (
    SIDES,
    Account,
    account,
    mega,
    planning_for,
    program,
    rewritten,
)
from hire_rewrite.ops.predictors import Predictor
from hire_rewrite.sites.ffn import positive_sizes

LAYERS = 4
BATCHES = (1, 4)
BUDGET = 0.5
"""Of a token's neurons, the default where nobody has calibrated."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to know which neurons are zero.

    Attributes:
      name: as the page has it.
      read: the share of neurons of which rows are read, by the width of the model and the share
        that is positive: docs/relu.md has measured it.
    """

    name: str
    predictor: Predictor | None
    read: dict[tuple[int, float], float]


SIZES, SHARES = (2048, 4096), (0.1, 0.2)
FORMS = (
    Form("told", None, {(d, share): share for d in SIZES for share in SHARES}),
    Form(
        "proved from 8 bits",
        hire.Quantized(8),
        {(2048, 0.1): 0.179, (2048, 0.2): 0.316, (4096, 0.1): 0.230, (4096, 0.2): 0.382},
    ),
)


def block(shape: Callable[..., Any], batch: int, d: int) -> Any:
    """Blocks of 4 d neurons one after the other, in a loop, and their arguments in bfloat16."""
    weights = {
        "up": shape(LAYERS, d, 4 * d),
        "bias": shape(LAYERS, 4 * d),
        "down": shape(LAYERS, 4 * d, d),
    }

    def run(w: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> tuple[Any, None]:
            return x + jax.nn.relu(x @ w["up"] + w["bias"]) @ w["down"], None

        return lax.scan(layer, x, w)[0]

    return run, (weights, shape(batch, d))


def rule(form: Form, *, force: bool) -> hire.FFN:
    return hire.FFN(k="positive", predictor=form.predictor, force=force)


@dataclasses.dataclass(frozen=True)
class Block:
    """What one layer moves, in bytes.

    Attributes:
      expected: with the rows of as many neurons of each token as are expected.
      full: with those of a full list.
      scratch: what the program needs in HBM beside arguments and results, reading all rows
        included.
    """

    dense: int
    expected: float
    full: float
    scratch: int


def counted(shape: Callable[..., Any], form: Form, d: int, share: float, batch: int) -> Any:
    """A `Block` for each side, by its name."""
    function, args = block(shape, batch, d)
    dense = account(program(function, *args), *args)
    sides = {}
    for side in SIDES:
        with planning_for("tpu v5e"):
            run, *given = rewritten(function, args, shape, [rule(form, force=True)])
            compiled = program(run, *given, side=side)
        # `branch_1` reads all rows, where a token has more than the budget.
        found = account(compiled, *given, unless="branch_1_fun")
        behind = 0 if side == "JAX" else (BUDGET - form.read[d, share]) * 4 * d
        rows = behind * batch * row_bytes(found, d)
        sides[side] = Block(
            dense.total // LAYERS, found.total / LAYERS - rows, found.total / LAYERS, found.scratch
        )
    return sides


def row_bytes(found: Account, d: int) -> int:
    """Bytes of a neuron's rows in the matrices of which single ones are read."""
    fetched = [path for path in found.reads if path.endswith("['words']")]
    return 2 * d * len(fetched)


def pays(shape: Callable[..., Any], form: Form, d: int, share: float, batch: int) -> bool:
    """Whether the block is rewritten on a v5e, without `force`, where such a share is positive."""
    function, args = block(shape, batch, d)
    with planning_for("tpu v5e"), mock.patch.object(positive_sizes, "SHARE", share):
        (site,) = hire.inspect(function, *args, rules=[rule(form, force=False)]).sites
    return bool(site.status == "rewritten")


def rows(shape: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """One for each block, share, batch and form."""
    for d in SIZES:
        for share in SHARES:
            for batch in BATCHES:
                for form in FORMS:
                    sides = counted(shape, form, d, share, batch)
                    plain, mine = (sides[side] for side in SIDES)
                    yield {
                        "block": f"{d} / {4 * d}",
                        "positive": f"{share:.0%}",
                        "tokens": batch,
                        "form": form.name,
                        "rows read": f"{form.read[d, share]:.1%}",
                        "dense MB": mega(mine.dense),
                        "JAX, full list MB": mega(math.ceil(plain.full)),
                        "kernels, full list MB": mega(math.ceil(mine.full)),
                        "**kernels, expected MB**": mega(math.ceil(mine.expected)),
                        "of dense": f"{mine.expected / mine.dense:.0%}",
                        "default": "rewritten" if pays(shape, form, d, share, batch) else "dense",
                    }
