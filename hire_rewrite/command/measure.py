"""`tune` and `evaluate`: rules within a budget, and what they miss."""

from __future__ import annotations

import click

from hire_rewrite.command.target import Target, batches_of, command, packed_by
from hire_rewrite.files import check_writable

_BATCHES = click.option(
    "--batches",
    metavar="MODULE:NAME",
    help="A function that returns tuples of the arguments after the weights; the call's without.",
)


@command
@_BATCHES
@click.option("--kl", type=float, help="Divergence from the dense model, in nats a token.")
@click.option("--recall", type=float, help="Share of the true top k, for models trained with one.")
@click.option("--seconds", type=float, help="Stop after so long with the best found; with --kl.")
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="Write the rules here.")
def tune(
    target: Target,
    batches: str | None,
    kl: float | None,
    recall: float | None,
    seconds: float | None,
    output: str | None,
) -> None:
    """The fastest rules within a budget.

    \b
    Examples:
      hire-rewrite tune hire_rewrite.command.demo:model \\
        --batches hire_rewrite.command.demo:batches --kl 0.001 -o rules.json
    """
    if output is not None:
        check_writable("tune", output)
    tuned = target.step.tune(
        target.params, batches_of(batches, target), kl=kl, recall=recall, seconds=seconds
    )
    click.echo(str(tuned))
    if output is not None:
        tuned.save(output)
        click.echo(f"wrote {output}", err=True)


@command
@_BATCHES
@click.option("--calibration", metavar="MODULE:NAME", help="Batches to fit the predictors to.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def evaluate(target: Target, batches: str | None, calibration: str | None, as_json: bool) -> None:
    """What the rules miss: recall of each site, and divergence of the model.

    Every token is measured as if it were decoded alone, however many a batch has.

    \b
    Examples:
      hire-rewrite evaluate hire_rewrite.command.demo:model --rule 'Head(k=64, force=True)' \\
        --batches hire_rewrite.command.demo:batches
    """
    step = target.step
    packed = packed_by(step, target, calibration)
    report = step.evaluate(packed, batches_of(batches, target), weights=target.params)
    click.echo(report.to_json() if as_json else str(report))
