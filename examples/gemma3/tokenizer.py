"""Gemma's tokenizer, built from the vocabulary and scores in the GGUF file.

It is SentencePiece's BPE: spaces become ▁, and of all neighbors whose union is a token those with
the best score are merged, again and again. Control tokens such as <bos> are recognized in the text
and never split; neither are runs of newlines, tabs or spaces, and tags of HTML. A character that is
not in the vocabulary becomes its UTF-8 bytes, each a token. The model expects <bos> before all
text, and it is not added here: write `tokenizer.encode(BOS + text)`.
"""

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ..smollm2.weights import metadata
from . import weights

BOS, END = "<bos>", "<eos>"
_UNKNOWN = "<unk>"


def load() -> Tokenizer:
    """The tokenizer of the installed model."""
    file = weights.read()
    if metadata(file, "tokenizer.ggml.model") != "llama":
        raise ValueError("the file's tokenizer is not one of SentencePiece's")
    tokens = metadata(file, "tokenizer.ggml.tokens")
    scores = metadata(file, "tokenizer.ggml.scores")
    kinds = metadata(file, "tokenizer.ggml.token_type")

    mergeable = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind == TokenType.NORMAL
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges(mergeable),
            unk_token=_UNKNOWN,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        whole = [
            AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)
            for token, its_kind in zip(tokens, kinds, strict=True)
            if its_kind == kind
        ]
        tokenizer.add_tokens(whole)
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is a token, the best union first."""
    return [
        (token[:i], token[i:])
        for token in sorted(scores, key=scores.__getitem__, reverse=True)
        for i in range(1, len(token))
        if token[:i] in scores and token[i:] in scores
    ]
