"""`inspect`, `diff` and `draw`: what would be rewritten, and how the graph would look."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hire_rewrite.command.target import Target, command, fail_if_missed
from hire_rewrite.files import check_writable, write
from hire_rewrite.plan import (
    Plan,
    grouped_rejections,
    grouped_sites,
    megabytes_read,
    sizes_of,
)

_PACK = click.option(
    "--pack", is_flag=True, help="Look at the numbers first, as packing does: for no rules."
)


def _shown(plan: Plan) -> None:
    """Print in colors what `str(plan)` has, each reason below what it is for."""
    console = Console(highlight=False)
    for name, (site, *others) in grouped_sites(plan.sites):
        number = 1 + len(others)
        read = megabytes_read(site, number) or "0.0"
        runs = f" × {number * site.repeats}" if number * site.repeats > 1 else ""
        expected = "" if site.expected is None else f", expected {site.expected:.2f} × as fast"
        style = "bold green" if site.status == "rewritten" else "bold yellow"
        console.print(
            Text.assemble(
                (f"{name}{runs}", style),
                f"  {site.kind} {sizes_of(site)}, {read} MB{expected}",
            )
        )
        console.print(Padding(Text(f"{site.status}: {site.reason}"), (0, 0, 0, 4)))
    for name, (item, *_) in grouped_rejections(plan.rejected):
        shape = " × ".join(map(str, item.shape))
        console.print(Text.assemble((name, "bold"), f"  in no site, {shape}, {item.source}"))
        console.print(Padding(Text(item.reason), (0, 0, 0, 4)))
    for name in plan.opaque:
        console.print(Text(f"not looked into, though products are inside: {name}"))
    for hint in plan.hints:
        console.print(Text(hint, "bold red"))
    for rule in plan.unused_rules:
        console.print(Text(f"unused rule: {rule}", "bold red"))


@command
@_PACK
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
@click.option(
    "--fail-on-miss",
    is_flag=True,
    help="Exit with 3 if nothing is rewritten, or a rule fits no site.",
)
def inspect(target: Target, pack: bool, as_json: bool, fail_on_miss: bool) -> None:
    """Which layers would be rewritten, and why others would not.

    \b
    Examples:
      hire-rewrite inspect hire_rewrite.command.demo:model --rule 'Head(k=64, force=True)'
    """
    step, args = target.call(pack=pack, on_miss="ignore")
    plan = step.plan(*args)
    if as_json:
        click.echo(plan.to_json())
    elif sys.stdout.isatty():
        _shown(plan)
    else:
        click.echo(str(plan))
    if fail_on_miss:
        fail_if_missed(plan)


@command
@_PACK
@click.option("--json", "as_json", is_flag=True, help="The diff as JSON.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write it as a page of its own.")
def diff(target: Target, pack: bool, as_json: bool, html: str | None) -> None:
    """The jaxpr before and after.

    \b
    Examples:
      hire-rewrite diff hire_rewrite.command.demo:model --rule 'Head(k=64, force=True)'
    """
    if html is not None:
        check_writable("diff", html)
    step, args = target.call(pack=pack)
    found = step.diff(*args)
    if html is not None:
        write("diff", html, found.to_html() + "\n")
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(found.to_json())
    elif html is None:
        click.echo(str(found) or "nothing is rewritten; `hire-rewrite inspect` says why")


@command
@_PACK
@click.option(
    "--output", "-o", default="plan.svg", show_default=True, type=click.Path(dir_okay=False),
    help="A file that ends in .svg or .png.",
)  # fmt: skip
def draw(target: Target, pack: bool, output: str) -> None:
    """A drawing of the plan: the layers, and what each reads before and after.

    It needs matplotlib: pip install '.[plot]' in a checkout.

    \b
    Examples:
      hire-rewrite draw hire_rewrite.command.demo:model --rule 'Head(k=64, force=True)' -o plan.svg
    """
    check_writable("draw", output)
    step, args = target.call(pack=pack)
    step.plan(*args).draw(output)
    click.echo(f"wrote {output}")
