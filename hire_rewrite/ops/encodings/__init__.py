"""Encodings: how rows of weights are stored, and how products read them.

An encoding is a frozen dataclass with the methods of `Encoding`; another one is another file, and
a `register_encoding`.
"""

from hire_rewrite.ops.encodings.blocks import Blocks
from hire_rewrite.ops.encodings.coarse import Coarse
from hire_rewrite.ops.encodings.exact import narrowest
from hire_rewrite.ops.encodings.floats import Float, fetched_kind
from hire_rewrite.ops.encodings.nested import Nested
from hire_rewrite.ops.encodings.picked import picked_products, picked_sums
from hire_rewrite.ops.encodings.product import block_product
from hire_rewrite.ops.encodings.protocol import (
    BoundedEncoding,
    CoarseEncoding,
    Encoding,
    JointEncoding,
    PickedEncoding,
    Stored,
    encoding_types,
    register_encoding,
)
from hire_rewrite.ops.encodings.words import Words, in_words, out_of_words

__all__ = [
    "Blocks",
    "BoundedEncoding",
    "Coarse",
    "CoarseEncoding",
    "Encoding",
    "Float",
    "JointEncoding",
    "Nested",
    "PickedEncoding",
    "Stored",
    "Words",
    "block_product",
    "encoding_types",
    "fetched_kind",
    "in_words",
    "narrowest",
    "out_of_words",
    "picked_products",
    "picked_sums",
    "register_encoding",
]
