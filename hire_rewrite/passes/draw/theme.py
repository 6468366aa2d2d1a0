"""The colors of a drawing, on light pages and on dark ones."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colors as `#rrggbb`, all different.

    Attributes:
      page: behind everything.
      ink, faint: of text, and of text about what stays as it is.
      edge: of arrows and frames.
      frame: behind layers that are repeated.
      box, line: of a rewritten layer, and its border.
      pale, pale_line: of one that stays.
      after: what is read now.
      saved: what was read before, besides.
      dense: what is read as before.
      other: the same, of layers in no site.
    """

    page: str
    ink: str
    faint: str
    edge: str
    frame: str
    box: str
    line: str
    pale: str
    pale_line: str
    after: str
    saved: str
    dense: str
    other: str


LIGHT = Theme(
    page="#ffffff", ink="#1f2328", faint="#656d76", edge="#8c959f", frame="#f4f6f8",
    box="#fefefe", line="#54aeff", pale="#fafbfc", pale_line="#d0d7de", after="#0969da",
    saved="#b6d8fb", dense="#afb8c1", other="#d4dae0",
)  # fmt: skip
DARK = Theme(
    page="#0d1117", ink="#e6edf3", faint="#8d96a0", edge="#6e7681", frame="#151b23",
    box="#0d141d", line="#1f6feb", pale="#12171e", pale_line="#3d444d", after="#4493f8",
    saved="#17365d", dense="#57606a", other="#3a424b",
)  # fmt: skip


def for_both(svg: str) -> str:
    """An SVG in light colors with the rules that make them dark where a page is."""
    rules = []
    for field in dataclasses.fields(Theme):
        light, dark = getattr(LIGHT, field.name), getattr(DARK, field.name)
        for what in ("fill", "stroke"):
            rules.append(f'[style*="{what}: {light}"]{{{what}:{dark} !important}}')
    style = f"<style>@media(prefers-color-scheme:dark){{{''.join(rules)}}}</style>"
    return svg.replace("</defs>", f"</defs>{style}", 1)
