"""Perplexity against sums written out here; windows, strides, documents, bounded logits, bad input."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
from fake_lm import LM

from zquant.perplexity import PerplexityResult, log_sum_exp, perplexity, windows

module = importlib.import_module("zquant.perplexity")  # zquant.perplexity is the function


def by_hand(lm, ids, seq_len, stride=None):
    """[-log p] of every scored token, in float64, one window at a time."""
    losses, done = [], 0
    for begin in range(0, len(ids), stride or seq_len):
        end = min(begin + seq_len, len(ids))
        for i in range(max(begin + 1, done), end):
            x = lm.row(ids[begin:i]).astype(np.float64)
            losses.append(math.log(np.exp(x - x.max()).sum()) + x.max() - x[ids[i]])
        done = end
        if end == len(ids):
            break
    return losses


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 256, 150).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("seq_len, stride", [(64, None), (10, None), (10, 10), (10, 3), (37, 1), (2, None), (64, 50)])
def test_perplexity(ids, seq_len, stride, batch_size):
    lm = LM()
    result = perplexity(lm, ids, seq_len, stride, batch_size=batch_size)
    losses = by_hand(lm, ids, seq_len, stride)
    assert result.tokens == len(losses)
    assert result.nll == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(np.mean(losses)), rel=1e-5) == float(result)


def test_every_token_counts_once(ids):
    for stride in (1, 3, 9):
        assert perplexity(LM(), ids, 10, stride).tokens == 149  # all but the first
    assert perplexity(LM(), ids, 10, 10).tokens == 135 == perplexity(LM(), ids, 10).tokens
    # 150 = 4 * 36 + 6: the short window has its 5; one of a single token has nothing to score.
    assert perplexity(LM(), ids, 36).tokens == 4 * 35 + 5
    result = perplexity(LM(), ids[:37], 36)
    assert (result.tokens, result.windows) == (35, 1)


def test_windows_are_those_of_hugging_face():
    """Begin, end and number of targets as in the recipe for fixed-length models."""
    for count, seq_len, stride in [(100, 10, 3), (100, 10, 10), (7, 10, 4), (101, 10, 9)]:
        recipe, previous = [], 0
        for begin in range(0, count, stride):
            end = min(begin + seq_len, count)
            # The first label of a window has no logits before it: only in the first window does that cost a target.
            recipe.append((begin, end, end - previous - (previous == begin)))
            previous = end
            if end == count:
                break
        got = [(b, e, e - f) for b, e, f in windows(count, seq_len, stride)]
        assert got == [r for r in recipe if r[2]]


def test_documents_do_not_see_each_other(ids):
    lm, parts = LM(), [ids[:30], ids[30:45], ids[45:46]]
    result = perplexity(lm, parts, 20)
    losses = [loss for part in parts for loss in by_hand(lm, part, 20)]
    assert result.tokens == len(losses) and result.nll == pytest.approx(np.mean(losses), rel=1e-6)
    assert perplexity(lm, [np.array(p) for p in parts], 20) == result


def test_text_file_and_ids_agree(tmp_path):
    text = "Ein Text — with ümlauts.\n" * 5
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    lm = LM()
    result = perplexity(lm, text, 16)
    assert result == perplexity(lm, file, 16) == perplexity(lm, list(text.encode()), 16) == perplexity(lm, [text], 16)
    assert result == perplexity(lm, np.frombuffer(text.encode(), np.uint8), 16)
    with pytest.raises(ValueError, match="is the name of a file; pathlib.Path"):
        perplexity(lm, str(file), 16)
    assert perplexity(lm, str(file) + "x", 16).tokens > 0


def test_logits_are_bounded(ids, monkeypatch):
    lm = LM()
    whole = perplexity(lm, ids, 50)
    assert lm.chunks == [512]
    monkeypatch.setattr(module, "LOGITS", 7 * 260)
    small = LM()
    assert perplexity(small, ids, 50).nll == pytest.approx(whole.nll, rel=1e-12)
    assert small.chunks == [7]
    monkeypatch.setattr(module, "LOGITS", 1)
    assert module.chunk_size(small) == 1


def test_cache_type(ids):
    lm = LM()
    perplexity(lm, ids, 50, kv_cache="int8")
    assert set(lm.caches) == {"int8"}


def test_result():
    result = PerplexityResult(12.5, math.log(12.5), 12345, 30, 512, 256, 3.21)
    assert str(result) == "perplexity 12.5000 (nll 2.52573, 12,345 tokens, 30 windows of 512, stride 256, 3.2 s)"
    assert result == PerplexityResult(12.5, math.log(12.5), 12345, 30, 512, 256, 99.0)
    with pytest.raises(AttributeError):
        result.ppl = 1


@pytest.mark.parametrize("scale", [1.0, 1e30])
@pytest.mark.parametrize("rows", [1, 5, 3000])
def test_log_sum_exp(rows, scale):
    x = (np.random.default_rng(rows).normal(0, 5, (rows, 300)) * scale).astype(np.float32)
    exact = x.astype(np.float64)
    peak = exact.max(axis=1)
    want = peak + np.log(np.exp(exact - peak[:, None]).sum(axis=1))
    np.testing.assert_allclose(log_sum_exp(x), want, rtol=2e-7)


def test_a_certain_model_has_perplexity_one():
    assert perplexity(LM(lambda history: 65), [65] * 40, 20).ppl == pytest.approx(1, abs=1e-5)
    lm = LM()
    lm.row = lambda history: np.float32([0] + [2000] * 259)
    assert perplexity(lm, [0] * 40, 20).ppl == math.inf  # and no warning


BAD = {
    "nothing": ("", {}, "fewer than two tokens"),
    "one token": ([5], {}, "fewer than two tokens"),
    "single tokens": ([[5], [6]], {}, "fewer than two tokens"),
    "empty list": ([], {}, "text: expected a text, a Path"),
    "a number": (3, {}, "text: expected a text"),
    "floats": ([1.5, 2], {}, "text: expected"),
    "outside": ([1, 260], {}, "text: token id 260 is outside 0..259"),
    "outside in a document": ([[1, 2], [-1, 2]], {}, r"text\[1\]: token id -1"),
    "seq_len 1": ([1, 2], {"seq_len": 1}, "seq_len: expected an integer of 2 or more"),
    "seq_len": ([1, 2], {"seq_len": 65}, "seq_len: 65, but the model has 64 positions"),
    "stride 0": ([1, 2], {"stride": 0}, "stride: expected an integer of 1 or more"),
    "stride": ([1, 2], {"stride": 21}, "stride: 21 is more than seq_len"),
    "batch_size": ([1, 2], {"batch_size": 0}, "batch_size"),
}


@pytest.mark.parametrize("text, options, message", BAD.values(), ids=BAD.keys())
def test_bad_input(text, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(LM(), text, **{"seq_len": 20, **options})


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        perplexity(LM(), Path(tmp_path / "none"), 20)
    (tmp_path / "latin").write_bytes(b"fine\n\xe9\n")
    with pytest.raises(ValueError, match="latin, line 2: not UTF-8"):
        perplexity(LM(), tmp_path / "latin", 20)
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        perplexity(LM(tokenizer=False), "a text", 20)


def test_nan():
    lm = LM()
    lm.row = lambda history: np.full(260, np.nan, np.float32)
    with pytest.raises(ValueError, match="logits: the mean negative log-likelihood is nan"):
        perplexity(lm, [1, 2, 3], 20)


def test_the_comparator_sees_a_shift_by_one(ids):
    """Targets that are off by one token must not pass for the right ones."""
    lm = LM()
    shifted = LM()
    shifted.row = lambda history: lm.row(history[:-1] or [0])
    assert perplexity(shifted, ids, 50).nll != pytest.approx(np.mean(by_hand(lm, ids, 50)), rel=1e-3)
