"""The kinds of sites: what can be rewritten, and everything that the passes ask about it.

`kind` has the protocol and the registry, `operation` what a site is rewritten to; `ffn`, `head` and
`linear` are one folder each. A new kind is one file, and `register_kind`:

* a `hire_rewrite.rules.Rule`, a frozen dataclass: what a user writes to ask for it;
* a `Match` and a `SiteKind`: from a `hire_rewrite.patterns.linear.Linear` to where the site
  stands, or a `NoMatch` (`hire_rewrite.patterns.refusal`) that says why it is none;
* an `Operation`: `weight_rows` is what it packs; `to_tokens` and `from_tokens` (in
  `hire_rewrite.patterns.region`) lay tokens out for the functions of `hire_rewrite.ops` and back;
  `operation.reporting` measures them; its costs are `Read`s.

`tests/sites/test_new_kind.py` has all of it.
"""

from hire_rewrite.sites.ffn.kind import FFNKind
from hire_rewrite.sites.head.kind import HeadKind
from hire_rewrite.sites.kind import Logits as Logits
from hire_rewrite.sites.kind import Match as Match
from hire_rewrite.sites.kind import MatchedSite as MatchedSite
from hire_rewrite.sites.kind import SiteKind as SiteKind
from hire_rewrite.sites.kind import Unfit as Unfit
from hire_rewrite.sites.kind import register_kind as register_kind
from hire_rewrite.sites.kind import registered as registered
from hire_rewrite.sites.kind import site_kinds as site_kinds
from hire_rewrite.sites.linear.kind import LinearKind
from hire_rewrite.sites.operation import Operation as Operation

register_kind(FFNKind())
register_kind(HeadKind())
register_kind(LinearKind())
