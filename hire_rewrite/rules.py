"""What a user asks for: which sites to rewrite, with how many rows, and how to predict them.

A rule is a noun. The first rule, in the order given, whose kind and `path` fit a site decides about
it. The rule of each kind of site stands with the kind (`sites/ffn/rule.py`, `sites/head/rule.py`);
here is what rules share.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from hire_rewrite import _compat
from hire_rewrite.errors import HireRewriteError
from hire_rewrite.name_patterns import check_pattern, fits, site_pattern, sites_pattern, whole_name
from hire_rewrite.ops.encodings import Encoding
from hire_rewrite.ops.predictors import Predictor, written
from hire_rewrite.settings import is_int

Self = TypeVar("Self", bound="Rule")


class Rule:
    """Base of the rules, which are frozen dataclasses of a kind of site each.

    Attributes:
      predictor: how the rows that matter are guessed; None for kinds that guess nothing, and where
        the kind chooses.
      max_tokens: with more tokens in a call a site keeps its dense arithmetic; None for no limit.
      path: only sites whose name it fits are asked for: a name as plans print it, such as
        `params/layers/{0..3}/{q,k}`, or a regular expression that is searched for in names.
      force: rewrite even where the estimate says that it does not pay.
    """

    predictor: Predictor | None = None
    max_tokens: int | None
    path: str | None
    force: bool

    candidates: float | int | None = None

    def __repr__(self) -> str:
        return written(self)

    def names(self, site: str) -> bool:
        """Whether the rule asks for a site of this name."""
        return self.path is None or fits(self.path, site)

    def takes(self, tokens: Any) -> bool:
        """Whether so many tokens in a call are known to be few enough."""
        return self.max_tokens is None or _compat.at_most(tokens, self.max_tokens)

    def for_site(self: Self, site: str, **settings: Any) -> Self:
        """This rule with other settings, for the site of that name alone."""
        return self.replace(path=whole_name(site), **settings)

    def for_layer(self: Self, site: str, others: Iterable[str], **settings: Any) -> Self:
        """`for_site`, also in a function whose arguments and scopes have other names.

        Args:
          others: the names of all sites of this function.
        """
        return self.replace(path=site_pattern(site, others), **settings)

    def for_layers(self: Self, sites: Sequence[str], others: Sequence[str]) -> Self:
        """This rule for some sites alone, as `for_layer` for one."""
        return self.replace(path=sites_pattern(sites, others))

    def replace(self: Self, **settings: Any) -> Self:
        """This rule with other settings."""
        return dataclasses.replace(self, **settings)  # type: ignore[type-var]

    def __post_init__(self) -> None:
        """Check the settings that all rules have; subclasses check their own besides.

        Raises:
          HireRewriteError: one is out of its range.
        """
        rule = type(self).__name__
        fields = {f.name: f for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        given = "predictor" in fields and self.predictor is not fields["predictor"].default
        if given and not is_one(self.predictor, Predictor):
            raise HireRewriteError(
                f"{rule}: predictor={self.predictor!r} is not a predictor: give LowRank(...) or "
                "Quantized(...)"
            )
        check_positive_int(rule, "max_tokens", self.max_tokens)
        if not isinstance(self.force, bool):
            raise HireRewriteError(f"{rule}: force={self.force!r} must be True or False")
        if self.path is not None:
            try:
                check_pattern(self.path)
            except (re.error, TypeError) as error:
                raise HireRewriteError(
                    f"{rule}: path={self.path!r} is not a regular expression: {error}"
                ) from None


def count(amount: float | int, width: int, what: str) -> int:
    """How many of `width` rows an amount (a fraction or a number) asks for.

    Args:
      what: the site and argument, for the message.

    Raises:
      HireRewriteError: a number above the width.
    """
    if is_int(amount):
        if amount > width:
            raise HireRewriteError(
                f"{what}={amount} is more than the width {width}: give at most {width}, or a "
                "fraction (a float in (0, 1])"
            )
        return int(amount)
    return max(1, math.ceil(round(float(amount) * width, 6)))


def is_one(setting: object, protocol: type) -> bool:
    """Whether a setting has the methods of a protocol; its class, which has them too, is none."""
    return isinstance(setting, protocol) and not isinstance(setting, type)


def check_positive_int(rule: str, name: str, number: object) -> None:
    """Raise HireRewriteError if a setting is neither a positive int nor None."""
    if number is not None and (not is_int(number) or number < 1):  # type: ignore[operator]
        raise HireRewriteError(f"{rule}: {name}={number!r} must be a positive int or None")


def check_amount(rule: str, name: str, amount: object) -> None:
    """Raise HireRewriteError if an amount is neither a fraction nor a number of rows."""
    real = isinstance(amount, numbers.Real) and not isinstance(amount, bool)
    if not real or not (amount >= 1 if is_int(amount) else 0.0 < amount <= 1.0):  # type: ignore[operator]
        raise HireRewriteError(
            f"{rule}: {name}={amount!r} must be a fraction (a float in (0, 1]) or a number "
            f"of rows (an int of at least 1){_meant(rule, amount)}"
        )


def _meant(rule: str, value: object) -> str:
    """The setting of a rule that a value is for, as a question; empty if there is none."""
    kinds = {"encoding": Encoding, "predictor": Predictor}
    types: list[Any] = [kind for kind in Rule.__subclasses__() if kind.__name__ == rule]
    known = {field.name for kind in types for field in dataclasses.fields(kind)}
    names = (name for name, kind in kinds.items() if isinstance(value, kind) and name in known)
    return next((f": did you mean {name}={value!r}?" for name in names), "")


def check_amounts(rule: str, k: object, candidates: object) -> None:
    """Raise HireRewriteError if one is not an amount, or the candidates are fewer than k."""
    check_amount(rule, "k", k)
    if candidates is None:
        return
    check_amount(rule, "candidates", candidates)
    if is_int(k) == is_int(candidates) and candidates < k:  # type: ignore[operator]
        raise HireRewriteError(
            f"{rule}: candidates={candidates} is less than k={k}: the k are chosen among the "
            "candidates, so give at least as many"
        )


def candidate_count(site: str, rule: Any, k: int, default: int, width: int) -> int:
    """How many candidates a rule with `k` and `candidates` asks for, of `width` rows.

    Raises:
      HireRewriteError: they are fewer than k.
    """
    if rule.candidates is None:
        return default
    candidates = count(rule.candidates, width, f"{site}: candidates")
    if candidates < k:
        raise HireRewriteError(
            f"{site}: candidates={rule.candidates} are {candidates} rows, less than the {k} of "
            f"k={rule.k}: the k are chosen among the candidates, so give at least as many"
        )
    return candidates
