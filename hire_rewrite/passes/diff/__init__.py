"""The jaxpr before and after, as a value with forms.

`code` reads a jaxpr, `align` pairs the equations of two, `build` makes the values of `value` of
that, with what the plan says of them (`notes`) and what they read (`reads`). `diff` puts them
together; `text`, `page`, `record` and `graph` are its forms.
"""

from hire_rewrite.passes.diff.diff import Diff, compare, compare_functions
from hire_rewrite.passes.diff.notes import notes_of

__all__ = ["Diff", "compare", "compare_functions", "notes_of"]
