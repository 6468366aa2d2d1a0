"""A small language model trained from scratch, dense and with a top-k of 5 % in its FFNs.

For decoding the top-k is predicted, and the dense model, which was not trained for it, runs without
the neurons that its ReLU makes zero.

pip install '.[pretrain]'
python -m examples.pretrain            # from the root of the repository
python -m examples.pretrain --convert  # converts again what is trained
"""
