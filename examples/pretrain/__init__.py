"""A small language model trained from scratch, dense and with a top-k of 5 % in its FFNs.

pip install '.[pretrain]'
python -m examples.pretrain            # from the root of the repository
"""
