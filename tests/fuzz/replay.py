"""What rewriting makes of known functions, recorded: what a commit changes is seen.

    python -m tests.fuzz.replay             which rewrites are others than recorded, and one of them
    python -m tests.fuzz.replay --write     record them (with --seeds, those of seeds alone)
    python -m tests.fuzz.replay --print seed/3

The functions are those of the zoo and of some seeds. A record is a digest of the rewritten jaxpr
with numbers for names, for one version of JAX, without kernels. What it was before is computed
again by the commit that wrote the record, in a folder of its own.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax starts
    os.environ["HIRE_REWRITE_KERNELS"] = "0"
    import tests.conftest  # noqa: F401

import jax

import hire_rewrite as hire

RECORD = Path(__file__).parent / "rewrites.json"
ROOT = Path(__file__).parents[2]
SEEDS = 40


def _seed(number: int) -> tuple[Any, Any, tuple[Any, ...], Any]:
    from tests.fuzz.grammar import random_graph
    from tests.fuzz.laws import FEW

    graph = random_graph(random.Random(number))
    return graph, graph.params(number), (graph.tokens(number),), FEW


def _model(model: Any) -> tuple[Any, Any, tuple[Any, ...], Any]:
    from tests.cases import FEW

    built = model.build(jax.numpy.dtype("float32"))
    return built.fn, built.weights, built.args, FEW


def functions(zoo: bool = True) -> dict[str, Callable[[], Any]]:
    """What makes each function with its weights, arguments and rules, by name."""
    made: dict[str, Callable[[], Any]] = {
        f"seed/{number}": lambda number=number: _seed(number) for number in range(SEEDS)
    }
    if zoo:
        from tests.zoo.catalog import MODELS

        made |= {f"zoo/{model}": lambda model=model: _model(model) for model in MODELS}
    return made


def rewritten(make: Callable[[], Any]) -> list[str]:
    """The lines of a rewritten jaxpr, and before them what the plan says of its sites."""
    from tests.fuzz.evaluate import structure

    fn, weights, args, rules = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = hire.transform(fn, *rules, on_miss="ignore")
        shapes = jax.tree.map(jax.typeof, weights)
        weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes)
        sites = [f"{s.name} {s.kind} {s.status}" for s in step.plan(weights, *args).sites]
        return [*sites, *structure(jax.make_jaxpr(step)(step.pack(weights, *args), *args))]


def digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def changed(zoo: bool = True) -> dict[str, str]:
    """The functions whose rewrites are not those recorded, and how: `changed`, `new`, `gone`."""
    known = json.loads(RECORD.read_text(encoding="utf-8"))["rewrites"]
    makes = functions(zoo)
    found = {}
    for name, make in makes.items():
        if name not in known:
            found[name] = "new"
        elif digest(rewritten(make)) != known[name]:
            found[name] = "changed"
    return found | {name: "gone" for name in known.keys() - makes.keys() if zoo}


def recorded_version() -> str:
    """The version of JAX that the record is of."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["jax"]


def _before(name: str) -> list[str]:
    """What a function was rewritten to by the commit that wrote the record."""
    log = ["git", "log", "-1", "--format=%H", "--", str(RECORD)]
    commit = subprocess.run(log, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "tree.tar")
        subprocess.run(["git", "archive", "-o", archive, commit.strip()], cwd=ROOT, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        call = [sys.executable, "-m", "tests.fuzz.replay", "--print", name]
        run = subprocess.run(
            call, cwd=folder, env=os.environ | {"PYTHONPATH": folder}, text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        return run.stdout.splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record the rewrites as they are")
    parser.add_argument("--seeds", action="store_true", help="leave out the zoo")
    parser.add_argument("--print", metavar="NAME", help="print one rewritten jaxpr")
    parser.add_argument("--diff", metavar="NAME", help="which one to print if it changed")
    options = parser.parse_args()
    if options.print:
        print("\n".join(rewritten(functions(options.print.startswith("zoo"))[options.print])))
        return 0
    if options.write:
        makes = functions(zoo=not options.seeds)
        digests = {name: digest(rewritten(make)) for name, make in makes.items()}
        if options.seeds and RECORD.exists():
            digests = json.loads(RECORD.read_text(encoding="utf-8"))["rewrites"] | digests
        record = {"jax": jax.__version__, "rewrites": digests}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{len(digests)} rewrites recorded in {RECORD}")
        return 0
    if recorded_version() != jax.__version__:
        print(f"the record is of jax {recorded_version()}, and this is {jax.__version__}")
        return 0
    found = changed(zoo=not options.seeds)
    for name, how in found.items():
        print(f"{how}: {name}")
    shown = options.diff or next((name for name, how in found.items() if how == "changed"), None)
    if shown:
        after = rewritten(functions(shown.startswith("zoo"))[shown])
        print(
            *difflib.unified_diff(_before(shown), after, "recorded", shown, lineterm=""), sep="\n"
        )
    print(f"{len(found)} of the rewrites are not as recorded" if found else "as recorded")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
