"""`python -m hire_rewrite`, and the command `hire-rewrite`."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from hire_rewrite.command import group
    except ModuleNotFoundError as missing:
        from hire_rewrite.errors import EXTRA

        sys.exit(f"hire-rewrite: the command line needs {missing.name}: {EXTRA.format('cli')}")
    group(prog_name="hire-rewrite")


if __name__ == "__main__":
    main()
