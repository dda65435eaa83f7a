"""Generation: sampling against plain definitions, batches against single prompts, streams, stops, bad input."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from fake_lm import BOS, EOS, LM

from zquant import generate as module
from zquant.generate import Generation, Stream, _Sampler, generate


def writer(text, prompt_length):
    """A model that writes this text after any prompt of that many tokens, then its end."""
    data = [*text.encode(), EOS]
    return LM(lambda history: data[min(len(history) - prompt_length, len(data) - 1)])


# --- results -----------------------------------------------------------------------------------------------------


def test_greedy_is_argmax_of_the_whole_history():
    lm = LM()
    result = generate(lm, "ab", max_new_tokens=8, stop=())
    history = list(b"ab")
    for token in result.ids:
        assert token == int(np.argmax(lm.row(history)))
        history.append(token)
    assert len(result.ids) == 8 and result.prompt_length == 2 and result.finish_reason == "length"
    assert lm.calls == [[2]] + [[1]] * 7  # the prompt once, then one token a step


def test_result():
    result = generate(writer("hello", 2), "ab")
    assert str(result) == result.text == "hello" and result.finish_reason == "stop"
    assert result.ids == (*b"hello", EOS) and result == generate(writer("hello", 2), "ab")
    assert "'hello'" in repr(result) and "6 tokens after 2" in repr(result) and "'stop'" in repr(result)
    assert 0 < result.prompt_seconds < result.seconds and result.tokens_per_second > 0
    with pytest.raises(AttributeError):
        result.text = ""
    assert len(repr(Generation("x" * 5000, (1,) * 5000, 1, "length"))) < 300
    assert str(Generation(None, (1, 2), 1, "length")) == "[1, 2]"


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_k": 40, "seed": 1}])
def test_a_batch_equals_its_prompts_alone(options):
    lm = LM()
    prompts = ["a", "a much longer prompt", "", [1, 2, 3], np.array([7, 8]), "a"]
    together = generate(lm, prompts, max_new_tokens=12, **options)
    assert together == [generate(LM(), p, max_new_tokens=12, **options) for p in prompts]
    assert together[0] == together[-1]  # one seed serves every prompt alike
    assert len(lm.calls[0]) == 6


def test_sequences_that_ended_leave_the_batch():
    lm = LM(lambda history: EOS if len(history) >= history[0] else 1)
    results = generate(lm, [[3], [5], [4]], max_new_tokens=10)
    assert [len(r.ids) for r in results] == [3, 5, 4] and {r.finish_reason for r in results} == {"stop"}
    assert [len(call) for call in lm.calls] == [3, 3, 3, 2, 1]


def test_nested_arrays_and_lists_of_ids_are_batches():
    assert len(generate(LM(), np.ones((3, 2), int), max_new_tokens=2)) == 3
    assert isinstance(generate(LM(), [1, 2], max_new_tokens=2), Generation)
    assert isinstance(generate(LM(), np.ones(2, np.uint8), max_new_tokens=2), Generation)


def test_seeds():
    lm, options = LM(), dict(max_new_tokens=10, temperature=1.0, stop=())
    one = generate(lm, "a", seed=5, **options)
    assert one == generate(lm, "a", seed=5, **options) != generate(lm, "a", seed=6, **options)
    three = generate(lm, ["a"] * 3, seed=[4, 5, 5], **options)
    assert three[1] == three[2] == one != three[0]
    assert generate(lm, "a", **options) != generate(lm, "a", **options)
    # The generator of a sequence does not notice the others, nor that one of them has ended.
    assert generate(lm, ["b", "a"], seed=5, **options)[1] == one


def test_no_new_tokens():
    lm = LM()
    result = generate(lm, ["a", "b"], max_new_tokens=0)
    assert [(r.text, r.ids, r.finish_reason) for r in result] == [("", (), "length")] * 2 and lm.calls == []
    assert list(generate(lm, "a", max_new_tokens=0, stream=True)) == []
    assert "0 tokens after 1" in repr(result[0])


def test_the_end_of_the_positions():
    lm = LM()
    result = generate(lm, [5] * 60, max_new_tokens=100, stop=())
    # 60 in, and a token each after positions 60 to 64.
    assert len(result.ids) == 5 and result.finish_reason == "context"
    assert len(generate(lm, [5] * 64, stop=()).ids) == 1
    assert generate(lm, [5] * 60, max_new_tokens=5, stop=()).finish_reason == "length"
    with pytest.raises(ValueError, match=r"prompt\[1\]: 65 tokens; the model has 64 positions"):
        generate(lm, [[1], [5] * 65])


def test_empty_text_begins_with_bos():
    lm = LM()
    assert generate(lm, "", max_new_tokens=3) == generate(lm, [BOS], max_new_tokens=3)
    lm.bos_id = None
    with pytest.raises(ValueError, match="prompt: empty, and config.json has no bos_token_id"):
        generate(lm, "")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_cache_type(dtype):
    lm = LM()
    generate(lm, "a", max_new_tokens=2, kv_cache=dtype)
    assert lm.caches == [dtype]


# --- stops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop, text, reason",
    [
        (None, "one. two", "stop"),
        (".", "one", "stop"),
        ([ord("t"), "x"], "one. ", "stop"),
        ("<eos>", "one. two", "stop"),
        (np.int64(ord("n")), "o", "stop"),
        ((), None, "length"),
    ],
)
def test_stop(stop, text, reason):
    result = generate(writer("one. two", 1), "p", max_new_tokens=20, stop=stop)
    assert result.finish_reason == reason
    if text is None:
        assert len(result.ids) == 20 and result.text == "one. two"  # the special tokens have no text
    else:
        assert result.text == text and len(result.ids) == len(text) + 1


# --- streams -----------------------------------------------------------------------------------------------------


def test_stream():
    text = "naïve 😀 — ok"
    stream = generate(writer(text, 1), "p", stream=True)
    assert isinstance(stream, Stream) and stream.result.ids == ()
    pieces = list(stream)
    assert "".join(pieces) == text == stream.result.text
    assert "😀" in pieces and "—" in pieces and all(pieces)  # whole, whatever their bytes
    assert stream.result == generate(writer(text, 1), "p")
    assert list(stream) == [] and "finish_reason='stop'" in repr(stream)


def test_stream_of_a_batch():
    lm, prompts = LM(), ["ab", "c"]
    stream = generate(lm, prompts, max_new_tokens=9, stream=True)
    texts = ["", ""]
    for index, piece in stream:
        texts[index] += piece
    assert stream.result == generate(LM(), prompts, max_new_tokens=9)
    assert texts == [r.text for r in stream.result]


def test_a_character_that_never_ends():
    """Bytes that are no UTF-8 come out as replacement characters, in the end and after a while."""
    cut = LM(lambda history: 0xF0)
    assert generate(cut, "p", max_new_tokens=3).text == "\ufffd" * 3
    assert len(list(generate(cut, "p", max_new_tokens=30, stream=True))) >= 3
    stopped = LM(lambda history: 0xE2 if len(history) < 3 else EOS)
    assert generate(stopped, "p").text == "\ufffd\ufffd"


def test_pieces_in_context():
    """A decoder that drops the leading space of a text, as SentencePiece's does: the space between words stays."""
    lm = LM(lambda history: ord(" ") if len(history) % 2 else ord("x"))
    decode = lm.tokenizer.decode
    lm.tokenizer.decode = lambda ids: decode(ids).removeprefix(" ")
    assert generate(lm, "p", max_new_tokens=4).text == " x x"
    assert list(generate(lm, "p", max_new_tokens=4, stream=True)) == [" ", "x", " ", "x"]


