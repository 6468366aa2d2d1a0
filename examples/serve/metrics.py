"""Counters in the text format of Prometheus: of requests, and of what each site reads.

All are totals since the server began, of which a monitor takes rates. The share of tokens whose
greatest logit was proved, over five minutes:

    rate(hire_site_proved_tokens_total[5m]) / rate(hire_site_tokens_total[5m])
"""

from collections.abc import Iterable, Mapping

import hire_rewrite as hire

from .runner import Runner

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SITE = {
    "calls": ("hire_site_calls_total", "Runs of a layer of a site"),
    "tokens": ("hire_site_tokens_total", "Tokens in them, slots without a request included"),
    "read": ("hire_site_read_units_total", "Rows, groups of neurons or inputs read one by one"),
    "whole": ("hire_site_whole_calls_total", "Runs that read all of them"),
    "proved": ("hire_site_proved_tokens_total", "Tokens whose greatest values were proved"),
    "sampled": ("hire_site_sampled_tokens_total", "Tokens whose recall was measured"),
    "recalled": ("hire_site_recall_sum", "The sum of their recall, times 4096"),
}


def render(runner: Runner) -> str:
    """The page of `/metrics`."""
    engine = runner.engine
    lines = [
        *_metric("serve_tokens_total", "counter", "Tokens said", [({}, runner.tokens)]),
        *_metric("serve_requests_total", "counter", "Requests by how they ended",
                 [({"end": end}, n) for end, n in sorted(runner.ends.items())]),
        *_metric("serve_waiting", "gauge", "Requests that wait for a slot",
                 [({}, engine.waiting)]),
        *_metric("serve_slots_busy", "gauge", "Slots with a request", [({}, engine.busy)]),
        *_metric("serve_slots", "gauge", "Slots", [({}, engine.backend.slots)]),
        *of_sites(runner.telemetry),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def of_sites(telemetry: Mapping[str, hire.Telemetry]) -> list[str]:
    """The counters of all sites, those of all layers added up, by phase and name."""
    lines: list[str] = []
    for field, (name, text) in _SITE.items():
        samples = []
        for phase, counts in telemetry.items():
            for site in counts.sites:
                if (field == "proved" and not site.proves) or (
                    field in ("read", "whole", "sampled", "recalled") and not site.chooses
                ):
                    continue
                value = int(getattr(counts[site.name], field).sum())
                samples.append(({"phase": phase, "site": site.name}, value))
        lines += _metric(name, "counter", text, samples)
    return lines


def _metric(
    name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], int]]
) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    return lines


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
