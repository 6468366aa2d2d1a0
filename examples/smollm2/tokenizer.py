"""SmolLM2's tokenizer, built from the vocabulary and merges in the GGUF file.

It is GPT-2's byte-level BPE with one change: digits are split off one by one first, so that
"1984" is four tokens whatever surrounds it. Control tokens such as <|im_start|> are recognized in
the text and never split. Byte-level means no unknown words: text is encoded by its UTF-8 bytes.
(Of the bytes that occur in text, eight have no token and are dropped without a word: the control
characters 04, 06, 13, 14, 16 and 1D, and the lead bytes F1 and F2 of unassigned planes.)
"""

from pathlib import Path

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from . import weights

END = "<|im_end|>"
_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def load(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of the model at `path`, by default the installed one."""
    file = weights.read(path)
    if weights.metadata(file, "tokenizer.ggml.pre") != "smollm":
        raise ValueError("the file's tokenizer does not split text the way SmolLM2's does")
    tokens = weights.metadata(file, "tokenizer.ggml.tokens")
    kinds = weights.metadata(file, "tokenizer.ggml.token_type")
    merges = weights.metadata(file, "tokenizer.ggml.merges")

    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    return tokenizer


def chat(prompt: str, first: bool = True) -> str:
    """The user's `prompt` as the model was taught to read it, ending where its answer begins.

    The first turn opens with the system message; a later one closes the model's last answer.
    """
    opening = f"<|im_start|>system\n{_SYSTEM}{END}\n" if first else f"{END}\n"
    return f"{opening}<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n"
