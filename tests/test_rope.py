"""Rotary embeddings: every scaling against the oracle's own formulas, config.json in both spellings, tables, errors."""
from __future__ import annotations

import pickle

import numpy as np
import pytest
from tiny_decoders import LLAMA3, YARN

from zquant.models.rope import KINDS, Rope, read_rope
from zquant.reference.decoders import inverse_frequencies

SETTINGS = {
    "default": None,
    "linear": dict(rope_type="linear", factor=2.5),
    "dynamic": dict(type="dynamic", factor=3.0),
    "llama3": dict(LLAMA3, original_max_position_embeddings=64),
    "yarn": dict(YARN, original_max_position_embeddings=64),
    "yarn with a factor of its own": dict(YARN, attention_factor=1.7, beta_fast=10, beta_slow=2),
    "yarn, mscale": dict(YARN, mscale=0.7, mscale_all_dim=0.3, truncate=False),
}


def config(name: str, **more) -> dict:
    return dict(rope_theta=5000.0, max_position_embeddings=64, rope_scaling=SETTINGS[name], **more)


@pytest.mark.parametrize("length", [1, 64, 65, 150])
@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_the_oracles(name, length):
    rope = read_rope(config(name), 24)
    want, factor = inverse_frequencies(config(name), 24, length, 5000.0)
    assert np.allclose(rope.frequencies(length), want, rtol=2e-7, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_known_frequencies():
    """Llama 3.1's first and last pairs (head 128, theta 500,000): kept, and divided by 8."""
    settings = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192)
    f = read_rope(dict(rope_theta=5e5, rope_scaling=settings, max_position_embeddings=131072), 128).frequencies()
    assert f[0] == 1 and f.shape == (64,)
    assert f[-1] == pytest.approx(5e5 ** (-126 / 128) / 8, rel=1e-6)
    assert read_rope(dict(SETTINGS and {"rope_scaling": dict(YARN, factor=32.0)}), 8).attention_factor == pytest.approx(
        0.1 * np.log(32) + 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_both_spellings(name):
    old = config(name)
    new = dict(max_position_embeddings=64, rope_parameters=dict(SETTINGS[name] or {"rope_type": "default"}, rope_theta=5000.0))
    a, b = read_rope(old, 16), read_rope(new, 16)
    assert (a.kind, a.theta, a.trained, a.dim) == (b.kind, b.theta, b.trained, b.dim)
    assert np.array_equal(a.frequencies(100), b.frequencies(100))


def test_only_dynamic_looks_at_the_length():
    for name in SETTINGS:
        rope = read_rope(config(name), 16)
        assert rope.depends_on_length(65) == (rope.kind == "dynamic")
        assert np.array_equal(rope.frequencies(65), rope.frequencies()) == (rope.kind != "dynamic")
        assert not rope.depends_on_length(64)


def test_max_positions():
    assert [read_rope(config(name), 16).max_positions for name in ("default", "linear", "dynamic", "llama3", "yarn")] == [
        64, 160, 192, 512, 256]


def test_tables():
    rope = read_rope(config("yarn"), 16)
    cos, sin = rope.tables(10)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == sin.shape and len(cos) >= 10 and cos.shape[1] == 8
    angles = np.arange(10)[:, None] * rope.frequencies().astype(np.float64)
    assert np.abs(cos[:10] - np.cos(angles) * rope.attention_factor).max() < 2e-6
    assert np.abs(sin[:10] - np.sin(angles) * rope.attention_factor).max() < 2e-6
    assert rope.tables(5)[0] is cos
    longer = rope.tables(len(cos) + 1)[0]
    assert len(longer) > len(cos) and np.array_equal(longer[:len(cos)], cos)


def test_tables_of_long_sequences_are_not_hoarded():
    rope = read_rope(config("dynamic"), 16)
    plain = rope.tables(64)[0]
    for length in range(65, 90):
        assert len(rope.tables(length, length)[0]) == length
    assert len(rope._cache) == 2
    assert rope.tables(64)[0] is plain
    assert not np.array_equal(rope.tables(80, 80)[0][:64], plain[:64])


def test_partial():
    rope = read_rope(dict(rotary_pct=0.25, rotary_emb_base=100, max_position_embeddings=8), 16, theta_key="rotary_emb_base",
                     fraction_key="rotary_pct", fraction=1.0)
    assert (rope.dim, rope.theta) == (4, 100.0)
    assert read_rope(dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), 16).dim == 8


def test_pickles():
    rope = read_rope(config("llama3"), 16)
    rope.tables(3)
    copy = pickle.loads(pickle.dumps(rope))
    assert copy == rope and np.array_equal(copy.tables(3)[0], rope.tables(3)[0])


@pytest.mark.parametrize("change, message", [
    (dict(rope_scaling=dict(rope_type="longrope", factor=2)), "rope_type 'longrope' is not known; known: " + ", ".join(KINDS)),
    (dict(rope_scaling=dict(type=3)), "rope_type 3 is not known"),
    (dict(rope_scaling=[1]), "rope_scaling is .1.; expected an object"),
    (dict(rope_scaling=dict(rope_type="linear")), "rope_type 'linear' needs factor, a positive number; got None"),
    (dict(rope_scaling=dict(rope_type="linear", factor="2")), "needs factor, a positive number; got '2'"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8)), "'llama3' needs low_freq_factor"),
    (dict(rope_theta=-1), "needs rope_theta, a positive number; got -1"),
    (dict(rope_theta=float("inf")), "needs rope_theta"),
    (dict(partial_rotary_factor=0.2), "3 rotary features of 16 per head; expected an even number"),
    (dict(partial_rotary_factor=2), "32 rotary features of 16"),
])
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_rope({"max_position_embeddings": 64, **change}, 16)


def test_the_comparison_notices():
    want, _ = inverse_frequencies(config("llama3"), 24, 64, 5000.0)
    wrong = Rope("llama3", 24, 5000.0, 64, dict(LLAMA3, high_freq_factor=3.9)).frequencies()
    assert not np.allclose(wrong, want, rtol=2e-7, atol=0)
