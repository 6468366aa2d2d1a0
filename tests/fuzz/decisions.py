"""A guess decides nothing: random code behind a head returns the same integers and conditions.

    python -m tests.fuzz.decisions                     20,000 programs, from seed 0
    python -m tests.fuzz.decisions --seed 7            one of them

Guesses are made coarse (4 bits), so that who decides by one is seen to err. A few tokens of each
call are far likelier than all others: they are always among the candidates, and nearly the whole
sum of a softmax, which docs/limits.md allows to be a guess. (Who draws by it, or counts what makes
nine tenths, reads the logits themselves: behind others all may be equally likely.) Programs whose
dense results change with the last digits of the logits, as where equal numbers are ranked, prove
nothing.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import warnings
from typing import Any

import tests.conftest  # noqa: F401  (before jax starts)
from tests.fuzz.pool import chunks, pooled

T, D, LIKELY = 32, 32, 24
CHUNK = 200


def trial(seed: int) -> tuple[str, str]:
    """What came of one program: dense, deep, shaky, right, or wrong; and why, or the program."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import hire_rewrite as hire
    from tests.fuzz.around import FORMS, plain
    from tests.fuzz.behind import random_program

    rng = random.Random(seed)
    program = random_program(rng)
    form = rng.choice(FORMS) if rng.random() < 0.5 else plain
    params, x, tokens = _inputs(seed)

    transposed = rng.random() < 0.3

    def model(params: Any, x: Any, tokens: Any, nearly: float = 1.0) -> Any:
        def logits_of(x: Any) -> Any:
            head = params["head"]
            if nearly != 1:  # of sums that are a bit different before they are rounded
                numbers = nearly * (jnp.float32(x) @ jnp.float32(head))
                return numbers.astype(head.dtype)
            return jnp.einsum("...d,vd->...v", x, head.T) if transposed else x @ head

        return jax.tree.leaves(form(program, logits_of, x, tokens))

    rule = hire.Head(predictor=hire.Quantized(4), force=True)
    step = hire.transform(model, rule, on_miss="ignore")
    plan = step.plan(params, x, tokens)
    if not plan.rewritten:
        return "dense", " ".join(site.reason for site in plan.sites)
    if any("the program reads" in site.reason for site in plan.sites):
        return "deep", ""
    dense = jax.jit(model, static_argnums=3)
    expected = dense(params, x, tokens)
    if not all(_equal(expected, dense(params, x, tokens, 1 + a)) for a in (-1e-6, 1e-6)):
        return "shaky", ""
    results = jax.jit(step)(step.pack(params, x, tokens), x, tokens)
    if _equal(expected, results):
        return "right", ""
    wrong = [
        int((np.asarray(a) != np.asarray(b)).sum()) for a, b in zip(expected, results, strict=True)
    ]
    return "wrong", f"{wrong} of {[a.size for a in expected]}: {form.__name__} {program}"


def _equal(one: Any, other: Any) -> bool:
    import numpy as np

    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _inputs(seed: int) -> tuple[Any, Any, Any]:
    """Weights of which a few rows are far greater for every token, the tokens, and others."""
    import jax.numpy as jnp
    import numpy as np

    from tests.fuzz.operations import V

    rng = np.random.default_rng(seed)
    head = rng.normal(size=(D, V)) / np.sqrt(D)
    head[0] = 0
    likely = rng.choice(V, LIKELY, replace=False)
    head[0, likely] = 12 + rng.normal(size=LIKELY)
    x = rng.normal(size=(T, D))
    x[:, 0] = 1
    tokens = rng.integers(0, V, T)
    dtype = jnp.bfloat16 if seed % 4 == 0 else jnp.float32
    return {"head": jnp.asarray(head, dtype)}, jnp.asarray(x, dtype), jnp.asarray(tokens)


def chunk(first: int, last: int) -> dict[str, Any]:
    """What came of the seeds from `first` to `last`, that one not included."""
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for seed in range(first, last):
        try:
            outcome, told = trial(seed)
        except Exception as error:
            outcome, told = "wrong", f"{type(error).__name__}: {error}"
        counts[outcome] += 1
        if outcome == "wrong":
            wrong.append((seed, told))
    return {"counts": counts, "wrong": wrong}


def main() -> int:
    from benchmarks import timing

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="try one seed again")
    options = parser.parse_args()
    if options.seed is not None:
        outcome, told = trial(options.seed)
        print(outcome, told)
        return int(outcome == "wrong")
    todo = chunks(options.first, options.programs, CHUNK)
    counts: collections.Counter[str] = collections.Counter()
    for _, result in pooled(chunk, todo, options.jobs):
        counts.update(result["counts"])
        for seed, told in result["wrong"]:
            print(f"seed {seed}: {told}", flush=True)
    about = (
        f"Random code behind a head (seeds {options.first} to {todo[-1][1] - 1}) that sorts, "
        "masks, counts, looks up and compares its logits, in loops, branches and maps, guessed in "
        "4 bits; one of four in bfloat16. "
        f"{counts['dense']:,} programs stay dense, as a guess could decide something, "
        f"{counts['deep']:,} read more of the greatest than were made exact, and the results of "
        f"{counts['shaky']:,} depend on the last digits."
    )
    rows = [
        {"what": "integers and conditions of the rewritten program, as the dense one's",
         "tried": counts["right"] + counts["wrong"], "wrong": counts["wrong"]},
    ]  # fmt: skip
    command = f"python -m tests.fuzz.decisions --programs {options.programs}"
    print(timing.write("reliability_decisions", {"about": about, "rows": rows}, command))
    return int(bool(counts["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
