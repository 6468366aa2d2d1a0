"""What was found in a function and what will be done about it: values first, text second."""

from __future__ import annotations

import dataclasses
import os

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
      reason: what stopped the match that got furthest.
      matched: how many equations had matched by then.
      source: file and line of the equation that stopped it.
      refusal: the kind of reason.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    matched: int
    source: str
    refusal: Refusal


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
    """Sites, near misses (closest first), opaque equations with products inside, unused rules,
    whether the kernels for CPU are in use (see `ops.kernels`), the machine by whose times
    sites were judged (see `hire_rewrite.cost.machine`), and the sites and near misses in the order
    of the program."""

    sites: tuple[Site, ...]
    rejected: tuple[Rejection, ...] = ()
    opaque: tuple[str, ...] = ()
    unused_rules: tuple[Rule, ...] = ()
    kernels: str = ""
    machine: str = ""
    layers: tuple[Layer, ...] = ()

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the flow of data through the layers, as SVG or PNG; with matplotlib.

        A box for each layer, with the bytes that one call reads, before and after; layers that are
        alike are one box with their number. What stays as it is is pale.

        Args:
          path: a file whose name ends in `.svg` or `.png`.

        Raises:
          HireRewriteError: it has another ending, or matplotlib is missing.

        Example:
          >>> import jax.numpy as jnp, pathlib, tempfile, hire_rewrite as hire
          >>> fn = lambda params, x: x @ params["vocabulary"]
          >>> plan = hire.inspect(fn, {"vocabulary": jnp.ones((64, 9000))}, jnp.ones((1, 64)))
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     plan.draw(pathlib.Path(folder, "plan.svg"))
        """
        from hire_rewrite.passes.draw import draw

        draw(self, path)

    def __str__(self) -> str:
        rewritten = sum(site.status == "rewritten" for site in self.sites)
        parts = [f"{len(self.sites)} site(s), {rewritten} rewritten"]
        if self.sites:
            header = [
                "site", "kind", "layer", "runs", "tokens", "MB read", "expected", "status",
                "reason",
            ]  # fmt: skip
            parts.append(table([header, *map(_site_row, self.sites)]))
        if self.rejected:
            parts.append(f"{len(self.rejected)} linear layer(s) in no site")
            header = ["weight", "shape", "matched", "reason", "source"]
            rows = [
                [r.name, "×".join(map(str, r.shape)), str(r.matched), r.reason, r.source]
                for r in self.rejected
            ]
            parts.append(table([header, *rows]))
        if self.opaque:
            parts.append("not looked into, though products are inside: " + ", ".join(self.opaque))
        parts.extend(f"unused rule: {rule}" for rule in self.unused_rules)
        if self.machine and any(site.expected is not None for site in self.sites):
            parts.append(f"expected on: {self.machine}")
        if self.kernels and rewritten:
            parts.append(f"kernels for CPU: {self.kernels}")
        return "\n".join(parts)


def layer_of(site: Site) -> Layer:
    """A site as a layer, without what it reads."""
    return Layer(
        site.name, site.kind, site.status, _about(site), site.repeats, site.bytes_before,
        site.bytes_after, site.expected,
    )  # fmt: skip


def _about(site: Site) -> str:
    about = f"{site.d_model} → {site.width}"
    about += f" {site.activation}" if site.activation else ""
    return about + (" gated" if site.gated else "")


def _site_row(site: Site) -> list[str]:
    read = f"{site.bytes_before / 1e6:.1f}" if site.bytes_before else ""
    if site.bytes_after != site.bytes_before:
        read += f" → {site.bytes_after / 1e6:.1f}"
    return [
        site.name, site.kind, _about(site), str(site.repeats), str(site.tokens), read,
        "" if site.expected is None else f"{site.expected:.2f} ×", site.status, site.reason,
    ]  # fmt: skip


def table(rows: list[list[str]]) -> str:
    """Rows as aligned text; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return "\n".join(
        ("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
