"""The function as a graph: traced, flattened, and turned back into code."""
