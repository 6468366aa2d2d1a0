"""The command line: `hire-rewrite inspect`, `diff`, `draw`, `tune`, `evaluate`, `bench` and `demo`.

Its own libraries (click for arguments, rich for tables) come with the extra `cli`; nothing else in
the package imports this one.
"""

from __future__ import annotations

import click

from hire_rewrite.command.bench import bench
from hire_rewrite.command.demo import demo
from hire_rewrite.command.measure import evaluate, tune
from hire_rewrite.command.see import diff, draw, inspect

__all__ = ["group"]

_HELP = """Look at what hire_rewrite does to a JAX function, and measure it.

TARGET is `package.module:factory`: a function without arguments that returns (fn, args), a JAX
function and the arguments of a call: arrays, or jax.ShapeDtypeStruct where nothing is computed.
The module is looked for in the working directory too.

\b
Exit codes:
  0  done
  1  the package says what is wrong
  2  wrong usage: an option, or a TARGET that is not there
  3  with --fail-on-miss: nothing is rewritten, or a rule fits nothing
"""


@click.group(help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hire-rewrite")
def group() -> None:
    pass


for _command in (inspect, diff, draw, tune, evaluate, bench, demo):
    group.add_command(_command)
