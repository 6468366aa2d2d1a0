"""The kinds of sites: what can be rewritten, and everything that the passes ask about it.

`base` has the protocol and `registry` the kinds that there are; `ffn` and `head` are one folder
each. `weight_rows`, `observe`, `layout` and `replacement` are what kinds are made with. A new kind
is a rule, a `SiteKind` and an `Operation` in one file, and a call of `register_kind`.
"""

from hire_rewrite.sites.base import Logits, Match, MatchedSite, Operation, SiteKind, Unfit
from hire_rewrite.sites.ffn.kind import FFNKind
from hire_rewrite.sites.head.kind import HeadKind
from hire_rewrite.sites.registry import kind_of, register_kind, registered, site_kinds

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
