"""The jaxpr before and after, as a value with forms.

`code` reads a jaxpr, by the `keys` of what is in it; `align` pairs the equations of two, with
`links` between calls and `gaps` by order; `regions` groups the others. `build` makes the values of
`value` of that, with what the plan says of them (`notes`) and what they read (`reads`). `diff` puts
it together. Its forms are `text`, `page`, with its `look`, `record` and `graph`; `fold` is what
text and page show once.
"""

from hire_rewrite.passes.diff.diff import Diff, compare, compare_functions
from hire_rewrite.passes.diff.notes import notes_of

__all__ = ["Diff", "compare", "compare_functions", "notes_of"]
