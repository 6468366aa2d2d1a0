"""What tuning returns: rules, and why they are what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from hire_rewrite.plan import table
from hire_rewrite.rules import Rule
from hire_rewrite.saved import save_rules


@dataclasses.dataclass(frozen=True)
class Trial:
    """A rule at a site, and what it was measured to do on held-out batches.

    Attributes:
      rule: for the site alone.
      bytes: weight bytes that one token reads, in all layers.
      recall: of the true top k, in the worst layer; None where divergence was measured.
      kl: mean divergence of the model from the dense one, in nats a token, if nothing but this
        site is rewritten; None where recall was measured.
      gain: nanoseconds that it saves of one token, by the estimate.
    """

    name: str
    rule: Rule
    bytes: int
    recall: float | None = None
    kl: float | None = None
    gain: float = 0.0


def portable(trials: Iterable[Trial], names: Sequence[str]) -> list[Trial]:
    """Trials with rules that fit in functions whose arguments have other names too.

    Args:
      names: of all sites of the function.
    """
    return [
        dataclasses.replace(trial, rule=trial.rule.for_layer(trial.name, names)) for trial in trials
    ]


class Tuned(tuple[Rule, ...]):
    """The rules that tuning found, first those of the sites; a tuple for `transform(fn, *rules)`.

    Attributes:
      chosen: the winner at each site.
      trials: everything that was tried, in the same order of sites.
      kl: of the model with all rules from the dense one, in nats a token, on batches that nothing
        was chosen by; None where recall was asked for.
      untried: how many trials there was no time for.
    """

    chosen: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    kl: float | None
    untried: int

    def __new__(
        cls,
        rules: Iterable[Rule],
        chosen: Iterable[Trial] = (),
        trials: Iterable[Trial] = (),
        kl: float | None = None,
        untried: int = 0,
    ) -> Tuned:
        tuned = super().__new__(cls, rules)
        tuned.chosen, tuned.trials = tuple(chosen), tuple(trials)
        tuned.kl, tuned.untried = kl, untried
        return tuned

    def __str__(self) -> str:
        if self.kl is None:
            rows = [
                [trial.name, str(getattr(trial.rule, "guesses_by", trial.rule.predictor)),
                 str(trial.rule.candidates),
                 f"{trial.recall:.4f}", f"{trial.bytes / 1e6:.2f}"]
                for trial in self.chosen
            ]  # fmt: skip
            return table([["site", "predictor", "candidates", "recall", "MB read"], *rows])
        rows = [
            [trial.name, f"{trial.kl:.1e}", f"{trial.gain / 1e6:.2f}", f"{trial.bytes / 1e6:.2f}",
             str(trial.rule.replace(path=None, force=False))]
            for trial in self.chosen
        ]  # fmt: skip
        header = ["site", "KL alone", "ms saved (estimate)", "MB read", "rule"]
        late = f"\nTime was up: {self.untried} trial(s) were not made" if self.untried else ""
        total = f"KL of all together: {self.kl:.1e} nats a token, as if each were decoded alone"
        return f"{table([header, *rows])}\n{total}{late}"

    def save(self, path: str) -> None:
        """Write the rules to a JSON file, which `load_rules` reads."""
        save_rules(self, path)
