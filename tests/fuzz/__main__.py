"""Try the laws on many random functions, on all cores, and write what came out.

    python -m tests.fuzz                        100,000 functions, from seed 0
    python -m tests.fuzz --graphs 500 --first 7000

What is done is kept in out/fuzz, by commit: a run that was stopped goes on where it was. Every
function is traced, planned and looked at; a share of them is rewritten, and a share of these run.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tests.fuzz.pool import chunks, pooled
from tests.fuzz.run import CHUNK, chunk, one, record

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
    paths = {
        seeds: folder / "{}-{}.json".format(*seeds)
        for seeds in chunks(options.first, options.graphs, CHUNK)
    }
    todo = [seeds for seeds, path in paths.items() if not path.exists()]
    for seeds, result in pooled(chunk, todo, options.jobs):
        paths[seeds].write_text(json.dumps(result) + "\n", encoding="utf-8")
        for seed, law, error, graph in result["wrong"]:
            print(f"seed {seed}: {law}: {error}\n  {graph}", flush=True)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths.values()]
    command = f"python -m tests.fuzz --graphs {options.graphs} --first {options.first}"
    made = record(results)
    print(timing.write("reliability_fuzz", made, command))
    return int(bool(made["rows"][0]["wrong"]))


if __name__ == "__main__":
    raise SystemExit(main())