def test_without_tokenizer():
    lm = LM(tokenizer=False)
    result = generate(lm, [1, 2], max_new_tokens=3, stop=())
    assert result.text is None and list(generate(lm, [1, 2], max_new_tokens=3, stop=(), stream=True)) == list(result.ids)
    with pytest.raises(ValueError, match="fake: has no tokenizer.json; give token ids"):
        generate(lm, "a")
    with pytest.raises(ValueError, match="stop: 'a' needs a tokenizer.json"):
        generate(lm, [1], stop="a")


def test_close_keeps_what_came():
    lm = LM()
    stream = generate(lm, "a", max_new_tokens=20, stream=True, stop=())
    next(stream)
    stream.close()
    assert list(stream) == [] and 1 <= len(stream.result.ids) < 20 and stream.result.finish_reason is None


def test_a_truncating_tokenizer_is_left_alone():
    lm = LM()

    class Truncating(type(lm.tokenizer)):
        truncation, text = {"max_length": 2}, "x"

        def to_str(self):
            return "json"

        @classmethod
        def from_str(cls, text):
            return cls()

        def no_truncation(self):
            self.truncation = None

        no_padding = no_truncation

        def encode(self, text, add_special_tokens=True):
            return super().encode(text if self.truncation is None else text[:2])

    lm.tokenizer = Truncating()
    assert generate(lm, "a prompt", max_new_tokens=1).prompt_length == 8
    assert lm.tokenizer.truncation == {"max_length": 2}


# --- Ctrl-C ------------------------------------------------------------------------------------------------------


def test_interrupt():
    lm = LM(lambda history: time.sleep(0.005) or 1)
    lm.max_positions = 10**6
    stream = generate(lm, "a", max_new_tokens=10**5, stream=True)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    assert time.perf_counter() - begin < 5 and len(stream.result.ids) > 0
    timer.join()


# --- sampling ----------------------------------------------------------------------------------------------------


