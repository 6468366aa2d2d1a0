"""`docs/benchmarks.md` from the results of the benchmarks.

`python -m benchmarks.page` writes it; what was not measured yet is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.markdown import table

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

Row = Mapping[str, Any]


def write() -> Path:
    """Write the page and return its path."""
    PAGE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
    return PAGE


def lines() -> Iterable[str]:
    yield "# Benchmarks"
    yield ""
    yield (
        "Written by `make bench`. All sides of a table ran in one process and took turns, each "
        "call with cold caches unless it says otherwise; figures are medians, the spread is the "
        "range of the middle half of the rounds over the median, and a ratio is the median over "
        "the rounds of how many times as fast as the first row a side was. The floor is the bytes "
        "that a side reads over the bandwidth that was measured in the same run: no program that "
        "reads them can be faster. Weights are float32."
    )
    sections: dict[str, Callable[[Row], Iterable[str]]] = {
        "decode_1b": _decode,
        "smollm2_step": _smollm2,
        "gemma3": _gemma3,
        "head": _heads,
        "ffn": _blocks,
        "products": _products,
        "top_k": _top_k,
        "estimate": _estimate,
        "overhead": _overhead,
    }
    for name, section in sections.items():
        path = timing.RESULTS / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            yield from section(result)
            yield f"\n{_source(name, result)}"


def _source(name: str, result: Row) -> str:
    machine = result["machine"]
    versions = {"jax": machine["jax"], **result.get("libraries", {})}
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"`{result['command']}` on {machine['processor']}, {machine['cores']} cores, Python "
        f"{machine['python']}, {libraries}: "
        f"[{name}.json](../benchmarks/results/{name}.json)."
    )


def _decode(result: Row) -> Iterable[str]:
    yield "\n## A decode step of 1.24 B parameters\n"
    yield (
        f"{result['layers']} layers with the sizes of Llama-3.2-1B and random weights, so that "
        "nothing is said of recall; caches are as warm as one step leaves them. “By hand” calls "
        "the same operations on the same arrays, written into the model's own code. Milliseconds; "
        "ratios are to the rewritten step. The rules:"
    )
    yield ""
    for way, rules in result["rules"].items():
        yield f"* {way}: {', '.join(f'`{rule}`' for rule in rules)}"
    yield ""
    others = [name for name in ("torch f32", "torch int8") if f"{name} ms" in result["rows"][0]]
    yield from table(
        ["", "batch", "dense", "rewritten", "spread", "floor", "**times dense**",
         "by hand", *others, "sites"],
        [
            [row["way"], str(row["batch"]), f"{row['dense ms']:.1f}",
             f"{row['rewritten ms']:.1f}", f"{row['spread']:.0%}", f"{row['floor ms']:.1f}",
             f"**{row['times dense']:.2f} ×**",
             f"{row['by hand ms']:.1f}, {row['times by hand']:.3f} ×",
             *(f"{row[f'{name} ms']:.1f}, {row[f'times {name}']:.2f} ×" for name in others),
             row["sites"]]
            for row in result["rows"]
        ],
    )  # fmt: skip
    packing = ", ".join(f"{way} {seconds:.0f} s" for way, seconds in result["packing s"].items())
    yield f"\nPacking: {packing}."
    if "torch" in result:
        yield f"\ntorch: {result['torch']}."


def _smollm2(result: Row) -> Iterable[str]:
    yield "\n## A decode step of SmolLM2-135M\n"
    yield f"{_STEP} (Q4_1, the embedding Q8_0), {_PEER}"
    yield ""
    yield from _whole_step(result)


def _gemma3(result: Row) -> Iterable[str]:
    types = ", ".join(dict.fromkeys(row["type"] for row in result["grids"]))
    exact = result["step"]["without rules"]
    yield "\n## A decode step of Gemma 3 270M\n"
    yield (
        f"{_STEP} ({types}), {_PEER} Text begins with the token that the model expects. Without "
        f"rules {exact['sites']} sites hold the same numbers in fewer bytes: "
        f"{exact['bytes_before'] / 1e6:.0f} MB become {exact['bytes_after'] / 1e6:.0f} MB."
    )
    yield ""
    yield from _whole_step(result["step"])
    yield (
        "\nWhat holds the file's matrices exactly, by the way in which it quantizes them; where "
        "those of all layers differ, a step without rules needs what holds them all."
    )
    yield ""
    yield from table(
        ["tensor", "type", "matrices", "MB in the file", "MB", "exactly held by", "all layers by"],
        [
            [row["tensor"], row["type"], str(row["count"]), f"{row['file_bytes'] / 1e6:.1f}",
             f"{row['bytes'] / 1e6:.1f}",
             *(f"`{row[what]}`" if row[what] else "float32" for what in ("encoding", "together"))]
            for row in result["grids"]
        ],
    )  # fmt: skip


_STEP = (
    "Batch 1. Divergence (KL, nats a token), the share of tokens whose likeliest next one is the "
    "same, and perplexity are those of the steps that were timed, on texts of several kinds, "
    "beside the dense model in float32. llama.cpp reads the file that all the weights come from"
)
_PEER = "with as many threads; its wheel is compiled for AVX2."


def _whole_step(step: Row) -> Iterable[str]:
    """A table of the sides, and why some are missing."""
    yield from table(
        ["", "ms", "tokens/s", "spread", "**times dense**", "MB", "floor ms", *_SAID],
        [
            [name, f"{row['median_ms']:.1f}", f"{1e3 / row['median_ms']:.1f}",
             f"{row['spread']:.0%}", f"**{row['ratio']:.2f} ×**", f"{row['bytes'] / 1e6:.0f}",
             f"{row['floor_ms']:.1f}",
             *(form.format(row[what]["all"]) if what in row else ""
               for what, form in _SAID.values())]
            for name, row in step["sides"].items()
        ],
    )  # fmt: skip
    for name, reason in step.get("missing", {}).items():
        yield f"\n{name}: {reason}."
    if "prompts" in step:
        yield from _prompts(step["prompts"])


def _prompts(prompts: Mapping[str, Mapping[str, Row]]) -> Iterable[str]:
    """A table of the sides and the lengths of prompts."""
    yield (
        "\nReading a prompt at once, with the weights that the step was packed to; milliseconds, "
        "times as fast as dense, and how many of the packed sites are rewritten for so many tokens "
        "(the others multiply in dense arithmetic what they were packed to):"
    )
    yield ""
    names = list(next(iter(prompts.values())))
    yield from table(
        ["", *(f"{length} tokens" for length in prompts)],
        [[name, *(_prompt_cell(rows[name]) for rows in prompts.values())] for name in names],
    )


def _prompt_cell(row: Row) -> str:
    sites = f", {row['rewritten']} of {row['packed']}" if row["packed"] else ""
    return f"{row['median_ms']:.0f}, **{row['ratio']:.2f} ×**{sites}"


_SAID = {
    "KL": ("kl", "{:.4f}"),
    "same token": ("same_token", "{:.1%}"),
    "perplexity": ("perplexity", "{:.2f}"),
}


def _estimate(result: Row) -> Iterable[str]:
    rows = result["rows"]
    right = sum(row["sign"] == "right" for row in rows)
    yield "\n## What the plan expects\n"
    yield (
        f"{len(rows)} sites, all rewritten: for {right} the plan is right whether that pays (or "
        f"it makes less than 5 %). Expected on: {result['expected on']}. Those where it is wrong, "
        "and those that are slower than dense:"
    )
    yield ""
    some = [row for row in rows if row["sign"] == "wrong" or row["measured"] < 1]
    yield from table(
        ["site", "batch", "predictor", "expected", "measured", "sign"],
        [
            [row["what"], str(row["tokens"]), f"`{row['predictor']}`", f"{row['expected']:.2f} ×",
             f"{row['measured']:.2f} ×", row["sign"]]
            for row in some
        ],
    )  # fmt: skip


def _heads(result: Row) -> Iterable[str]:
    yield "\n## Vocabulary heads\n"
    one, many = result["goal"].values()
    yield (
        f"Each side takes as few candidates as it needs to find {one:.1%} of the greatest logits "
        f"and {many:.0%} of the 64 greatest, and returns these 64 and their rows; the row of one "
        "that does not get there is marked with an asterisk. Ratios are to the dense logits in "
        "JAX alone, without any selection. “Logits alone” is a side's own approximation of all of "
        "them: rewritten ones have the exact values at the candidates, those of the other "
        "libraries are not refined. Setting up is done once; it includes training."
    )
    for head in result["heads"]:
        yield f"\n### {head['what'].removeprefix('head ')}\n"
        before, after = head["jax logits ms"].values()
        shown = head["outstanding"]
        yield (
            f"{head['queries']:,} queries. The greatest logit stands {shown['1']} standard "
            f"deviations above the mean, the second {shown['2']}, the 64th {shown['64']}. "
            f"{head['read_gb_s']} GB/s."
        )
        if before is not None:
            yield (
                f"Dense logits took {before} ms before the other libraries were loaded, and "
                f"{after} ms beside them."
            )
        header = ["candidates", "top 1", "top 64", *_TIMED, "logits alone", "set up s"]
        yield from _by_batch(head, header, _head_row)


def _head_row(row: Row) -> list[str]:
    recalls = [f"{one:.4f}" for one in row.get("recall", ())] or ["", ""]
    alone = f"{row['logits ms']:.2f} ms, {row['logits ratio']:.1f} ×" if "logits ms" in row else ""
    return [
        _named(row),
        str(row.get("candidates", "")),
        *recalls,
        *_timed(row),
        alone,
        str(row.get("setup s", "")),
    ]


def _blocks(result: Row) -> Iterable[str]:
    yield "\n## Feed-forward blocks\n"
    yield (
        f"Gated, with ReLU; the greatest {result['k']:.0%} of the neurons count, and each "
        f"predictor takes as few candidates as it needs to find {result['goal']:.0%} of those. "
        "Neurons are chosen one by one, or in groups (then k and candidates are groups). Ratios "
        "are to the dense block in JAX. The errors are relative ones of the output: of rewritten "
        "blocks against the exact top k, of other libraries against the dense block."
    )
    for block in result["blocks"]:
        yield f"\n### {block['what'].removeprefix('gated FFN ')}\n"
        yield (
            f"{block['measured tokens']:,} tokens; the {result['k']:.0%} hold "
            f"{block['share of squares']:.0%} of the sum of squares. {block['read_gb_s']} GB/s."
        )
        header = ["k", "candidates", "recall", *_TIMED, "error"]
        yield from _by_batch(block, header, _block_row)


def _block_row(row: Row) -> list[str]:
    errors = [row[name] for name in ("error to top k", "error to dense") if name in row]
    recall = f"{row['recall']:.4f}" if "recall" in row else ""
    sizes = [str(row.get(name, "")) for name in ("k", "candidates")]
    return [_named(row), *sizes, recall, *_timed(row), "".join(f"{one:.2%}" for one in errors)]


def _named(row: Row) -> str:
    name = f"`{row['side']}`" if "(" in row["side"] else row["side"]
    name = f"**{name}**" if row["ours"] else name
    return name if row.get("reached", True) else f"{name} *"


_TIMED = ("ms", "spread", "ratio", "MB", "floor ms", "× floor")


def _timed(row: Row) -> list[str]:
    """The cells of _TIMED."""
    return [
        f"{row['median ms']:.2f}",
        f"{row['spread']:.0%}",
        f"{row['ratio']:.1f} ×",
        f"{row['bytes'] / 1e6:.0f}",
        f"{row['floor ms']:.2f}",
        f"{row['median ms'] / row['floor ms']:.1f}",
    ]


def _by_batch(
    result: Row, header: Sequence[str], cells: Callable[[Row], Sequence[str]]
) -> Iterable[str]:
    """A table for each batch, and why sides are missing."""
    for tokens in sorted({row["tokens"] for row in result["rows"]}):
        yield ""
        some = (cells(row) for row in result["rows"] if row["tokens"] == tokens)
        yield from table([f"batch {tokens}", *header], some)
    for name, reason in result["missing"].items():
        yield f"\n{name}: {reason}."


def _products(result: Row) -> Iterable[str]:
    yield "\n## Products alone\n"
    yield (
        "Tokens times rows of random numbers, all products, with cold caches "
        f"(kernels: {result['kernels']}). The error is that of the products, beside their size."
    )
    for n, d in dict.fromkeys((row["n"], row["d"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["n"], row["d"]) == (n, d)]
        yield f"\n### {n:,} × {d:,}"
        yield from _by_batch({"rows": rows, "missing": {}}, (*_TIMED, "error"), _of_product)
    for name, reason in result["missing"].items():
        yield f"\n{name}: {reason}."


def _of_product(row: Row) -> list[str]:
    return [f"**{row['side']}**" if row["ours"] else row["side"], *_timed(row), row["error"]]


def _top_k(result: Row) -> Iterable[str]:
    yield "\n## The k greatest\n"
    sides = list(dict.fromkeys(row["side"] for row in result["rows"]))
    yield (f"Milliseconds for n normal numbers in the caches (kernels: {result['kernels']}).")
    yield ""
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for row in result["rows"]:
        text = f"{row['median ms']:.3f}" + (f" ({row['recall']:.3f})" if row["recall"] < 1 else "")
        cells.setdefault((row["n"], row["k"]), {})[row["side"]] = text
    yield from table(
        ["n", "k", *(f"`{side}`" if "lax" in side else side for side in sides)],
        [[f"{n:,}", f"{k:,}", *(each[side] for side in sides)] for (n, k), each in cells.items()],
    )
    yield "\nIn parentheses: the share of the k that was found, where it was not all."


def _overhead(result: Row) -> Iterable[str]:
    yield "\n## Overhead\n"
    yield (
        f"{result['model']}: microseconds of a call, warm. In mode `dense` the transformed "
        'function computes what the plain one does; in mode "hire" it selects and gathers, which '
        f"cannot pay at this size. The goal is {result['goal us']:.0f} µs above the plain function."
    )
    yield ""
    yield from table(
        ["", "µs", "least", "spread", "above plain", "above its own `jax.jit`"],
        [
            [label, f"{row['us']}", f"{row['least us']}", f"{row['spread']:.0%}",
             f"{row['above plain us']}", f"{row['above jit us']}"]
            for label, row in result["per call"].items()
        ],
    )  # fmt: skip
    phases = ", ".join(f"{phase} {value}" for phase, value in result["once ms"].items())
    yield f"\nOnce, in milliseconds: {phases}."


if __name__ == "__main__":
    print(f"wrote {write()}")
