"""A `Packed` in a file or a directory, and back.

`save` and `load` are those of `Packed`. A checkpoint is read as if a stranger had written it: its
description is JSON of bounded size and depth, nothing in it names code, and no array is allocated
before its size has been compared with the file's and with what the function packs its weights to.
"""

from hire_rewrite.checkpoint.load import load
from hire_rewrite.checkpoint.metadata import is_checkpoint, read_rules
from hire_rewrite.checkpoint.save import save

__all__ = ["is_checkpoint", "load", "read_rules", "save"]