def sampler(temperature=1.0, top_k=None, top_p=None, seed=0):
    return _Sampler(temperature, top_k, top_p, np.random.default_rng(seed))


def expected(logits, temperature, top_k, top_p):
    """Probabilities of every id, by the definitions."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    p = np.where(np.isin(np.arange(len(p)), order), p, 0)
    p /= p.sum()
    if top_p is not None:
        kept, mass = [], 0.0
        for i in order:
            if mass >= top_p:
                break
            kept.append(i)
            mass += p[i]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
    return p / p.sum()


@pytest.mark.parametrize("top_p", [None, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [None, 1, 3, 50, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_candidates(temperature, top_k, top_p):
    rng = np.random.default_rng(1)
    for logits in (rng.normal(0, 3, 200), rng.integers(0, 3, 200), np.zeros(200)):  # distinct, ties, all equal
        logits = logits.astype(np.float32)
        want = expected(logits, temperature, top_k, top_p)
        ids, weights = sampler(temperature, top_k, top_p)._candidates(logits)
        got = np.zeros(200)
        got[ids] = weights / weights.sum()
        if top_p is None or logits.std() > 1:
            np.testing.assert_allclose(got, want, rtol=1e-12)
        else:  # equal weights: whether the border's last one is in is a matter of rounding
            assert abs(np.count_nonzero(got) - np.count_nonzero(want)) <= 1
            np.testing.assert_allclose(got, want, atol=0.01)


def test_draws_follow_the_probabilities():
    logits = np.log(np.float32([0.5, 0.2, 0.2, 0.1]))
    draw = sampler(seed=2)
    counts = np.bincount([draw.choose(logits) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.5, 0.2, 0.2, 0.1], atol=0.012)
    cold = sampler(temperature=1e-4)
    assert {cold.choose(logits) for _ in range(50)} == {0}
    assert sampler(0.0).choose(np.float32([1, 2, 2])) == 1


def test_top_p_of_one_is_all():
    options = dict(max_new_tokens=20, temperature=3.0, seed=1)
    assert generate(LM(), "a", top_p=1, **options) == generate(LM(), "a", **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(bad):
    lm = LM()
    lm.row = lambda history: np.float32([0, bad, 1])
    with pytest.raises(ValueError, match="logits: NaN or Inf"):
        generate(lm, "a")


# --- bad input ---------------------------------------------------------------------------------------------------

BAD = {
    "no ids": ([], {}, "prompt: no tokens"),
    "no ids in a batch": ([[1], []], {}, r"prompt\[1\]: no tokens"),
    "outside the vocabulary": ([1, 260], {}, "token id 260 is outside 0..259"),
    "negative": ([-1], {}, "token id -1 is outside"),
    "floats": ([1.5], {}, "expected a text or a sequence of token ids, got"),
    "a number": (7, {}, "prompt: expected a text, token ids, or a list"),
    "None": (None, {}, "prompt: expected a text"),
    "three dimensions": (np.ones((1, 1, 1), int), {}, r"prompt\[0\]: expected a text"),
    "max_new_tokens": ("a", {"max_new_tokens": -1}, "max_new_tokens: expected an integer of 0 or more, got -1"),
    "max_new_tokens True": ("a", {"max_new_tokens": True}, "max_new_tokens"),
    "temperature": ("a", {"temperature": -0.1}, "temperature: expected a number of 0 or more"),
    "temperature nan": ("a", {"temperature": float("nan")}, "temperature"),
    "top_k": ("a", {"top_k": 0}, "top_k: expected an integer of 1 or more"),
    "top_p": ("a", {"top_p": 0}, "top_p: expected a number above 0"),
    "top_p above 1": ("a", {"top_p": 1.1}, "top_p"),
    "seeds": (["a", "b"], {"seed": [1]}, r"seed: expected one, or one per prompt \(2\), got 1"),
    "negative seed": ("a", {"seed": -1}, "seed: expected an integer of 0 or more"),
    "stop of two tokens": ("a", {"stop": "ab"}, "stop: 'ab' is 2 tokens"),
    "cache": ("a", {"kv_cache": "int4"}, "kv_cache: expected 'float32' or 'int8'"),
}


@pytest.mark.parametrize("prompt, options, message", BAD.values(), ids=BAD.keys())
def test_bad_input(prompt, options, message):
    lm = LM()
    for stream in (False, True):  # a stream too complains at once
        with pytest.raises(ValueError, match=message):
            generate(lm, prompt, stream=stream, **options)
    assert lm.calls == []


def test_progress_bar(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("zquant._progress.DELAY", 0.0)
    generate(LM(), "a", max_new_tokens=5, stop=(), show_progress_bar=True)
    assert "generate" in capsys.readouterr().err
    generate(LM(), "a", max_new_tokens=5, show_progress_bar=False)
    assert capsys.readouterr().err == ""
    assert module._PATIENCE > 4
