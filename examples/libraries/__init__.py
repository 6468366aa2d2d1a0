"""A small decoder in Flax NNX, Flax Linen and Equinox, each written as its users write it.

pip install flax equinox                       # either is enough for its own
python -m examples.libraries.nnx_model         # from the root of the repository; linen_, equinox_
"""
