"""Write docs/coverage.md: what is found and rewritten in each model of the zoo.

python -m tests.zoo.coverage docs/coverage.md
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import hire_rewrite as hire
from hire_rewrite.patterns.refusal import Refusal
from tests.zoo.model import Model

HEADER = """# What is found in which models

Written by `make docs`; `make test` checks that it is current, on every version of jax.

The models are those of `tests/zoo/`: built with the libraries themselves at tiny sizes, each as its
public original is written. An FFN under a `scan` is one site. Every site is asked for with rules
that accept any size, so a site that is not rewritten has the reason beside it, and so have layers
that were rejected because sites of their form are not supported; a model without sites shows the
nearest miss.

| library | model | form | FFNs | heads | rewritten | left dense, rejected, or nearest miss |
| --- | --- | --- | --- | --- | --- | --- |
"""


def row(model: Model, plan: hire.Plan) -> str:
    kinds = Counter(site.kind for site in plan.sites)
    rewritten = sum(site.status == "rewritten" for site in plan.sites)
    dense = Counter(site.reason for site in plan.sites if site.status != "rewritten")
    rejected = Counter(r.reason for r in plan.rejected if r.refusal is Refusal.UNSUPPORTED)
    reasons = [f"{count}: {reason}" for reason, count in dense.items()]
    reasons += [f"{count} rejected: {reason}" for reason, count in rejected.items()]
    why = "; ".join(reasons)
    if not plan.sites and plan.rejected:
        why = f"{plan.rejected[0].name}: {plan.rejected[0].reason}"
    cells = [model.library, model.name, model.form, kinds["ffn"], kinds["head"], rewritten, why]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def document(rows: Iterable[str]) -> str:
    """The page of these rows, in order, with their sums."""
    ordered = sorted(rows, key=lambda row: "/".join(row.split(" | ")[:3]).lower())
    ffns, heads, rewritten = (
        sum(int(row.split(" | ")[column]) for row in ordered) for column in (3, 4, 5)
    )
    foot = (
        f"\n{len(ordered)} models: {ffns} FFNs and {heads} heads, "
        f"{rewritten} of {ffns + heads} sites rewritten.\n"
    )
    return HEADER + "\n".join(ordered) + "\n" + foot


def plan_of(model: Model) -> hire.Plan:
    import jax.numpy as jnp

    from tests.cases import FULL

    one = model.build(jnp.dtype("float32"))
    return hire.inspect(one.fn, one.weights, *one.args, rules=FULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    # As in the test run: some models are spread over two devices.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    from tests.zoo.catalog import MODELS

    parser.parse_args().file.write_text(document(row(model, plan_of(model)) for model in MODELS))


if __name__ == "__main__":
    main()
