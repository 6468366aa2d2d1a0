"""What runs in place of the rewritten code: ordinary functions of arrays, usable by hand."""
