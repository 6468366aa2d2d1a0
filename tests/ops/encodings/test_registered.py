"""An encoding that is registered from outside of the package is like the package's own."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite.ops.encodings import Blocks, Encoding, encoding_types, register_encoding
from hire_rewrite.ops.predictors import Read, register_predictor
from tests.ops.cases import normal


@register_encoding
@dataclasses.dataclass(frozen=True)
class Signs:
    """The signs of the rows, and the mean size of each row."""

    scale: str = "float32"

    def check(self, n, d, *, site=""):
        pass

    def store(self, rows):
        size = jnp.abs(rows).mean(1).astype(self.scale)
        return {"signs": jnp.sign(rows).astype(jnp.int8), "size": size}

    def store_exactly(self, rows):
        return None

    def decode(self, stored, layer):
        return stored["signs"][layer] * stored["size"][layer].astype(jnp.float32)[:, None]

    def decode_rows(self, stored, layer, rows):
        return self.decode(stored, layer)[rows]

    def product(self, x, stored, layer, *, round_inputs=False):
        return x @ self.decode(stored, layer).T

    def bytes(self, n, d):
        return n * d + n * jnp.dtype(self.scale).itemsize

    def reads(self, n, d, tokens=1):
        return (Read("scored_int8", self.bytes(n, d), tokens),)


@register_encoding
@dataclasses.dataclass(frozen=True)
class SignsFirst(Signs):
    """The rows themselves, which are guessed from their signs."""

    def store(self, rows):
        return super().store(rows) | {"rows": rows.astype(jnp.float32)}

    def decode(self, stored, layer):
        return stored["rows"][layer]

    def coarse(self, x, stored, layer, *, round_inputs=False):
        return x @ Signs.decode(self, stored, layer).T

    def bytes(self, n, d):
        return super().bytes(n, d) + 4 * n * d

    def coarse_reads(self, n, d, tokens=1):
        return (Read("scored_int8", Signs.bytes(self, n, d), tokens),)


@register_predictor
@dataclasses.dataclass(frozen=True)
class Stored:
    """Scores with rows that are stored in some encoding."""

    encoding: Encoding

    wants_calibration = False

    def check(self, n, d, *, site="", tokens=None):
        self.encoding.check(n, d, site=site)

    def fit(self, rows, moments=None, top=None):
        return self.encoding.store(rows)

    def score(self, state, x, layer, choose=None):
        return self.encoding.product(x, state, layer, round_inputs=True)

    def bytes(self, n, d, dtype, tokens=1):
        return self.encoding.bytes(n, d)


@pytest.mark.parametrize("encoding", [Signs(), Signs("bfloat16"), Blocks(4, 16, minimum=True)])
def test_a_predictor_of_an_encoding_runs_and_is_saved(encoding, tmp_path):
    params, x = {"head": normal(0, 64, 512)}, normal(1, 3, 64)
    rules = (hire.Head(k=4, candidates=512, min_width=64, predictor=Stored(encoding), force=True),)
    step = hire.transform(lambda params, x: x @ params["head"], *rules)
    want = np.asarray(x @ params["head"])
    got = np.asarray(step(step.pack(params, x), x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    path = str(tmp_path / "rules.json")
    hire.save_rules(rules, path)
    assert hire.load_rules(path) == rules


def test_a_head_guesses_by_a_part_of_its_rows(tmp_path):
    params, x = {"head": normal(0, 64, 512)}, normal(1, 3, 64)
    rule = hire.Head(k=4, candidates=300, min_width=64, exact=SignsFirst(), force=True)
    step = hire.transform(lambda params, x: x @ params["head"], rule)
    packed = step.pack(params, x)
    assert [leaf.shape for leaf in packed.sites["params/head"].predictor.values()] == []
    want = np.asarray(x @ params["head"])
    best = np.argsort(-want, axis=1)[:, :4]
    got = np.asarray(step(packed, x))
    np.testing.assert_array_equal(np.argsort(-got, axis=1)[:, :4], best)
    np.testing.assert_allclose(
        *(np.take_along_axis(logits, best, axis=1) for logits in (got, want)), rtol=1e-4
    )
    assert step.plan(params, x[:1]).sites[0].bytes_after == 512 * 68 + 300 * (64 * 5 + 4)
    path = str(tmp_path / "rules.json")
    hire.save_rules([rule], path)
    assert hire.load_rules(path) == (rule,)
    with pytest.raises(hire.HireRewriteError, match="certify needs a predictor that bounds"):
        hire.inspect(step.fn, params, x, rules=[rule.replace(certify=True)])


def test_they_are_known_by_name():
    assert encoding_types()["Signs"] is Signs
    assert encoding_types()["Blocks"] is Blocks
    assert isinstance(Signs(), Encoding)
    assert not isinstance(object(), Encoding)


def test_another_class_of_the_same_name():
    @dataclasses.dataclass(frozen=True)
    class Blocks:
        bits: int

    with pytest.raises(hire.HireRewriteError, match="Blocks is registered"):
        register_encoding(Blocks)
