"""Tries an installed package: `python smoke.py in-use`, or `python smoke.py not-built`.

It is run alone, outside of a checkout, where nothing but the package and what it requires is
installed.
"""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

D, HIDDEN, VOCABULARY = 64, 256, 4104


def decode_step(params, token):
    x = params["embed"][token]
    x = x + jax.nn.relu(x @ params["up"]) @ params["down"]
    return x @ params["head"]


def main(kernels: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import hire_rewrite as hire

        rng = np.random.default_rng(0)
        shapes = {
            "embed": (VOCABULARY, D),
            "up": (D, HIDDEN),
            "down": (HIDDEN, D),
            "head": (D, VOCABULARY),
        }
        params = {
            name: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)
            for name, shape in shapes.items()
        }
        token = jnp.array([3, 1])
        dense = jax.jit(decode_step)(params, token)
        for rules in (
            (hire.Linear(encoding=hire.Blocks(8), force=True), hire.Head(k=8, force=True)),
            (hire.FFN(k=0.5, tail="predicted", force=True), hire.Head(k=8, force=True)),
        ):
            step = hire.transform(decode_step, *rules)
            packed = step.pack(params, token)
            assert step.plan(packed, token).rewritten
            rewritten = jax.jit(step)(packed, token)
            assert (rewritten.argmax(-1) == dense.argmax(-1)).all()
            np.testing.assert_allclose(rewritten, dense, atol=0.1)
    status = hire.ops.kernels.cpu.status()
    told = [w for w in caught if "kernels" in str(w.message) and w.filename == __file__]
    print(f"{hire.__file__}: kernels {status}, told {len(told)} time(s)")
    assert status.startswith(kernels.replace("-", " ")), status
    assert len(told) == (kernels == "not-built")


if __name__ == "__main__":
    main(sys.argv[1])
