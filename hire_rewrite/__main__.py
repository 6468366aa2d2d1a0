"""`python -m hire_rewrite calibrate-machine`: measure what decides whether rewriting pays."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from hire_rewrite.cost import machine as machines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hire_rewrite", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    calibrate = commands.add_parser(
        "calibrate-machine",
        help="measure the constants of this machine, for a minute or two, and write them to a file",
    )
    calibrate.add_argument(
        "--out", type=Path, help="the file; by default the user's own, which plans are made by"
    )
    calibrate_machine(parser.parse_args(arguments).out)


def calibrate_machine(out: Path | None) -> None:
    """Measure, print and write the constants of the default backend."""
    os.environ[machines.VARIABLE] = "bytes"  # what is measured does not depend on what was
    from hire_rewrite.measuring import measured  # the rest of the package, only when it is needed

    print("measuring, for a minute or two ...", file=sys.stderr, flush=True)
    found = measured()
    path = machines.file_of(machines.default_name()) if out is None else out
    about = {
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "machine": machines.default_name(),
        "jax": importlib.metadata.version("jax"),
    }
    machines.save(found, path, about)
    print(found)
    print(f"wrote {path}" + ("" if out is None else f"; used with {machines.VARIABLE}={path}"))


if __name__ == "__main__":
    main()
