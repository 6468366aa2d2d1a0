"""Text to measure on, of four kinds that every Python installation has.

English prose (the help topics behind `help("if")`), Python code (modules of the standard library),
licenses (of the installed packages) and a table (the names of Unicode characters). No download,
and the same tokens on every run with the same Python and packages.
"""

import importlib.metadata
import importlib.util
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

_MODULES = (
    "argparse",
    "ast",
    "collections",
    "configparser",
    "csv",
    "dataclasses",
    "difflib",
    "email.message",
    "fractions",
    "heapq",
    "inspect",
    "json.decoder",
    "shutil",
    "statistics",
    "tarfile",
    "textwrap",
    "threading",
    "unittest.case",
    "zipfile",
)


def help_text(n_tokens: int, tokenizer: Tokenizer) -> np.ndarray:
    """The first tokens: i32[n_tokens] of Python's help topics, in alphabetical order."""
    return _encode((topics[name] for name in sorted(topics)), n_tokens, tokenizer)


def code_text(n_tokens: int, tokenizer: Tokenizer) -> np.ndarray:
    """The first tokens: i32[n_tokens] of the source of some modules of the standard library."""
    return _encode((_source(name) for name in _MODULES), n_tokens, tokenizer)


def table_text(n_tokens: int, tokenizer: Tokenizer) -> np.ndarray:
    """The first tokens: i32[n_tokens] of a table of characters and their names, a block a page."""
    pages = (range(start, start + 256) for start in range(0, 0x10000, 256))
    return _encode((_names(page) for page in pages), n_tokens, tokenizer)


def license_text(n_tokens: int, tokenizer: Tokenizer) -> np.ndarray:
    """The first tokens: i32[n_tokens] of the licenses of the installed packages, by name."""
    return _encode(licenses(), n_tokens, tokenizer)


def windows(tokens: np.ndarray, length: int, first: int | None = None) -> np.ndarray:
    """Cut tokens: i32[n] into as many rows of `length` as fit: i32[rows, length].

    first: a token that every row begins with, for models that expect one before all text.
    """
    if first is not None:
        return np.insert(windows(tokens, length - 1), 0, first, axis=1)
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def perplexity(forward: Callable[[Any, Array], Array], params: Any, rows: np.ndarray) -> float:
    """How many tokens the model hesitates between, on average, over rows: i32[n, length].

    Within a row each token but the first is predicted from those before it. `forward(params,
    tokens: i32[1, length])` gives the logits; compiled, it is the same program for every row.
    """
    losses = [_loss(forward(params, row[None]), row[None]) for row in rows]
    return float(jnp.exp(jnp.mean(jnp.stack(losses))))


@jax.jit
def _loss(logits: Array, tokens: Array) -> Array:
    """Mean of -log p of each next token; logits: [batch, seq, vocab], tokens: i32[batch, seq]."""
    logits, targets = logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def _encode(pieces: Iterable[str], n_tokens: int, tokenizer: Tokenizer) -> np.ndarray:
    """The first tokens of `pieces`, encoded one by one until there are enough."""
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece + "\n\n").ids
        if len(ids) >= n_tokens:
            return np.array(ids[:n_tokens], np.int32)
    raise ValueError(f"this kind of text has only {len(ids)} tokens, fewer than {n_tokens}")


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the standard library here has no source of {module!r}")
    return Path(spec.origin).read_text(encoding="utf-8")


def licenses() -> Iterator[str]:
    """Each license once, for many packages have the same."""
    seen = set()
    packages = {package.metadata["Name"]: package for package in importlib.metadata.distributions()}
    for name in sorted(packages, key=str.lower):
        for file in sorted(packages[name].files or ()):
            if "license" in file.name.lower() and file.suffix in ("", ".txt", ".md", ".rst"):
                text = Path(file.locate()).read_text(encoding="utf-8", errors="replace")
                if text not in seen:
                    seen.add(text)
                    yield text


def _names(codes: Iterable[int]) -> str:
    named = ((code, unicodedata.name(chr(code), "")) for code in codes)
    return "\n".join(f"U+{code:04X}\t{chr(code)}\t{name}" for code, name in named if name)
