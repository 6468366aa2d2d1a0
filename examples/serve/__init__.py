"""SmolLM2 behind HTTP: continuous batching on rewritten weights, and a day of it beside the dense
model.

    python -m examples.serve            serve on 127.0.0.1:8000
    python -m examples.serve --load 40  serve so many requests of clients in here, and end
    python -m examples.serve.day        decode steps in lockstep with the dense model
"""
