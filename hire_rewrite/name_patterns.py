"""Patterns for the names of sites: what a rule's `path` may be, and what saved rules have in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

__all__ = ["check_pattern", "fits", "is_literal", "site_pattern", "sites_pattern", "whole_name"]

_NUMBER = re.compile(r"\d+")

_BRACES = r"\{(?:(?P<low>\d+)(?:\.\.|…)(?P<high>\d+)|(?P<choices>[^{},]+(?:,[^{},]+)+))\}"
_SEVERAL = re.compile(_BRACES)
"""What stands for several numbers or parts of names."""

_TOKENS = re.compile(
    r"(?P<kept>\\.|\[\^?\]?(?:\\.|[^\]\\])*\])"  # what is escaped, and sets of characters
    rf"|(?P<start>\^)|{_BRACES}",
    re.DOTALL,
)
"""What a regular expression for names has besides others, and where it has not."""

_MOST = 10_000
"""Numbers that a range stands for: each is written out."""

_COLON = re.compile(r":(?!\d|$)")
"""What a scope may end in; the names of weights have colons before numbers (`kernel:0`)."""

_COUNTED = re.compile(r" \(\d+\)$")
"""What the plan has behind a name that stands for several."""


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern asks for the site of this name.

    A pattern is a regular expression that is searched for, or a name as plans print it. In both,
    `{0..3}` and `{q,k}` stand for a number or a part of a name (numbers with commas alone where a
    part begins: elsewhere they say how often something is repeated). What stands before the last
    colon, the scope of the layer, may be left out: `^` is the beginning of the name with or without
    it.

    Examples:
      >>> [fits("^p/{0..3}/{q,k}$", name) for name in ("p/2/k", "Attention:p/2/k", "p/4/k")]
      [True, True, False]
      >>> fits("p/{0..3}/w[0]", "p/1/w[0]")
      True
    """
    return any(compiled.search(name) for compiled in _compiled(pattern))


def check_pattern(pattern: str) -> None:
    """Raise `re.error` or `TypeError` if it is not a pattern for names."""
    try:
        re.compile(pattern)
        _compiled(pattern)
    except (ValueError, OverflowError, RecursionError) as error:  # of numbers and nests too great
        raise re.error(str(error)) from error


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What a pattern means as a regular expression and as a name that was printed."""

    def in_expression(token: re.Match[str]) -> str:
        if token["kept"]:
            return token[0]
        if token["start"]:
            return "(?:^|(?<=:))"
        before = pattern[: token.start()]
        if token["choices"] and re.fullmatch(r"[\d, ]+", token["choices"]):
            return _any_of(token) if before == "" or before[-1] in "/_:^" else token[0]
        return _any_of(token)

    written, at = "", 0
    printed = _COUNTED.sub("", pattern)
    for token in _SEVERAL.finditer(printed):
        written += re.escape(printed[at : token.start()]) + _any_of(token)
        at = token.end()
    written += re.escape(printed[at:])
    literal = rf"(?:^|:)(?:{written}|{re.escape(pattern)})\Z"
    return re.compile(_TOKENS.sub(in_expression, pattern)), re.compile(literal)


def _any_of(token: re.Match[str]) -> str:
    """A regular expression for what a pair of braces stands for."""
    if token["low"]:
        low, high = sorted((int(token["low"]), int(token["high"])))
        if high - low >= _MOST:
            raise re.error(f"{token[0]} is more than {_MOST} numbers")
        some = [str(number) for number in range(low, high + 1)]
    else:
        some = [choice.strip() for choice in token["choices"].split(",")]
    if all(_NUMBER.fullmatch(choice) for choice in some):
        return f"(?<!\\d)0*(?:{'|'.join(some)})(?!\\d)"
    end = "(?![^\\W_])" if token.end() == len(token.string) else ""
    return f"(?:{'|'.join(map(re.escape, some))}){end}"


def site_pattern(name: str, others: Iterable[str] = ()) -> str:
    """A regular expression for the name of one site, whatever the argument that holds its weights
    is called, and whatever scopes its layer stands in.

    Args:
      others: names of sites that it must not fit; where they leave no choice it is the whole name.

    Examples:
      >>> site_pattern("eqx.nn.Linear:model/layers/0/q")
      '^(.*:)?[^/:]+/layers/0/q$'
      >>> site_pattern("a/q", ["b/q"])
      '\\\\Aa/q\\\\Z'
    """
    rest = [other for other in others if other != name]
    for start in reversed([0, *(colon.end() for colon in _COLON.finditer(name))]):
        argument, slash, path = name[start:].partition("/")
        pattern = f"[^/:]+/{re.escape(path)}" if slash else re.escape(argument)
        pattern = f"^(.*:)?{pattern}$"
        if not any(fits(pattern, other) for other in rest):
            return pattern
    return whole_name(name)


def whole_name(name: str) -> str:
    """A regular expression for this name alone, with its scope."""
    return rf"\A{re.escape(name)}\Z"


_LITERAL = re.compile(
    r"(?:\^\(\.\*:\)\?(?:\[\^/:\]\+/)?(?P<name>N*+)\$|\\A(?P<whole>N*+)\\Z)".replace(
        "N", r"(?:[^\\.^$*+?{}\[\]|()]|\\[^A-Za-z0-9])"
    ),
    re.DOTALL,
)


def is_literal(pattern: str) -> bool:
    """Whether a pattern is for one name alone, as `site_pattern` and `whole_name` write it: such a
    one of a stranger's may be searched for, and takes no time.

    Examples:
      >>> [is_literal(p) for p in (site_pattern("Layer:p/0/q[1]"), whole_name("p/q"), "(a+)+$")]
      [True, True, False]
    """
    return len(pattern) < 4096 and _LITERAL.fullmatch(pattern) is not None


def sites_pattern(names: Sequence[str], others: Sequence[str]) -> str:
    """A regular expression for the names of some sites, as `site_pattern` for one.

    Examples:
      >>> sites_pattern(["model/0/q", "model/1/q"], ["model/0/k", "model/1/k"])
      '^(.*:)?[^/:]+/(0|1)/q$'
    """
    rest = [other for other in others if other not in names]
    patterns = [site_pattern(name, rest) for name in dict.fromkeys(names)]
    columns = list(zip(*(pattern.split("/") for pattern in patterns), strict=False))
    differing = [i for i, parts in enumerate(columns) if len(set(parts)) > 1]
    whole = all(pattern.count("/") == patterns[0].count("/") for pattern in patterns)
    if not whole or len(differing) != 1 or differing[0] in (0, len(columns) - 1):
        return "|".join(patterns)
    parts = [column[0] for column in columns]
    parts[differing[0]] = f"({'|'.join(columns[differing[0]])})"
    return "/".join(parts)
