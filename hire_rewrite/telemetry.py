"""What a function read while it served: counters that it returns beside its result."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.names import groups
from hire_rewrite.ops.usage import FIELDS, RECALL
from hire_rewrite.plan import table
from hire_rewrite.unexported import refuse_to_export

_COLUMNS = len(FIELDS) + 1


@dataclasses.dataclass(frozen=True)
class CountedSite:
    """A site that is counted.

    Attributes:
      name, kind: as in the plan.
      rows: of the counters: its layers, for each device that counts by itself.
      units: of what `read` counts, in a layer on one device: groups of neurons, rows of the
        vocabulary, inputs of a linear layer.
      by_call: whether a unit that several tokens of a call ask for is counted once.
      chooses: whether it reads some units and not others.
      proves: whether it proves its result.
    """

    name: str
    kind: str
    rows: int
    units: int
    by_call: bool
    chooses: bool
    proves: bool


class SiteCounts(NamedTuple):
    """The counters of a site, i64[rows] each: see `Telemetry`."""

    calls: np.ndarray
    tokens: np.ndarray
    read: np.ndarray
    whole: np.ndarray
    whole_tokens: np.ndarray
    proved: np.ndarray
    sampled: np.ndarray
    recalled: np.ndarray


@dataclasses.dataclass(frozen=True)
class SiteUsage:
    """What a site read, as shares; all layers together.

    Attributes:
      calls, tokens: of the layer that ran most.
      read: share of its units that a call read (or a token, where each has its own); None where
        nothing is chosen.
      whole: share of calls that read all units, for tokens asked for more than are read one by one,
        had no proof, or were too many; None alike.
      proved: share of tokens whose result was proved; None without `certify`.
      recall: share of the true top k (or of neurons that are not zero) that was read, of the tokens
        that were measured; None where none was.
    """

    calls: int
    tokens: int
    read: float | None
    whole: float | None
    proved: float | None
    recall: float | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Telemetry:
    """Counters of all packed sites of one call, or of many: `transform(fn, telemetry=True)`.

    A pytree of one small array. Those of several calls are added with `+`, on the device too: in a
    `lax.scan`, in a jitted step that takes the sum so far, by `jax.tree.map(jnp.add, a, b)`.
    Numbers on the device are u32 and wrap around: take them to the host (`on_host`) before `read`
    comes to 2^32 (of a site that reads 4,000 units for a token, before a million tokens have gone
    by) and before the recall of a million tokens was measured, and go on with a new sum.

    Attributes:
      counts: u32[rows, 9], the rows of all sites one after the other; i64 on the host. Under
        `vmap` with the mapped axis in front (`out_axes=0`); of a `shard_map` whose devices'
        counters are joined, those rows of each device. The columns, summed over calls:
        calls, tokens: runs of the site, and tokens in them.
        read: units that were read one by one.
        whole, whole_tokens: runs that read all units, and the tokens in them.
        proved: tokens whose result was proved.
        sampled, recalled: tokens whose recall was measured, and 4096 times the sum of it.
        Last, the calls times a number of the row, modulo 2^32: whether rows and columns are where
        they were.
      sites: in the order of the plan.

    Examples:
      >>> import jax.numpy as jnp, hire_rewrite as hire
      >>> fn = lambda params, x: x @ params["vocabulary"]
      >>> rule = hire.Head(k=4, candidates=8, min_width=1, force=True)
      >>> step = hire.transform(fn, rule, telemetry=True)
      >>> params = {"vocabulary": jnp.sin(jnp.arange(1024.0)).reshape(16, 64)}
      >>> packed = step.pack(params, jnp.ones((1, 16)))
      >>> logits, telemetry = step(packed, jnp.ones((1, 16)))
      >>> logits, more = step(packed, jnp.ones((1, 16)))
      >>> (telemetry + more).summary()["params/vocabulary"]
      SiteUsage(calls=2, tokens=2, read=0.125, whole=0.0, proved=None, recall=None)
    """

    counts: Any
    sites: tuple[CountedSite, ...] = dataclasses.field(metadata={"static": True})

    def __add__(self, other: Telemetry) -> Telemetry:
        """The sum; of other sites too, such as those of a prompt and of a step. On the host if
        either is."""
        if not isinstance(other, Telemetry):
            return NotImplemented
        if isinstance(self.counts, np.ndarray) != isinstance(other.counts, np.ndarray):
            return self.on_host() + other.on_host()
        if self.sites == other.sites and self.counts.shape == other.counts.shape:
            return Telemetry(self.counts + other.counts, self.sites)
        mine, others = _by_name(self), _by_name(other)
        known = {site.name: site for site in (*other.sites, *self.sites)}
        for name in mine.keys() & others.keys():
            sites = [site for site in (*self.sites, *other.sites) if site.name == name]
            if sites[0] != sites[1]:
                raise HireRewriteError(
                    f"{name}: telemetry of two functions that read it differently ({sites[0]} and "
                    f"{sites[1]}): add up each by itself"
                )
        sums = {**mine, **{n: mine[n] + c if n in mine else c for n, c in others.items()}}
        host = all(isinstance(counts, np.ndarray) for counts in sums.values())
        counts = (np if host else jax.numpy).concatenate(list(sums.values()), axis=-2)
        return Telemetry(counts, tuple(known[name] for name in sums))

    def __radd__(self, other: Any) -> Telemetry:
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __getitem__(self, name: str) -> SiteCounts:
        """The counters of a site by layer; a short part of its name will do if it is the only one.

        Raises:
          HireRewriteError: it is not a name, there is no such site, or there are several.
        """
        if not isinstance(name, str):
            raise HireRewriteError(
                f"telemetry[{name!r}]: give the name of a site, one of "
                f"{', '.join(site.name for site in self.sites)}"
            )
        found = [site.name for site in self.sites if site.name == name]
        found = found or [site.name for site in self.sites if name in site.name]
        if len(found) != 1:
            known = ", ".join(found or [site.name for site in self.sites])
            raise HireRewriteError(f"telemetry[{name!r}]: give one of {known}")
        return _site_counts(_by_name(self.on_host())[found[0]])

    def on_host(self) -> Telemetry:
        """The same with i64 counters in NumPy, those of mapped calls added up; waits for them.

        Raises:
          HireRewriteError: they are traced, or shapes, or not where they were (axes of mapped calls
            that are not in front, other columns).
        """
        if isinstance(self.counts, jax.ShapeDtypeStruct):
            raise HireRewriteError("telemetry of shapes has no counters: call the function")
        if isinstance(self.counts, jax.core.Tracer):
            raise HireRewriteError(
                "telemetry that is traced is not on the host, nor added to a sum there: return it, "
                "and add it outside of jit"
            )
        counts = np.asarray(jax.device_get(self.counts)).astype(np.int64)
        counts = _added_up(counts, self.sites)
        _check_places(counts, self.sites)
        return Telemetry(counts, self.sites)

    def summary(self) -> dict[str, SiteUsage]:
        """What each site read, by name; sites that never ran have no shares."""
        host = self.on_host()
        counts = _by_name(host)
        return {site.name: _usage(site, _site_counts(counts[site.name])) for site in host.sites}

    def __str__(self) -> str:
        """Sites that are alike share a row: its figures are the least and the greatest."""
        summary = self.summary()

        def alike(site: CountedSite) -> Hashable:
            usage = summary[site.name]
            return site.kind, site.units, usage.calls, usage.tokens, site.chooses, site.proves

        shown = ("read", "whole", "proved", "recall")
        rows = [["site", "calls", "tokens", *shown]]
        for name, sites in groups(self.sites, lambda site: site.name, alike):
            usages = [summary[site.name] for site in sites]
            label = f"{name} ({len(sites)})" if len(sites) > 1 else name
            shares = ([getattr(usage, field) for usage in usages] for field in shown)
            first = usages[0]
            rows.append([label, str(first.calls), str(first.tokens), *map(_range, shares)])
        return table(rows) if self.sites else "no site is counted"


refuse_to_export(
    Telemetry,
    "the exported function returns a Telemetry, and no program that is serialized "
    "can, for only this package knows its structure: return `telemetry.counts`",
)


def collected(sites: Sequence[CountedSite], reports: Mapping[str, Any]) -> Telemetry:
    """The telemetry of a call.

    Args:
      reports: for each site u32[rows, 8].
    """
    if not sites:
        return Telemetry(jax.numpy.zeros((0, _COLUMNS), jax.numpy.uint32), ())
    counts = jax.numpy.concatenate([reports[site.name] for site in sites])
    places = counts[:, :1] * _row_numbers(sites)[:, None]
    return Telemetry(jax.numpy.concatenate([counts, places], axis=1), tuple(sites))


def _row_numbers(sites: Sequence[CountedSite]) -> np.ndarray:
    """u32[rows], an odd number for each row, so that it times the calls is not that of others."""
    labels = [f"{site.name}/{row}" for site in sites for row in range(site.rows)]
    return np.array([zlib.crc32(label.encode()) | 1 for label in labels], np.uint32)


def _check_places(counts: np.ndarray, sites: Sequence[CountedSite]) -> None:
    """Refuses i64[rows, 9] that were read along other axes than they were counted."""
    if not sites:
        return
    calls, places = counts[:, 0].astype(np.uint32), counts[:, -1].astype(np.uint32)
    if not np.array_equal(calls * _row_numbers(sites), places):
        raise HireRewriteError(
            "telemetry: its counts are not in the rows and columns in which they were counted: "
            "return it as it is, with mapped axes in front (out_axes=0)"
        )


def _added_up(counts: Any, sites: Sequence[CountedSite]) -> Any:
    """[rows, 9], those of mapped calls, and of several devices, added up.

    Raises:
      HireRewriteError: these are no counters of the sites.
    """
    rows, shape = sum(site.rows for site in sites), counts.shape
    if len(shape) < 2 or shape[-1] != _COLUMNS or shape[-2] % max(rows, 1) or rows > shape[-2]:
        raise HireRewriteError(
            f"telemetry: counts are {list(shape)}, where its sites have [..., {rows}, {_COLUMNS}]: "
            "return it as it is, with mapped axes in front (out_axes=0)"
        )
    return counts.reshape(-1, rows, _COLUMNS).sum(0, dtype=counts.dtype) if rows else counts


def _by_name(telemetry: Telemetry) -> dict[str, Any]:
    """The counters of each site, [rows, 9]."""
    counts, found, start = _added_up(telemetry.counts, telemetry.sites), {}, 0
    for site in telemetry.sites:
        found[site.name] = counts[start : start + site.rows]
        start += site.rows
    return found


def _site_counts(counts: np.ndarray) -> SiteCounts:
    return SiteCounts(*counts[:, : len(FIELDS)].T)


def _usage(site: CountedSite, counts: SiteCounts) -> SiteUsage:
    calls, tokens = int(counts.calls.sum()), int(counts.tokens.sum())
    read: float | None = None
    whole: float | None = None
    if site.chooses and calls:
        all_of = counts.whole if site.by_call else counts.whole_tokens
        units = int(counts.read.sum() + site.units * all_of.sum())
        read = units / max(1, site.units * (calls if site.by_call else tokens))
        whole = int(counts.whole.sum()) / calls
    proved = int(counts.proved.sum()) / tokens if site.proves and tokens else None
    sampled = int(counts.sampled.sum())
    recall = int(counts.recalled.sum()) / (RECALL * sampled) if sampled else None
    most = int(counts.calls.max(initial=0)), int(counts.tokens.max(initial=0))
    return SiteUsage(*most, read, whole, proved, recall)


def _range(shares: Sequence[float | None]) -> str:
    known = [share for share in shares if share is not None]
    ends = [f"{end(known):.2%}" for end in (min, max)] if known else []
    return "–".join(dict.fromkeys(ends))
