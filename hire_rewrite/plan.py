"""What was found in a function and what will be done about it: values first, text second."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Hashable, Sequence
from typing import Any

from jax.export import is_symbolic_dim

from hire_rewrite.files import write
from hire_rewrite.names import grouped, groups
from hire_rewrite.patterns.refusal import Refusal
from hire_rewrite.rules import Rule


@dataclasses.dataclass(frozen=True)
class Site:
    """A site of a function, as the plan has it.

    Attributes:
      name: the path of its weights in the arguments.
      kind: `"ffn"`, `"head"`, or the name of another kind that was registered.
      d_model: positions of its input.
      width: hidden neurons, rows of the vocabulary, or results.
      gated: whether an FFN multiplies two projections.
      activation: of an FFN, `"relu"`, `"silu"`, ...; empty for others.
      repeats: times it runs in one call, lengths of the scans around it multiplied.
      experts: blocks of these sizes that lie side by side in it (mixture of experts); 1 if plain.
      tokens: tokens in one run.
      rule: the rule that decides about it, if there is one.
      status: `"rewritten"` or `"dense"`.
      reason: why.
      bytes_before, bytes_after: weight bytes that one call reads here, dense and rewritten
        (`bytes_after` equals `bytes_before` where it is dense). A layer that is a site of its own
        is counted there, and not in the one that it is a part of.
      expected: how many times as fast as dense it is rewritten, or would be, by the estimate; None
        if no rule says what rewriting would be.
      source: file and line of its last product.
    """

    name: str
    kind: str
    d_model: int
    width: int
    gated: bool
    activation: str
    repeats: int
    experts: int
    tokens: int
    rule: Rule | None
    status: str
    reason: str
    bytes_before: int
    bytes_after: int
    expected: float | None
    source: str


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A linear layer that is not part of a site.

    Attributes:
      name: the path of its weight.
      shape: the weight's shape as the product sees it.
      reason: what stopped the match that got furthest; of a layer that came near none, which rule
        takes it.
      matched: how many equations had matched by then.
      source: file and line of the equation that stopped it.
      refusal: what kind of thing stopped that match.
      near: whether it looks like a vocabulary, or like a layer of a block.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    matched: int
    source: str
    refusal: Refusal
    near: bool = True


@dataclasses.dataclass(frozen=True)
class Layer:
    """A site, or a linear layer in no site, at its place in the program.

    Attributes:
      name: of the site, or the path of the weight.
      kind: of the site; empty for a layer in no site.
      status: `"rewritten"`, `"dense"` or `"in no site"`.
      about: its sizes, as text.
      repeats: times that it runs in one call.
      bytes_before, bytes_after: weight bytes that one call reads here.
      expected: how many times as fast as dense, as the site has it.
      reads: places in `Plan.layers` of the nearest layers whose results it reads, with anything but
        layers in between.
    """

    name: str
    kind: str
    status: str
    about: str
    repeats: int
    bytes_before: int
    bytes_after: int
    expected: float | None = None
    reads: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found in a function, and what is done about it.

    Attributes:
      sites: in order.
      rejected: linear layers in no site, the closest to one first.
      opaque: equations that are not looked into, though products are inside.
      unused_rules: those that fit no site.
      kernels: whether the kernels for CPU are in use (see `hire_rewrite.ops.kernels`).
      machine: by whose times sites were judged (see `hire_rewrite.cost.machine`).
      hints: what may have been forgotten.
      layers: sites and linear layers in none, in the order of the program.
    """

    sites: tuple[Site, ...]
    rejected: tuple[Rejection, ...] = ()
    opaque: tuple[str, ...] = ()
    unused_rules: tuple[Rule, ...] = ()
    kernels: str = ""
    machine: str = ""
    hints: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()

    @property
    def rewritten(self) -> tuple[Site, ...]:
        """The sites that are rewritten."""
        return tuple(site for site in self.sites if site.status == "rewritten")

    def __getitem__(self, what: str) -> Any:
        """The sites of a kind (`plan["head"]`, a tuple), or the site of a name, a `Site`.

        Raises:
          KeyError: there is neither.
        """
        named = [site for site in self.sites if site.name == what]
        if named:
            return named[0]
        kinds = dict.fromkeys(site.kind for site in self.sites)
        if what in kinds or what in _known_kinds():
            return tuple(site for site in self.sites if site.kind == what)
        names = ", ".join(grouped([site.name for site in self.sites]))
        raise KeyError(f"{what!r} is not a kind of site, and not a name of one: {names or 'none'}")

    def to_json(self, path: str | None = None) -> str:
        """The plan as JSON, with rules as they print; written to `path` if it is given."""
        text = json.dumps(_plain(self), indent=1)
        if path is not None:
            write("to_json", path, text + "\n")
        return text

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the flow of data through the layers, as SVG or PNG; with matplotlib.

        A box for each layer, with the bytes that one call reads, before and after; layers that are
        alike are one box with their number. What stays as it is is pale.

        Args:
          path: a file whose name ends in `.svg` or `.png`.

        Raises:
          HireRewriteError: it has another ending, or cannot be written, or matplotlib is missing.

        Examples:
          >>> import jax.numpy as jnp, pathlib, tempfile, hire_rewrite as hire
          >>> fn = lambda params, x: x @ params["vocabulary"]
          >>> plan = hire.inspect(fn, {"vocabulary": jnp.ones((64, 9000))}, jnp.ones((1, 64)))
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     plan.draw(pathlib.Path(folder, "plan.svg"))
        """
        from hire_rewrite.passes.draw import draw

        draw(self, path)

    def __str__(self) -> str:
        """Sites and layers that are alike in all but their names share a row; MB are of all."""
        parts = [f"{len(self.sites)} site(s), {len(self.rewritten)} rewritten"]
        if self.sites:
            header = [
                "site", "kind", "layer", "runs", "tokens", "MB read", "expected", "status",
                "reason",
            ]  # fmt: skip
            rows = [_site_row(name, sites) for name, sites in grouped_sites(self.sites)]
            parts.append(table([header, *rows]))
        if self.rejected:
            parts.append(f"{len(self.rejected)} linear layer(s) in no site")
            header = ["weight", "shape", "reason", "source"]
            rows = [
                [name, "×".join(map(str, r.shape)), r.reason, r.source]
                for name, (r, *_) in grouped_rejections(self.rejected)
            ]
            parts.append(table([header, *rows]))
        if self.opaque:
            parts.append("not looked into, though products are inside: " + ", ".join(self.opaque))
        parts.extend(f"unused rule: {rule}" for rule in self.unused_rules)
        parts.extend(self.hints)
        if self.machine and any(site.expected is not None for site in self.sites):
            parts.append(f"expected on: {self.machine}")
        if self.kernels and self.rewritten:
            parts.append(f"kernels for CPU: {self.kernels}")
        return "\n".join(parts)


def grouped_sites(sites: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    """Sites that are alike in all but their names and lines, with one name for each group."""
    return groups(sites, _name, lambda site: dataclasses.replace(site, name="", source=""))


def grouped_rejections(rejected: Sequence[Rejection]) -> list[tuple[str, list[Rejection]]]:
    """Layers that are alike in shape and reason, with one name for each group."""

    def alike(item: Rejection) -> Hashable:
        # The reason may name the next layer, under another number.
        reason = re.sub(r"\S*/\S*", lambda word: re.sub(r"\d+", "", word[0]), item.reason)
        return item.shape, reason, item.refusal if item.near else None

    return groups(rejected, _name, alike)


def _name(item: Site | Rejection) -> str:
    return item.name


def _known_kinds() -> list[str]:
    from hire_rewrite.sites import site_kinds  # they are described in terms of plans

    return [kind.name for kind in site_kinds()]


def _plain(value: Any) -> Any:
    """A plan, or a part of one, as JSON has it."""
    if isinstance(value, Plan | Site | Rejection | Layer):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Refusal):
        return value.name.lower()
    return str(value) if isinstance(value, Rule) or is_symbolic_dim(value) else value


def layer_of(site: Site) -> Layer:
    """A site as a layer, without what it reads."""
    return Layer(
        site.name, site.kind, site.status, sizes_of(site), site.repeats, site.bytes_before,
        site.bytes_after, site.expected,
    )  # fmt: skip


def sizes_of(site: Site) -> str:
    """What a site is, as `576 → 1536 silu gated`."""
    about = f"{site.d_model} → {site.width}"
    about += f" {site.activation}" if site.activation else ""
    return about + (" gated" if site.gated else "")


def megabytes_read(site: Site, number: int) -> str:
    """Weights that one call reads at so many sites like this one, dense and rewritten, in MB."""
    read = f"{number * site.bytes_before / 1e6:.1f}" if site.bytes_before else ""
    if site.bytes_after != site.bytes_before:
        read += f" → {number * site.bytes_after / 1e6:.1f}"
    return read


def _site_row(name: str, sites: Sequence[Site]) -> list[str]:
    site, number = sites[0], len(sites)
    return [
        f"{name} ({number})" if number > 1 else name, site.kind, sizes_of(site), str(site.repeats),
        str(site.tokens), megabytes_read(site, number),
        "" if site.expected is None else f"{site.expected:.2f} ×",
        site.status, site.reason,
    ]  # fmt: skip


def table(rows: list[list[str]]) -> str:
    """Rows as aligned text; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join(
        ("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
