"""Try the laws on many random functions, on all cores, and write what came out.

    python -m tests.fuzz                        100,000 functions, from seed 0
    python -m tests.fuzz --graphs 500 --first 7000

What is done is kept in out/fuzz, by commit: a run that was stopped goes on where it was. Every
function is traced, planned and looked at; a share of them is rewritten, and a share of these run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
from pathlib import Path

from tests.fuzz.run import CHUNK, chunk, one, record

_EACH = 8
"""Chunks that a process works on before another takes its place."""

FOLDER = Path(__file__).parents[2] / "out" / "fuzz"


def main() -> int:
    from benchmarks import timing  # after tests.fuzz.run, which sets up jax

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="try one seed again, with all laws")
    options = parser.parse_args()
    if options.seed is not None:
        return one(options.seed)
    folder = FOLDER / str(timing.commit())  # what other code did counts for nothing
    folder.mkdir(parents=True, exist_ok=True)
    results, todo = [], []
    for first in range(options.first, options.first + options.graphs, CHUNK):
        last = min(first + CHUNK, options.first + options.graphs)
        path = folder / f"{first}-{last}.json"
        if path.exists():
            results.append(json.loads(path.read_text(encoding="utf-8")))
        else:
            todo.append((first, last, path))
    context = multiprocessing.get_context("spawn")
    # What a process has compiled comes to gigabytes: new ones now and then. (A pool that replaces
    # its own, max_tasks_per_child, may wait for ever in CPython 3.11.)
    size = _EACH * options.jobs
    for some in (todo[i : i + size] for i in range(0, len(todo), size)):
        with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            running = {pool.submit(chunk, first, last): path for first, last, path in some}
            for done in concurrent.futures.as_completed(running):
                results.append(done.result())
                running[done].write_text(json.dumps(results[-1]) + "\n", encoding="utf-8")
                for seed, law, error, graph in results[-1]["wrong"]:
                    print(f"seed {seed}: {law}: {error}\n  {graph}", flush=True)
    command = f"python -m tests.fuzz --graphs {options.graphs} --first {options.first}"
    made = record(results)
    print(timing.write("reliability_fuzz", made, command))
    return int(bool(made["rows"][0]["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
