"""What the commands have in common: a function from a module, rules from text, and exit codes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import click

from hire_rewrite.api import transform
from hire_rewrite.arguments import with_packed, without_weights
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.packed import Packed
from hire_rewrite.plan import Plan
from hire_rewrite.rules import Rule
from hire_rewrite.saved import load_rules, rule_types
from hire_rewrite.transformed import Transformed

MISSED = 3


@dataclasses.dataclass(frozen=True)
class Target:
    """A function, the arguments of a call, and how it is to be rewritten.

    Attributes:
      fn, args: what the factory returned.
      rules: those of the options, the explicit ones first.
      weights: positions of the arguments that hold weights.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    rules: tuple[Rule, ...]
    weights: tuple[int, ...]

    @property
    def step(self) -> Transformed:
        return transform(self.fn, *self.rules, weights=self.weights)

    def call(self, *, pack: bool, on_miss: str = "warn") -> tuple[Transformed, list[Any]]:
        """The transformed function and the arguments of its call.

        Args:
          pack: whether a `Packed` stands where the weights stood.
        """
        step = transform(self.fn, *self.rules, weights=self.weights, on_miss=on_miss)
        args = list(self.args)
        return step, with_packed(args, self.weights, step.pack(*args)) if pack else args

    @property
    def params(self) -> Any:
        """The arguments that hold weights, as `Transformed.tune` wants them."""
        held = tuple(self.args[i] for i in self.weights)
        return held[0] if len(held) == 1 else held


def command(function: Callable[..., None]) -> Any:
    """A command with the TARGET and the options that all have; it is given a `Target` first."""

    @functools.wraps(function)
    def run(
        target: str, rule: tuple[str, ...], rules: tuple[str, ...], weights: str, **options: Any
    ) -> None:
        try:
            found = _target(target, rule, rules, weights)
            function(found, **options)
        except HireRewriteError as error:
            click.echo(f"hire-rewrite: {error}", err=True)
            sys.exit(1)

    for option in reversed(_OPTIONS):
        run = option(run)
    return click.command(run)


def load(what: str, name: str) -> Any:
    """The attribute `package.module:name`; modules of the working directory are found too.

    Raises:
      click.BadParameter: there is none.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise click.BadParameter(
            f"{name!r} is not of the form package.module:name", param_hint=what
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module}.".startswith(f"{missing.name}."):
            raise  # one of the module's own imports
        raise click.BadParameter(f"there is no module {missing.name}", param_hint=what) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise click.BadParameter(f"{module} has no {attribute}", param_hint=what)
        found = getattr(found, part)
    return found


def _made(what: str, name: str) -> Any:
    """What the function `package.module:name` returns, called without arguments.

    Raises:
      click.BadParameter: there is none, or it cannot be called so.
    """
    found = load(what, name)
    if not callable(found):
        raise click.BadParameter(
            f"{name} is a {type(found).__name__}, and is to be a function that returns it",
            param_hint=what,
        )
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise click.BadParameter(
            f"{name} is called without arguments, and has some that are required ({error}): give "
            "them defaults, or name a function that has none",
            param_hint=what,
        ) from None
    except ValueError:  # it does not tell
        pass
    return found()


def parsed_rule(text: str) -> Rule:
    """The rule that is written as in Python, `FFN(k=0.05, tail="predicted")`. Nothing is executed.

    Raises:
      click.BadParameter: it is not a rule.

    Examples:
      >>> parsed_rule('Head(k=32, predictor=Quantized(4))')
      Head(k=32, predictor=Quantized(bits=4))
    """
    try:
        rule = _built(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        raise click.BadParameter(f"{text}: {error}", param_hint="--rule") from None
    if not isinstance(rule, Rule):
        raise click.BadParameter(f"{text} is not a rule", param_hint="--rule")
    return rule


def batches_of(name: str | None, target: Target) -> Iterable[tuple[Any, ...]]:
    """The batches of `--batches`, tuples of the arguments after the weights; or else the call's."""
    if name is None:
        return [without_weights(target.args, target.weights)]
    return _made("--batches", name)


def packed_by(step: Transformed, target: Target, calibration: str | None) -> Packed:
    """The target's weights, fitted to the batches of `--calibration` if it is given."""
    fitted = None if calibration is None else _made("--calibration", calibration)
    return step.pack(*target.args, calibration=fitted)


def fail_if_missed(plan: Plan) -> None:
    """Exit with MISSED if nothing is rewritten, or a rule fits nothing."""
    for rule in plan.unused_rules:
        click.echo(f"hire-rewrite: {rule} fits nothing", err=True)
    if not any(site.status == "rewritten" for site in plan.sites):
        click.echo("hire-rewrite: nothing is rewritten", err=True)
    elif not plan.unused_rules:
        return
    sys.exit(MISSED)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, default=str))


def _target(target: str, rules: Iterable[str], files: Iterable[str], weights: str) -> Target:
    made = _made("TARGET", target)
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]):
        _wrong(target, f"returned {type(made).__name__}")
    fn, args = made
    if not isinstance(args, tuple | list):
        _wrong(target, f"returned {type(args).__name__} for the arguments")
    every = [parsed_rule(text) for text in rules]
    for file in files:
        every += load_rules(file)
    try:
        positions = tuple(int(part) for part in weights.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(
            f"{weights!r}: give positions of arguments, as 0,2", param_hint="--weights"
        ) from None
    return Target(fn, tuple(args), tuple(every), positions)


def _wrong(target: str, what: str) -> NoReturn:
    raise click.BadParameter(
        f"{target} {what}: it has to return (fn, args), a function and a tuple of its arguments",
        param_hint="TARGET",
    )


def _built(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    types = rule_types()
    if name not in types:
        raise ValueError(f"there is no {name}, only {', '.join(types)}")
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("** cannot be used here")
    settings = {str(keyword.arg): _built(keyword.value) for keyword in node.keywords}
    return types[name](*map(_built, node.args), **settings)


_OPTIONS = (
    click.argument("target"),
    click.option(
        "--rule", multiple=True, metavar="RULE", help="""As in Python: 'FFN(k=0.05)'. Repeatable."""
    ),
    click.option(
        "--rules",
        multiple=True,
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        help="Rules that tune or save_rules wrote. Repeatable.",
    ),
    click.option(
        "--weights",
        default="0",
        show_default=True,
        metavar="I,J",
        help="Positions of the arguments that hold weights.",
    ),
)
