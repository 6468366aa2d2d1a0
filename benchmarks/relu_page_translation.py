"""The section of `docs/relu.md` on Marian's translations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import table

Row = Mapping[str, Any]


def lines(result: Mapping[str, Row], times: Mapping[str, Row]) -> Iterable[str]:
    """Each direction, and its times, which are measured apart.

    Args:
      result, times: of each language that is translated from.
    """
    first = next(iter(result.values()))
    yield "\n## Translations\n"
    yield (
        "[Marian's English-Portuguese models](../examples/translate): "
        f"{len(first['layers'])} FFNs of 256 / 1536 with a plain ReLU, encoder and decoder "
        "rewritten, batch 1. English sentences are from help texts, licenses and the World English "
        "Bible; Portuguese ones are what the model made of them. The weights are of 8 bits in the "
        "file, and every rewritten side reads the same numbers from 8 bits, of other layers too; "
        "“no rules” also leaves out zeros where that is expected to pay. A guess in 8 bits reads "
        "as much as the rows themselves: what a proof can save is to be seen in the larger blocks "
        "below."
    )
    for language, found in result.items():
        yield from _direction(language, found)
        if language in times:
            yield from _times(times[language])


def _direction(language: str, found: Row) -> Iterable[str]:
    yield f"\n### From {language.capitalize()}\n"
    searches = list(found["tokens"])
    of = ", ".join(f"{n:,} tokens {name}" for name, n in found["tokens"].items())
    yield (
        f"{found['sentences']} sentences, {of}. Translations that are the dense model's, token for "
        "token; MB of weights for a token of the decoder, of the FFNs alone in parentheses."
    )
    yield ""
    rows = [["dense", *[""] * len(searches), _mb(found["bytes"])]]
    for name, side in found["sides"].items():
        same = (f"{side[how]['same']} of {side[how]['of']}" for how in searches)
        rows.append([name, *same, _mb(side["bytes"])])
    yield from table(["", *(f"same, {how}" for how in searches), "MB"], rows)
    yield ""
    yield from _differing(found["sides"], searches)
    logits = found["logits"]
    yield (
        f"\nLogits of {logits['tokens']:,} steps that read the same tokens, proved from 8 bits: at "
        f"most {logits['off']:.1e} from the dense model's; those of the dense model with its "
        f"neurons in another order, {logits['orders']:.1e}. The greatest is "
        f"{logits['greatest']:.0f}."
    )
    yield "\nBy layer: the share of neurons that is positive, and that is read; in parentheses how"
    yield "many of the positive ones are missed, and of the tokens how many read all rows.\n"
    names = list(found["layers"][0]["rules"])
    yield from table(
        ["layer", "positive", *names, "proved zero"],
        [
            [f"{row['part']} {row['layer']}", f"{row['positive']:.1%}",
             *(_layer(row["rules"][name]) for name in names),
             f"{1 - row['rules']['proved from 8 bits']['read']:.1%}"]
            for row in found["layers"]
        ],
    )  # fmt: skip


def _times(times: Mapping[str, Row]) -> Iterable[str]:
    yield (
        "\nMilliseconds, and times as fast as dense: of a token, and of a sentence that the "
        "encoder reads.\n"
    )
    names = list(next(iter(times.values())))
    yield from table(
        ["", *times],
        [
            [name, *(f"{each[name]['median_ms']:.2f}, **{each[name]['ratio']:.2f} ×**"
                     for each in times.values())]
            for name in names
        ],
    )  # fmt: skip
    greedy, beam = (times[how]["dense"]["median_ms"] for how in list(times)[:2])
    if greedy > beam:
        yield (
            "\nThe dense model takes longer for one token than for those of a beam together (XLA "
            "multiplies one row by matrices of this size slowly): what leaving out zeros changes "
            "is to be seen beside “the same numbers, all read”."
        )
    slower = [name for name, row in times[list(times)[-1]].items() if row["ratio"] < 1]
    if slower:
        yield (
            "\nA sentence is up to 64 tokens at once, of matrices that lie in caches. Without "
            "rules the plan of such a call is dense, but its weights are packed in 8 bits and "
            "decoded at every call; what is forced is no faster. Translate with the encoder's own "
            "weights and the rewritten step."
        )


def _mb(sizes: Sequence[int]) -> str:
    every, blocks = sizes
    return f"{every / 1e6:.1f} ({blocks / 1e6:.2f})"


def _layer(row: Row) -> str:
    return f"{row['read']:.1%} ({row['missed']:.3%}, {row['whole']:.1%})"


def _differing(sides: Mapping[str, Row], searches: Sequence[str]) -> Iterable[str]:
    """How near the decisions were where translations differ."""
    said = []
    for name, side in sides.items():
        for how in searches:
            gaps, scores = side[how].get("gaps"), side[how].get("scores")
            if gaps:
                said.append(f"{name}, {how}: {_some(gaps)} (logits)")
            if scores:
                said.append(f"{name}, {how}: {_some(scores)} (scores)")
    if not said:
        yield "No translation differs."
        return
    yield (
        "Where they differ, how near it was: of a greedy one the difference of the dense model's "
        "two best logits at the first other token; of a beam's the dense model's mean log "
        "probability of its own translation above that of the other. Median, and the greatest:"
    )
    yield ""
    yield from (f"* {line}" for line in said)


def _some(values: Sequence[float]) -> str:
    return f"{values[len(values) // 2]:.2g}, {max(values):.2g}"
