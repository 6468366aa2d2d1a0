"""Many random functions, in parts that processes can share, and what came out of them."""

from __future__ import annotations

import collections
import random
import time
import warnings
from typing import Any

import tests.conftest  # noqa: F401  (before jax starts)
from tests.fuzz.laws import EXECUTED, FOUND, TRACED, holds_for, subject_of
from tests.fuzz.nesting import FORMS

CHUNK = 1000
RARELY = 10
"""One of so many functions is rewritten, and one of so many of these runs."""


def check(seed: int) -> tuple[collections.Counter[str], list[tuple[str, str, str]]]:
    """What was tried on one function, and what went wrong: the law, what happened, the function."""
    from tests.fuzz.grammar import random_graph

    rng = random.Random(seed)
    graph = random_graph(rng)
    laws = dict(FOUND)
    if seed % RARELY == 0:
        laws |= TRACED
    if seed % RARELY**2 == 0:
        laws |= {name: EXECUTED[name] for name in rng.sample(sorted(EXECUTED), 4)}
    try:
        subject = subject_of(graph, seed)
    except Exception as error:  # a fault of the grammar, which ends no run
        message = f"{type(error).__name__}: {error}"
        return collections.Counter(graphs=1), [("JAX takes the function", message, repr(graph))]
    if subject is None:
        return collections.Counter(refused=1), []
    counts = subject.counts
    counts["graphs"] += 1
    counts["nests"] += sum(getattr(step, "form", "") in FORMS for step in graph.walk())
    wrong = []
    for name, law in laws.items():
        if holds_for(name, graph):
            counts[f"law: {name}"] += 1
            try:
                law(subject)
            except Exception as error:
                wrong.append((name, f"{type(error).__name__}: {error}", repr(graph)))
    return counts, wrong


def chunk(first: int, last: int) -> dict[str, Any]:
    """What came out of the seeds from `first` to `last`, that one not included."""
    import jax

    warnings.simplefilter("ignore")
    start, counts, wrong = time.perf_counter(), collections.Counter[str](), []
    for seed in range(first, last):
        more, found = check(seed)
        counts.update(more)
        wrong += [(seed, *item) for item in found]
    jax.clear_caches()
    seconds = time.perf_counter() - start
    return {"first": first, "last": last, "seconds": seconds, "counts": counts, "wrong": wrong}


def record(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of some chunks, as benchmarks/results has it."""
    counts: collections.Counter[str] = collections.Counter()
    wrong: collections.Counter[str] = collections.Counter()
    for result in results:
        counts.update(result["counts"])
        wrong.update(law for _, law, *_ in result["wrong"])
    first, last = min(r["first"] for r in results), max(r["last"] for r in results)
    (found,) = FOUND
    taken = sum("a near miss" in error for r in results for _, _, error, _ in r["wrong"])
    rows = [
        {"what": "random functions traced and planned", "tried": counts["graphs"],
         "wrong": sum(wrong.values()), "note": "laws broken, those below together"},
        {"what": "planted blocks and heads found and rewritten", "tried": counts["planted"],
         "wrong": wrong[found] - taken},
        {"what": "near misses left alone", "tried": counts["near misses"], "wrong": taken},
    ]  # fmt: skip
    contexts = [name for name in EXECUTED if name.startswith("the same under")]
    for name in TRACED | EXECUTED:
        if name not in contexts:
            rows.append({"what": name, "tried": counts[f"law: {name}"], "wrong": wrong[name]})
    rows.append({
        "what": f"the same result under one of {len(contexts)} contexts (x64, precision, ...)",
        "tried": sum(counts[f"law: {name}"] for name in contexts),
        "wrong": sum(wrong[name] for name in contexts),
    })  # fmt: skip
    about = (
        f"Random JAX functions of a grammar (seeds {first} to {last - 1}) with blocks, heads and "
        f"near misses planted in {counts['nests']} calls, loops, branches, maps and derivatives. "
        f"JAX itself refuses {counts['refused']} more; all others are planned; one of {RARELY} is "
        f"rewritten, and one of {RARELY**2} runs under four of the laws of numbers."
    )
    return {"about": about, "rows": [row for row in rows if row["tried"]]}


def one(seed: int) -> int:
    """Try all laws on one seed and print what happened; 1 if any is broken."""
    from tests.fuzz.grammar import random_graph
    from tests.fuzz.laws import broken

    graph = random_graph(random.Random(seed))
    found = list(broken(graph, seed, FOUND | TRACED | EXECUTED))
    print(graph, *found, sep="\n")
    return int(bool(found))
