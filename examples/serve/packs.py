"""A `Packed` on disk, for a process that does not load the dense weights.

`save` and `load` are all that the server knows of it: exchange them to keep packs elsewhere.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import hire_rewrite as hire

from ..smollm2.model import Config
from . import backend

_FILE = "packed.safetensors"


def save(packed: hire.Packed, config: Config, folder: Path) -> None:
    """Write a `Packed` and the sizes of its model to a folder; what is not whole is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    packed.save(folder / _FILE)
    # Last, and at once: a folder that has it is whole.
    part = folder / "config.json.part"
    part.write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
    part.replace(folder / "config.json")


def exists(folder: Path) -> bool:
    """Whether a folder holds a whole pack."""
    return (folder / "config.json").exists()


def load(folder: Path) -> tuple[hire.Packed, tuple[Any, ...], Config]:
    """The `Packed` of a folder, the rules that it was packed by, and the sizes of its model."""
    config = Config(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    rules = hire.load_rules(folder / _FILE)
    decode, _ = backend.functions(config)
    return hire.Packed.load(folder / _FILE, hire.transform(decode, *rules)), rules, config
