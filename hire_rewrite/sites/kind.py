"""What a kind of site is: how it is matched, resolved with a rule, packed, run and measured.

A site goes through four hands. Its `SiteKind` finds it in the graph (a `Match`); detection gives
it a name and says how its weights lie on devices (a `MatchedSite`); a rule that asks for it is
resolved to an `Operation` of fixed sizes; and the operation packs the site's weights and says what
takes the site's place in each mode. The passes are loops over these and know no kind.

A new kind is one file with a rule, a `SiteKind` and an `Operation`, and one `register_kind`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.graph.nodes import Node, Scope, Value
from hire_rewrite.graph.trace import Trace
from hire_rewrite.patterns.linear import Linear, MatchContext
from hire_rewrite.rules import Rule
from hire_rewrite.sharding.rows import RowSharding, Sharding

if TYPE_CHECKING:
    from hire_rewrite.sites.operation import Operation

Functions = dict[Hashable, Callable[..., Any]]
"""Jitted functions by what they compute: layers that are alike are traced once."""


class Unfit(Exception):  # noqa: N818 (a finding, not an error: the site stays dense)
    """A rule that cannot be applied to a site, and why."""


@contextmanager
def unfit_if_refused() -> Iterator[None]:
    """What is refused in here says that the rule cannot be applied to the site."""
    try:
        yield
    except HireRewriteError as error:
        raise Unfit(str(error)) from error


@dataclasses.dataclass(frozen=True)
class StaysDense:
    """What a look at the numbers of a site told, if that is why the site stays dense."""

    reason: str


class Match(abc.ABC):
    """Where a site stands in the graph; unless a kind says more, its linear layers in a row."""

    @property
    @abc.abstractmethod
    def linears(self) -> tuple[Linear, ...]:
        """Its linear layers; the first reads its input, the last makes its result."""

    @property
    def nodes(self) -> frozenset[Node]:
        """The nodes that a replacement takes the place of."""
        return frozenset(linear.node for linear in self.linears)

    @property
    def shared(self) -> frozenset[Node]:
        """Other nodes that no other site may have."""
        return frozenset()

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What it reads besides its weights, its input first."""
        return (self.linears[0].x,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        """What others read of it."""
        return (self.linears[-1].out,)

    @property
    def weights(self) -> tuple[Value, ...]:
        """Its matrices and vectors."""
        return tuple(linear.weight for linear in self.linears)


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits that are compared with the dense model's: a value, the axis of the vocabulary, the row
    of the vocabulary that position 0 of the axis belongs to, and how many rows that has."""

    value: Value
    axis: int
    start: int
    vocabulary: int


@dataclasses.dataclass(frozen=True, eq=False)
class MatchedSite:
    """A match with the name that a user knows it by.

    Attributes:
      weights: equal for sites that can share one packed copy.
      sharding: how its weight rows lie on devices.
      unsupported: why it has to stay dense, if it has to.
      optional_sharding: whether it may as well not be sharded.
      loops: the scans over whose iterations its weights vary, outermost first.
    """

    kind: SiteKind
    name: str
    match: Any
    weights: Hashable
    sharding: Sharding
    unsupported: str | None
    optional_sharding: bool
    loops: tuple[Scope, ...]

    @property
    def label(self) -> str:
        """Kind and name; sites of two kinds may have one name if at most one of them is packed."""
        return f"{self.kind.name} {self.name}"

    @property
    def scope(self) -> Scope:
        return self.linears[0].node.scope

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(self.match.linears)

    @property
    def d_model(self) -> int:
        """The size of its input."""
        return self.linears[0].in_dim

    @property
    def tokens(self) -> int:
        """Tokens in one run."""
        return self.linears[0].tokens

    @property
    def experts(self) -> int:
        """Sites of these sizes that lie side by side in it."""
        return int(self.kind.summary(self.match).get("experts", 1))

    @property
    def device_experts(self) -> int:
        """Those of them that a device has, or has a part of."""
        return self.experts // self.sharding.expert_shards

    @property
    def repeats(self) -> int:
        """Runs in one call; a `while_loop` counts as one."""
        return math.prod(scope.length or 1 for scope in self.scope.ancestors())

    @property
    def layers(self) -> int:
        """Layers that its packed arrays have: iterations of its loops, times experts."""
        return math.prod(scope.length or 1 for scope in self.loops) * self.experts

    @functools.cached_property
    def key(self) -> str:
        """A short hash of `weights`, equal in every trace that computes them alike."""
        return hashlib.sha256(repr(self.weights).encode()).hexdigest()[:16]


class SiteKind(abc.ABC):
    """A kind of site. Subclasses are stateless; one instance is registered.

    Attributes:
      name: as in `Site.kind`.
      rule: the class of the rules that ask for it.
      leftover: whether it takes the linear layers that sites of other kinds leave dense.
      divides_columns: whether a site, of one linear layer, may be sharded along its inputs. Where
        it is not, what is sharded so is packed with sharded rows.
      statistics_types: the dataclasses of `Operation.statistics` and `Operation.examine`, of plain
        numbers, for checkpoints (registered encodings and `StaysDense` need not be among them).
    """

    name: str
    rule: type[Rule]
    leftover: bool = False
    divides_columns: bool = False
    statistics_types: tuple[type, ...] = ()

    @abc.abstractmethod
    def match(self, linear: Linear, context: MatchContext, rules: Sequence[Rule]) -> Match:
        """The site that a linear layer belongs to.

        Args:
          rules: the rules of this kind; empty for the default.

        Raises:
          NoMatch: it belongs to none.
        """

    @abc.abstractmethod
    def resolve(
        self, site: MatchedSite, rule: Any, statistics: Any, functions: Functions
    ) -> Operation:
        """The operation that a rule asks for at a site.

        Args:
          statistics: what calibration (`Operation.statistics`) or a look at its numbers
            (`Operation.examine`) told about the site, or None.
          functions: those of other sites of the plan.

        Raises:
          HireRewriteError: the rule asks for more than there is.
          Unfit: the rule cannot be applied to this site.
        """

    def default_rule(self, match: Any) -> Rule | None:
        """What is done without rules; None where that might change what the model means."""
        return None

    def trials(self, site: MatchedSite, rule: Any) -> Sequence[Rule]:
        """Rules that are worth a trial at a site within a budget of divergence.

        Args:
          rule: the user's, whose other settings they keep; None if there is none.
        """
        return ()

    def asks(self, rule: Any, site: MatchedSite) -> bool:
        """Whether a rule of this kind, whose `path` fits, asks for a site."""
        return True

    def unasked(self, match: Any) -> str:
        """The reason of a site that no rule asks for."""
        return f"no rule asks for it; {self.rule.__name__}(...) does"

    def summary(self, match: Any) -> Mapping[str, Any]:
        """The fields of `plan.Site` that only the kind knows: `width`, and if they are not as usual
        `gated`, `activation` and `experts`."""
        return {"width": match.linears[-1].out_dim}

    def identity(self, match: Any) -> Hashable:
        """What sites that share a packed copy have in common besides their weights."""
        return ()

    def unsupported_sharding(self, match: Any, sharding: RowSharding) -> str | None:
        """Why a site has to stay dense if its rows are sharded so; None if it need not."""
        return f"its rows are sharded over {sharding}, which {self.name} sites do not support"

    def expert_axes(self, match: Any) -> Sequence[int]:
        """The axis of experts of the weight of each linear layer of a site, along which its weights
        may be sharded; none where it may not."""
        return ()

    def logits(self, match: Any) -> Logits | None:
        """The logits that the site makes, if it makes some."""
        return None


def weights_identity(
    trace: Trace, kind: SiteKind, match: Match, loops: tuple[Scope, ...]
) -> Hashable:
    """Equal for sites that can share one packed copy, in any trace that computes them alike.

    Args:
      loops: as in `MatchedSite`.
    """
    return (
        kind.name,
        tuple(trace.provenance.identity(weight, loops) for weight in match.weights),
        tuple(linear.weight_layout for linear in match.linears),
        kind.identity(match),
    )


_KINDS: dict[str, SiteKind] = {}


def register_kind(kind: SiteKind) -> SiteKind:
    """Add a kind of site; one of the same name is replaced.

    Kinds that were registered before it have the first choice of linear layers.

    Raises:
      HireRewriteError: it is not what the passes can use.
    """
    if not isinstance(kind, SiteKind):
        raise HireRewriteError(f"register_kind: {kind!r} is not an instance of SiteKind: give one")
    rule = getattr(kind, "rule", None)
    if not isinstance(getattr(kind, "name", None), str) or not (
        isinstance(rule, type) and issubclass(rule, Rule) and dataclasses.is_dataclass(rule)
    ):
        raise HireRewriteError(
            f"register_kind: {kind!r} needs a `name`, and as its `rule` a dataclass that is a "
            "subclass of Rule"
        )
    missing = {"max_tokens", "path", "force"} - {field.name for field in dataclasses.fields(rule)}
    if missing:
        raise HireRewriteError(
            f"register_kind: {rule.__name__} lacks the field(s) {', '.join(sorted(missing))}, "
            "which every rule has"
        )
    _KINDS[kind.name] = kind
    return kind


@contextmanager
def registered(kind: SiteKind) -> Iterator[SiteKind]:
    """A kind of site that is known within a `with` block alone."""
    before = dict(_KINDS)
    try:
        yield register_kind(kind)
    finally:
        _KINDS.clear()
        _KINDS.update(before)


def site_kinds() -> tuple[SiteKind, ...]:
    """All kinds of sites."""
    return tuple(_KINDS.values())
