"""`docs/quality.md` from `results/quality.json` and `results/pretrain.json`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.markdown import table

PAGE = Path(__file__).parent.parent / "docs" / "quality.md"


def write() -> Path:
    """Write the page and return its path."""
    quality, trained = (
        json.loads((timing.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("quality", "pretrain")
    )
    lines = [*_page(quality), *_trained(trained)]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return PAGE


def _page(result: Mapping[str, Any]) -> Iterable[str]:
    kinds = ("help", "code", "license", "table")
    yield "# Quality on SmolLM2-135M"
    yield ""
    machine = result["machine"]
    yield (
        f"Written by `{result['command']}` (jax {machine['jax']}, Python {machine['python']}): "
        f"predictors are fitted to {result['fitted_tokens']:,} tokens of Python's help topics, and "
        f"measured on {result['measured_tokens']:,} other tokens of them and as many of each of "
        "the other kinds: the standard library's code, licenses, and a table of Unicode names. "
        "Whole text is read; nothing is generated unless it says so. The numbers are in "
        "[quality.json](../benchmarks/results/quality.json)."
    )
    if "compressed" in result:
        yield from _compressed(result["compressed"], kinds)
    if "heads" in result:
        yield from _heads(result["heads"], kinds)
    if {"heads", "mixing"} <= result.keys():
        alone = [{"fitted_to": "help"} | row for row in result["heads"][:2]]
        yield from _mixing([*alone, *result["mixing"]], kinds)
    if "certified" in result:
        yield from _certified(result["certified"], result.get("heads"), kinds)
    if "blocks" in result:
        yield from _blocks(result["blocks"], kinds)
    if "tuned" in result:
        yield from _tuned(result["tuned"], kinds)


def _compressed(models: Sequence[Any], kinds: Sequence[str]) -> Iterable[str]:
    yield "\n## Compressed everywhere, exact where it counts\n"
    yield (
        "Layers are read from a compressed copy, and a few neurons of an FFN "
        '(`FFN(k, tail="predicted")`) or a few inputs of any other layer (`Linear(k)`) meet their '
        "rows as the model has them, each token its own. Embedding and head stay as they are. For "
        "each kind of text: the change of perplexity, and the divergence (KL, nats a token) from "
        "the dense float32 model. Bytes are those that the compressed layers read for a token, as "
        "a share of their float32 ones. Encodings have a scale for each block of 32 numbers, "
        "unless it is one for a row; neurons are ranked by ∣h∣ times the norm of their row of the "
        "last matrix, unless it is by ∣h∣ alone.\n"
    )
    yield (
        "Windows are read whole, which rounds no inputs: from 32 tokens on layers multiply by "
        "decoded rows, the same numbers as in decoding. Each token has its own neurons and inputs "
        "exactly, as it has alone."
    )
    for result in models:
        yield f"\n### {result['model']}\n"
        yield (
            f"{result['tokens']:,} tokens of each kind, in windows of {result['length']}; the "
            f"dense model's perplexity: {_by_kind(result['perplexity'], kinds)}. "
            f"{result.get('note', '')}".rstrip()
        )
        for part, rows in result["rows"].items():
            yield ""
            yield from table(
                [part, "bytes", *kinds],
                [
                    [name, _share(row["bytes"]), *_changes(row, result["perplexity"], kinds)]
                    for name, row in rows.items()
                ],
            )
        if "decoded" in result:
            yield from _decoded(result["decoded"], kinds)


def _decoded(result: Mapping[str, Any], kinds: Sequence[str]) -> Iterable[str]:
    yield (
        f"\nThe same of one row, {result['row']}, on the first {result['tokens']} tokens of each "
        "kind: at once as above, and decoded token by token, which is also done with the inputs "
        "of the compressed products rounded to 8 bits (`round_inputs=True`). The dense model's "
        f"perplexity on them: {_by_kind(result['perplexity'], kinds)}.\n"
    )
    yield from table(
        ["read", *kinds],
        [
            [name, *_changes(row, result["perplexity"], kinds)]
            for name, row in result["rows"].items()
        ],
    )


def _changes(row: Mapping[str, Any], dense: Mapping[str, float], kinds: Sequence[str]) -> list[str]:
    return [
        f"{row[kind]['perplexity'] / dense[kind] - 1:+.2%} · {row[kind]['kl']:.4f}"
        for kind in kinds
    ]


def _share(sizes: Sequence[int]) -> str:
    before, after = sizes
    return f"{after / before:.1%}"


def _by_kind(values: Mapping[str, float], kinds: Sequence[str]) -> str:
    return ", ".join(f"{kind} {values[kind]:.2f}" for kind in kinds)


def _heads(rows: Sequence[Any], kinds: Sequence[str]) -> Iterable[str]:
    yield "\n## The vocabulary head\n"
    yield (
        "For each kind of text: how often the dense arg max is among 256 candidates, the share of "
        "the 64 greatest logits among 512, and the perplexity through the rewritten head "
        '(`tail="predicted"`) over the dense one\'s.\n'
    )
    yield from table(
        ["predictor", "MB read", *kinds],
        [
            [f"`{row['rule']}`", f"{row['bytes'] / 1e6:.1f}", *(_cell(row[kind]) for kind in kinds)]
            for row in rows
        ],
    )


def _cell(values: Mapping[str, Any]) -> str:
    dense, hire = values["perplexity"]
    return f"{values['arg_max']:.2%} · {values['top_at_512']:.3f} · {hire / dense - 1:+.2%}"


def _mixing(rows: Sequence[Any], kinds: Sequence[str]) -> Iterable[str]:
    yield "\n## What mixing gains\n"
    yield (
        "The same number of tokens, of one kind or half of each of two; what the model says is "
        "sampled from it at temperature 1, after any first token.\n"
    )
    yield from table(
        ["fitted to", "predictor", *kinds],
        [
            [row["fitted_to"], f"`{row['rule']}`"]
            + [f"{row[kind]['arg_max']:.2%} · {row[kind]['top_at_512']:.3f}" for kind in kinds]
            for row in rows
        ],
    )


def _certified(
    result: Mapping[str, Any], heads: Sequence[Any] | None, kinds: Sequence[str]
) -> Iterable[str]:
    yield "\n## Certified\n"
    yield (
        f"Of {result['tokens']:,} greedy tokens of a step with `Head(certify=True)` "
        f"({result['streams']} streams at a time, each on its own tokens before) "
        f"{result['same']:,} are the dense model's. [How](certify.md)."
    )
    if heads is not None:
        shares = ", ".join(f"{kind} {heads[-1][kind]['proved']:.2%}" for kind in kinds)
        yield (
            f"\nOf the tokens above `{heads[-1]['rule']}` proves these shares, and the others are "
            f"computed densely: {shares}."
        )


def _blocks(results: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Iterable[str]:
    yield "\n## FFN blocks\n"
    yield (
        f"`FFN(k=0.5, candidates=0.6)` with `{results[0]['rule']}`. This model was not trained "
        "with a top-k: keeping half of its neurons makes it worse, whatever predicts them, and "
        "groups of 8 make it much worse. What HiRE adds to that is the step from exact to "
        "rewritten. At these sizes it hardly pays, and is only done because of `force`.\n"
    )
    rows = []
    for result in results:
        for kind in kinds:
            dense, exact, hire = result[kind]["perplexity"]
            mean, worst = result[kind]["recall"]
            rows.append(
                [str(result["group"]), kind, f"{dense:.2f}", f"{exact:.2f}", f"{hire:.2f}",
                 f"{hire / exact - 1:+.2%}", f"{mean:.3f}", f"{worst:.3f}"]
            )  # fmt: skip
    header = ["group", "text", "dense", "exact top-k", "rewritten", "", "recall", "worst layer"]
    yield from table(header, rows)


def _tuned(result: Mapping[str, Any], kinds: Sequence[str]) -> Iterable[str]:
    yield "\n## Tuned\n"
    yield "`step.tune(params, batches, recall=0.99)` on help texts alone chooses\n"
    for rule in result["rules"]:
        yield f"* `{rule}`"
    yield "\nIt reads, and recalls in its worst layer on text that it did not see:\n"
    rows = []
    for name, (default, size) in result["bytes"].items():
        recalls = [f"{result[kind][name]:.4f}" for kind in kinds]
        rows.append([name, f"{default / 1e6:.1f}", f"{size / 1e6:.1f}", *recalls])
    yield from table(["site", "MB by default", "MB tuned", *kinds], rows)


def _trained(result: Mapping[str, Any]) -> Iterable[str]:
    yield "\n# Quality of models that were trained from scratch\n"
    sizes = next(iter(result["architectures"].values()))["topk"]
    yield (
        f"Written by `{result['command']}`: small language models ({sizes['parameters']:,} "
        f"parameters, {sizes['tokens']:,} tokens of the {result['text']['name']}), trained dense "
        f"and with `{result['rule']}` in mode `exact`, alike in all else; then converted for "
        "decoding. Losses are nats per token of chapters that were held out.\n"
    )
    yield "## Trained with a top-k, which is predicted\n"
    rows = []
    for name, arms in result["architectures"].items():
        dense = arms["dense"]["validation_loss"]
        for row in arms["topk"]["converted"]:
            exact, hire = row["losses"]["exact"], row["losses"]["rewritten"]
            before, after = row["bytes"]
            rows.append(
                [name, f"{dense:.4f}", f"{exact:.4f} ({exact / dense - 1:+.2%})",
                 f"`{row['predictor']}`", f"{row['k']} of {row['candidates']}",
                 f"{hire:.4f} ({row['above_exact']:+.2%})", f"{min(row['recall']):.3f}",
                 f"{before / 1e6:.2f} → {after / 1e6:.2f}"]
            )  # fmt: skip
    header = ["FFN", "trained dense", "trained with top-k", "predictor", "neurons", "rewritten",
              "recall of the worst layer", "MB read"]  # fmt: skip
    yield from table(header, rows)
    architectures = result["architectures"]
    every = {name: arms for name, arms in architectures.items() if "lossless" in arms["dense"]}
    if every:
        yield from _lossless(result, every)


def _lossless(result: Mapping[str, Any], every: Mapping[str, Any]) -> Iterable[str]:
    """The dense models without what their ReLUs make zero."""
    config = next(iter(every.values()))["dense"]["setting"]["config"]
    decoded = next(iter(every.values()))["dense"]["lossless"][0]["decoded"]
    others = ", ".join(f"{name} {arms['topk']['other_way']:.4f}" for name, arms in every.items())
    yield "\n## Trained dense, without the neurons that are zero\n"
    yield (
        "Nothing is trained for this: behind a ReLU a neuron that is not positive adds nothing, "
        'and `FFN(k="positive")` does not read its rows. The first product tells which those are, '
        "or they are proved from 8 bits; either loses nothing but the order of sums. With 4 bits "
        "and 3 standard deviations few positive neurons are missed ([how](relu.md)). Rows of d = "
        f"{config['d_model']} numbers are so short that the time need not pay: how many times as "
        'fast as dense the plan takes the blocks to be is under "expected" (where the first '
        "product tells, with half of the neurons positive, for nothing is calibrated), and "
        "`force=True` rewrites them all the same.\n"
    )
    yield (
        f"The change of the dense model's loss on {result['text']['validation_tokens']:,} tokens; "
        f"and on {decoded['tokens']:,} of them that are decoded one by one through `decode_step`, "
        "with the greatest difference of two logits. Shares are of each layer, where positive "
        "neurons are those that the first product tells, and misses are of positive ones. Calls "
        "that ask for more neurons than the budget run whole. MB are of the FFNs for a token, with "
        "the share that was measured and with the numbers that bound errors.\n"
    )
    rows = []
    for name, arms in every.items():
        told = arms["dense"]["lossless"][0]["read"]
        for row in arms["dense"]["lossless"]:
            losses, steps = row["losses"], row["decoded"]
            before, after = row["bytes"]
            rows.append(
                [name, row["way"], f"{losses['dense']:.5f}",
                 f"{losses['rewritten'] - losses['dense']:+.1e}",
                 f"{steps['rewritten'] - steps['dense']:+.1e} ({steps['difference']:.1e})",
                 _each(told), _each(row["read"]), f"{max(row['missed']):.4%}",
                 f"{row['whole']:.2%}", f"{before / 1e6:.2f} → {after / 1e6:.2f}",
                 f"{row['expected']:.2f} ×"]
            )  # fmt: skip
    header = ["FFN", "neurons", "loss", "change", "decoded (logits)", "positive", "read", "missed",
              "whole", "MB read", "expected"]  # fmt: skip
    yield from table(header, rows)
    yield (
        "\nModels that were trained with a top-k are not converted so: with all of their positive "
        f"neurons they are run in the way that they were not trained in (losses: {others})."
    )


def _each(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)
