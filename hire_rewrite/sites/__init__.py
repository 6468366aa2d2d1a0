"""The kinds of sites: what can be rewritten, and everything that the passes ask about it.

`kind` has the protocol and the registry, `operation` what a site is rewritten to; `ffn` and `head`
are one folder each. `weight_rows`, `observe`, `layout` and `replacement` are what kinds are made
with. A new kind is a rule, a `SiteKind` and an `Operation` in one file, and a call of
`register_kind`.
"""

from hire_rewrite.sites.ffn.kind import FFNKind
from hire_rewrite.sites.head.kind import HeadKind
from hire_rewrite.sites.kind import (
    Logits,
    Match,
    MatchedSite,
    SiteKind,
    Unfit,
    kind_of,
    register_kind,
    registered,
    site_kinds,
)
from hire_rewrite.sites.operation import Operation

__all__ = [
    "Logits",
    "Match",
    "MatchedSite",
    "Operation",
    "SiteKind",
    "Unfit",
    "kind_of",
    "register_kind",
    "registered",
    "site_kinds",
]

register_kind(FFNKind())
register_kind(HeadKind())
