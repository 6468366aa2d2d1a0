"""Find the sites of a traced function, and say of every other linear layer why it is not one."""

from __future__ import annotations

import dataclasses
import math
import posixpath
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from hire_rewrite.graph.effects import unsupported_reason
from hire_rewrite.graph.nodes import Node, Scope, Value, source_of
from hire_rewrite.graph.opaque import may_hide_product, opaque_name
from hire_rewrite.graph.trace import Trace
from hire_rewrite.graph.weights import loops_of
from hire_rewrite.names import unique
from hire_rewrite.passes.near import layer_behind, near_misses
from hire_rewrite.patterns.linear import Linear, MatchContext, as_linear, chosen_from
from hire_rewrite.patterns.refusal import NoMatch, Refusal, closer
from hire_rewrite.plan import Rejection
from hire_rewrite.rules import Rule
from hire_rewrite.sharding.placement import sharding_of
from hire_rewrite.sites import Match, MatchedSite, SiteKind, site_kinds
from hire_rewrite.sites.kind import weights_identity

_TRANSFORMED = re.compile(r"\b\w+\(([^()]*)\)")
"""What a transformation makes of a name, as in `vmap(mlp)`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Detection:
    """The sites of a function, its other linear layers, and equations that are not looked into.

    Attributes:
      trace, rules, mesh: as in `detect`.
      rejected: the closest first.
      linears: the linear layers of each scope.
    """

    trace: Trace
    rules: Sequence[Rule]
    mesh: Mesh | None
    sites: tuple[MatchedSite, ...]
    rejected: Mapping[Node, Rejection]
    opaque: tuple[str, ...]
    linears: tuple[Mapping[Node, Linear], ...]

    def leftovers(
        self,
        among: Callable[[Node], bool],
        names: Sequence[str] = (),
        taken: Collection[Node] = (),
    ) -> tuple[tuple[MatchedSite, ...], Mapping[Node, NoMatch]]:
        """The sites of kinds that take what others leave, and why they do not take the rest.

        Args:
          among: whether a product is left.
          names: of other sites, which none of these gets.
          taken: nodes that none of these may have.
        """
        matches = _Matches(self.trace, self.rules, leftover=True, before=taken)
        for linears in self.linears:
            matches.search({n: linear for n, linear in linears.items() if among(n)})
        return matches.sites(self.mesh, names), matches.refused

    def rejections(
        self, refused: Mapping[Node, NoMatch], left: Mapping[Node, str]
    ) -> list[tuple[Node, Rejection]]:
        """`rejected`, with what kinds that take what others leave say of them.

        Args:
          refused: why they do not take a layer.
          left: why a layer that they take is left dense. Of one that did not come near another
            kind of site this is all there is to say.
        """
        asked = not self.rules or any(
            kind.leftover and isinstance(rule, kind.rule)
            for kind in site_kinds()
            for rule in self.rules
        )
        rejections = []
        for node, rejection in self.rejected.items():
            said = refused[node].reason if node in refused else left.get(node)
            if said is not None and not rejection.near:
                rejection = dataclasses.replace(rejection, reason=said)
            elif node in refused and asked:
                reason = f"{rejection.reason}; and {said}"
                rejection = dataclasses.replace(rejection, reason=reason)
            rejections.append((node, rejection))
        return rejections


@dataclasses.dataclass
class _Matches:
    """Matches with their kinds, and refusals, of the scopes that were searched so far."""

    trace: Trace
    rules: Sequence[Rule]
    leftover: bool = False
    before: Collection[Node] = ()
    found: list[tuple[SiteKind, Match]] = dataclasses.field(default_factory=list)
    refused: dict[Node, NoMatch] = dataclasses.field(default_factory=dict)
    cache: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def search(self, linears: dict[Node, Linear]) -> None:
        """Offer the linear layers of a scope to each kind, in turn."""
        taken = dict.fromkeys(self.before)
        context = MatchContext(self.trace, linears, taken, cache=self.cache)
        for kind in site_kinds():
            rules = [rule for rule in self.rules if isinstance(rule, kind.rule)]
            if kind.leftover != self.leftover:
                continue
            for node, linear in linears.items():
                if node not in context.taken:
                    self._try(kind, linear, context, rules)
        for node in context.taken:
            self.refused.pop(node, None)

    def _try(
        self, kind: SiteKind, linear: Linear, context: MatchContext, rules: Sequence[Rule]
    ) -> None:
        node = linear.node
        try:
            match = kind.match(linear, context, rules)
            nodes = match.nodes | match.shared
            if nodes & context.taken.keys():
                reason = "a product of it belongs to the site before"
                raise NoMatch(Refusal.TAKEN, reason, node, len(nodes))
        except NoMatch as refusal:
            self.refused[node] = closer(self.refused.get(node), refusal)
        else:
            self.found.append((kind, match))
            context.taken.update(dict.fromkeys(nodes, match))

    def sites(self, mesh: Mesh | None, others: Sequence[str] = ()) -> tuple[MatchedSite, ...]:
        """The matches as sites; no name is among `others`."""
        names = _names(self.trace, [match for _, match in self.found], others)
        return tuple(
            _site(self.trace, kind, name, match, mesh)
            for name, (kind, match) in zip(names, self.found, strict=True)
        )


def detect(trace: Trace, rules: Sequence[Rule] = (), mesh: Mesh | None = None) -> Detection:
    """Match every linear layer of the function, in all scopes.

    Args:
      rules: the user's; how small a site may be is for them to say.
      mesh: where to shard the rows of sites whose weights are not sharded.
    """
    matches, opaque, scopes = _Matches(trace, rules), [], []
    for scope in trace.scope.walk():
        linears: dict[Node, Linear] = {}
        for node in scope.nodes:
            if node not in trace.live.nodes:
                continue
            if may_hide_product(node, trace.provenance):
                opaque.append(f"{opaque_name(node)} at {source_of(node)}")
            try:
                linear = as_linear(node, trace.provenance)
            except NoMatch as refusal:
                matches.refused[node] = refusal
                continue
            if linear is not None:
                linears[node] = linear
        matches.search(linears)
        scopes.append(linears)
    rejected = _rejections(trace, matches.refused)
    sites = matches.sites(mesh)
    return Detection(trace, rules, mesh, sites, rejected, tuple(opaque), tuple(scopes))


def _site(trace: Trace, kind: SiteKind, name: str, match: Match, mesh: Mesh | None) -> MatchedSite:
    sharding, reason, optional = sharding_of(
        trace,
        match.linears[0].x,
        [linear.weight for linear in match.linears],
        match.weights,
        match.outputs,
        mesh,
        lambda sharding: kind.unsupported_sharding(match, sharding),
        match.linears[0].weight_in if kind.divides_columns else (),
        kind.expert_axes(match),
    )
    varying = {loop for value in match.weights for loop in trace.provenance.varies_over(value)}
    loops = loops_of(match.linears[0].node.scope, varying)
    return MatchedSite(
        kind,
        name,
        match,
        weights_identity(trace, kind, match, loops),
        sharding,
        unsupported_reason(match.nodes | match.shared, match.inputs) or _empty(loops) or reason,
        optional,
        loops,
    )


def _empty(loops: Sequence[Scope]) -> str | None:
    return (
        "it is in a loop that never runs: it has no weights"
        if any(loop.length == 0 for loop in loops)
        else None
    )


def _name_stack(node: Node) -> str:
    """The named scopes around an equation and around the calls and loops that it is in, without
    what transformations and `einsum` add (`vmap(mlp)`, `td,df->tf`): a site keeps its name."""
    parts = [str(eqn.source_info.name_stack) for eqn in node.eqns_around()]
    joined = "/".join(reversed(parts))
    changed = 1
    while changed:
        joined, changed = _TRANSFORMED.subn(r"\1", joined)
    return "/".join(part for part in joined.split("/") if part and "->" not in part)


def _rejections(trace: Trace, refused: dict[Node, NoMatch]) -> dict[Node, Rejection]:
    """Refusals, near misses first and closest first; of those that are as close, what was meant to
    be a site."""
    weights = {node: weight_of(trace, node) for node in refused}
    rejections, near = [], near_misses(trace, refused)
    for node, refusal in refused.items():
        weight, name = weights[node]
        if not trace.provenance.roots(weight) and trace.provenance.is_weight(weight):
            continue  # numbers that the program makes itself: positions, masks
        reason = refusal.reason
        if refusal.refusal is Refusal.CONTRACTED and refusal.node in refused:
            behind = weights[refusal.node][1], refused[refusal.node].reason
            reason += "; and {} behind it does not end an FFN: {}".format(*behind)
        if refusal.refusal is Refusal.TOO_NARROW and refusal.intended:
            last = layer_behind(trace, node, refused)
            if last is not None:
                name_of_last, why = weights[last][1], refused[last].reason
                reason = f"{name_of_last} behind it does not end an FFN: {why}"
        source = source_of(refusal.node)
        rejection = Rejection(
            name, weight.shape, reason, refusal.matched, source, refusal.refusal, node in near
        )
        order = node not in near, -refusal.matched, not refusal.intended
        rejections.append((order, node, rejection))
    rejections.sort(key=lambda item: item[0])
    return {node: rejection for _, node, rejection in rejections}


def weight_of(trace: Trace, node: Node) -> tuple[Value, str]:
    """The weight of a product, and the path of what it was made of."""
    origins = ((v, origin) for v in node.ins for origin in (v, chosen_from(v, trace.provenance)))
    return next(
        (value, _weight_path(trace, origin))
        for value, origin in origins
        if origin is not None and trace.provenance.is_weight(origin)
    )


def _weight_path(trace: Trace, weight: Value) -> str:
    """The path of the largest array that a weight is computed from."""
    roots = trace.provenance.roots(weight)
    if not roots:
        return "constant"
    return trace.path(max(roots, key=lambda root: math.prod(root.shape)))


def _names(trace: Trace, matches: Sequence[Match], others: Sequence[str]) -> list[str]:
    """Names of the sites: where their weights are, made unique in order of appearance, behind
    `others`.

    The folder that holds the weights of one site and nothing else names it; otherwise the
    weight that it ends with does.
    """
    names = []
    for match in matches:
        paths = list(dict.fromkeys(_weight_path(trace, li.weight) for li in match.linears))
        folder = posixpath.commonpath(paths) if len(paths) > 1 else paths[0]
        inside = {path for path in trace.paths if path.startswith(folder + "/")}
        owned = {trace.path(r) for w in match.weights for r in trace.provenance.roots(w)}
        name = folder if folder and inside <= owned else paths[-1]
        stack = posixpath.commonpath([_name_stack(linear.node) for linear in match.linears])
        names.append(f"{stack}:{name}" if stack else name)
    return unique(names, others)
