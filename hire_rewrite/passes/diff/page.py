"""A diff as one HTML file: both sides beside each other, and nothing to load from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from hire_rewrite.passes.diff.fold import (
    Calls,
    Regions,
    Stretch,
    as_before,
    called,
    headline,
    parts_of,
    remarks,
    summary,
)
from hire_rewrite.passes.diff.look import SCRIPT, STYLE
from hire_rewrite.passes.diff.value import Block, Call, Equation, Region, megabytes

_FRAME_HEIGHT = 560
"""Pixels of a diff in a notebook."""


def to_html(diff: Any) -> str:
    """A `Diff` as a whole document."""
    title = escape(" → ".join(diff.names))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body>",
            *_top(diff),
            "<main>",
            *_arguments(diff),
            *_blocks([diff.block]),
            '</main><nav id="map" aria-label="changes"></nav>',
            f"<script>{SCRIPT}</script></body></html>",
        ]
    )


def to_notebook(diff: Any) -> str:
    """A `Diff` for a notebook: the document in a frame, so that neither styles the other."""
    page = escape(to_html(diff))
    style = f"width:100%;height:{_FRAME_HEIGHT}px;border:1px solid #8884;border-radius:6px"
    return f'<iframe sandbox="allow-scripts" srcdoc="{page}" style="{style}"></iframe>'


def _top(diff: Any) -> Iterator[str]:
    names, sizes = diff.names, diff.sizes
    sides = (f"{escape(n)} <small>{s} equations</small>" for n, s in zip(names, sizes, strict=True))
    yield f"<header><h1>{' → '.join(sides)}</h1>"
    said = summary(diff) if diff.changed else ["no difference"]
    yield "".join(f"<p>{escape(line)}</p>" for line in said)
    yield (
        '<div class="bar"><input id="find" type="search" placeholder="find: a weight, a primitive, '
        'a file" aria-label="find"><output id="found"></output>'
        '<button id="open">unfold all</button><button id="theme">light / dark</button></div>'
        "</header>"
    )


def _arguments(diff: Any) -> Iterator[str]:
    changed = [a for a in diff.arguments if a.before != a.after]
    kept = len(diff.arguments) - len(changed)
    yield f"<details><summary>arguments: {kept} as before, {len(changed)} changed</summary>"
    for argument in changed or ():
        cells = (
            f'<div class="{side}">{escape(argument.path)}: {escape(kind)} '
            f"<b>{megabytes(argument.bytes)}</b></div>"
            if kind
            else "<div></div>"
            for side, kind in (("old", argument.before), ("new", argument.after))
        )
        yield f'<div class="two l">{"".join(cells)}</div>'
    yield "</details>"


def _blocks(alike: Sequence[Block]) -> Iterator[str]:
    """Blocks that differ in names alone, as one."""
    for part in parts_of(alike):
        if isinstance(part, Stretch):
            yield f"<details><summary>{as_before(part)}</summary>"
            yield from (_line(equation) for equation in part.equations)
            yield "</details>"
        elif isinstance(part, Regions):
            yield from _regions(part.rows)
        elif isinstance(part, Calls):
            yield from _call(part.rows)
        else:
            yield from (f'<div class="stays l">{escape(r)}</div>' for r in part.remarks)
            yield _line(part.equations[0])


def _call(alike: Sequence[Call]) -> Iterator[str]:
    for number, block in enumerate(alike[0].blocks):
        opened = " open" if block.changed else ""
        yield f'<details class="call"{opened}><summary>{escape(called(alike, number))}</summary>'
        yield _pair([alike[0].before], [alike[0].after])
        yield from _blocks([each.blocks[number] for each in alike])
        yield "</details>"


def _regions(alike: Sequence[Region]) -> Iterator[str]:
    yield f'<section class="region"><h2 class="l">{escape(headline(alike)[0])}</h2>'
    said = [*headline(alike)[1], *remarks(alike)]
    yield from (f'<p class="l">{escape(line)}</p>' for line in said)
    yield _pair(alike[0].before, alike[0].after)
    if len(alike) > 1:
        yield f"<details><summary>the other {len(alike) - 1}, alike</summary>"
        for region in alike[1:]:
            yield f'<h3 class="l">{escape(headline([region])[0])}</h3>'
            yield _pair(region.before, region.after, inner=False)
        yield "</details>"
    yield "</section>"


def _pair(before: Sequence[Equation], after: Sequence[Equation], *, inner: bool = True) -> str:
    sides = (
        f'<div class="{side}">{"".join(_line(each, inner=inner) for each in equations)}</div>'
        for side, equations in (("old", before), ("new", after))
    )
    return f'<div class="two">{"".join(sides)}</div>'


def _line(equation: Equation, *, inner: bool = True) -> str:
    cost = [megabytes(equation.bytes)] if equation.bytes else []
    if equation.milliseconds is not None:
        cost.append(f"{equation.milliseconds:.2f} ms")
    said = f" <b>{', '.join(cost)}</b>" if cost else ""
    text = f"{escape(str(equation))}{said}{_source(equation)}"
    if not (inner and equation.inner):
        return f'<div class="l">{text}</div>'
    listings = "".join(
        f'<div class="in"><i>{escape(listing.label)}</i>'
        f"{''.join(_line(each) for each in listing.equations)}</div>"
        for listing in equation.inner
    )
    return f'<details class="eq"><summary class="l">{text}</summary>{listings}</details>'


def _source(equation: Equation) -> str:
    """A link to the line of the user's code, if its file has a whole path."""
    if not equation.place:
        return ""
    path = PurePath(equation.file)
    title = escape(f"{equation.function}, {equation.place}")
    if not path.is_absolute():
        return f" <s>{title}</s>"
    link = escape(f"{path.as_uri()}#L{equation.line}")
    return f' <a href="{link}">{escape(equation.place)}</a>'
