"""A `Packed` on disk, for a process that does not load the dense weights.

`save` and `load` are all that the server knows of it: exchange them to keep packs elsewhere.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import hire_rewrite as hire

from ..smollm2.model import Config
from . import backend


def save(packed: hire.Packed, config: Config, folder: Path) -> None:
    """Write a `Packed` and the sizes of its model to a new folder."""
    folder.mkdir(parents=True)
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder.absolute() / "packed", packed)
    hire.save_rules(packed.rules, str(folder / "rules.json"))
    # Last: a folder that has it is whole.
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")


def exists(folder: Path) -> bool:
    """Whether a folder holds a whole pack."""
    return (folder / "config.json").exists()


def load(folder: Path) -> tuple[hire.Packed, tuple[Any, ...], Config]:
    """The `Packed` of a folder, the rules that it was packed by, and the sizes of its model."""
    config = Config(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    rules = hire.load_rules(str(folder / "rules.json"))
    decode, _ = backend.functions(config)
    target = hire.transform(decode, *rules).pack(shapes(config), *backend.example(config, 1, 64))
    with ocp.StandardCheckpointer() as loader:
        packed = loader.restore(folder.absolute() / "packed", target)
    return packed, rules, config


def shapes(config: Config) -> Any:
    """The params of `examples.smollm2.weights.load`, as shapes."""

    def array(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    layers, d, f = config.layers, config.d_model, config.d_ff
    q, r = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "embed": array(config.vocab, d),
        "layers": {
            "attn_norm": array(layers, d),
            "ffn_norm": array(layers, d),
            "wq": array(layers, d, q),
            "wk": array(layers, d, r),
            "wv": array(layers, d, r),
            "wo": array(layers, q, d),
            "w_gate": array(layers, d, f),
            "w_up": array(layers, d, f),
            "w_down": array(layers, f, d),
        },
        "final_norm": array(d),
    }
