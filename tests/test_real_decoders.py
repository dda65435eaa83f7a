"""Decoders with known answers: perplexities, generated text, what quantizing costs. Tables are printed (pytest -s).

tiny-llama-5m is in the repository; its reference values on the demo's sentences, and gpt2-30m's on the first windows of
WikiText-2, are from transformers 5.23 in float32. The rest needs
``shared`` beside the repository (or ZQUANT_SHARED). ZQUANT_FULL=1 adds all of WikiText-2 with gpt2-30m, some minutes.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from llama2c import BOS, Tokenizer

import zquant as zq
from zquant.demo_sentences import SENTENCES
from zquant.spec import QuantSpec

DATA = Path(__file__).parent / "data"
DEMO = "\n".join(SENTENCES)

ROWS4 = zq.Scheme("w4a16, per row +e32", QuantSpec(4))
SCHEMES = ("w8a8", "w8a8-sym", "w8a16", "w4a8-g64", "w4a16-g64")


def load(folder):
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is missing")
    return zq.load(folder)


@pytest.fixture(scope="module")
def tiny():
    return load(DATA / "tiny-llama-5m")


@pytest.fixture(scope="module")
def gpt2(shared):
    return load(shared / "models" / "gpt2-30m")


@pytest.fixture(scope="module")
def stories(shared):
    """(model, tokenizer, the first 200 stories: BOS and at most 511 tokens)"""
    folder = shared / "models" / "stories260k-llama"
    text = shared / "data" / "tinystories-sample" / "tinystories_sample.txt"
    if not text.is_file():
        pytest.skip("tinystories-sample is missing")
    lm, tokenizer = load(folder), Tokenizer(folder / "tokenizer.llama2c.bin")
    texts = text.read_text(encoding="utf-8").split("<|endoftext|>")[:200]
    return lm, tokenizer, [tokenizer.encode(story.strip())[:512] for story in texts]


@pytest.fixture(scope="module")
def wiki(shared):
    file = shared / "data" / "wikitext2" / "wiki.test.raw"
    if not file.is_file():
        pytest.skip("wikitext2 is missing")
    return file


def show(name, results):
    base = results["float32"].ppl
    print(f"\n{name}: perplexity on {results['float32'].tokens:,} tokens")
    for scheme, result in results.items():
        print(f"  {scheme:22} {result.ppl:9.4f} {100 * (result.ppl / base - 1):+8.3f} %")


def measured(name, lm, text, schemes=SCHEMES):
    """Perplexity by scheme, and with the int8 cache; printed."""
    results = {"float32": zq.perplexity(lm, text), "float32, int8 cache": zq.perplexity(lm, text, kv_cache="int8")}
    for scheme in schemes:
        results[str(scheme)] = zq.perplexity(zq.quantize(lm, scheme), text)
    show(name, results)
    return {scheme: result.ppl for scheme, result in results.items()}


def check_costs(ppl):
    """What the project promises of 8 bits; 4 bits by rounding cost what they cost, but not everything.

    GELU's outputs are nearly all above zero: symmetric activations leave half of their codes unused and cost GPT-2 more.
    A few windows say it no better than to 1 %; test_gpt2_on_wikitext holds the whole text to 0.5 %.
    """
    base = ppl["float32"]
    assert ppl["w8a8"] == pytest.approx(base, rel=5e-3)
    assert ppl["w8a8-sym"] == pytest.approx(base, rel=1e-2)
    assert ppl["w8a16"] == pytest.approx(base, rel=2e-3)
    assert ppl["float32, int8 cache"] == pytest.approx(base, rel=2e-3)
    for scheme in ("w4a8-g64", "w4a16-g64"):
        assert base < ppl[scheme] < 1.35 * base
    assert ppl["w4a8-g64"] == pytest.approx(ppl["w4a16-g64"], rel=0.01)


# --- tiny-llama-5m, everywhere -----------------------------------------------------------------------------------


def test_golden_logits(tiny):
    golden = json.loads((DATA / "tiny-llama-5m" / "eval.json").read_text())["golden"]
    np.testing.assert_allclose(tiny([golden["ids"]])[0, -1, :32], golden["last_logits_first32"], atol=2e-3)


@pytest.mark.parametrize(
    "seq_len, stride, ppl, tokens", [(512, None, 35.75193689137549, 3264), (256, 96, 35.1863760537955, 3270)]
)
def test_tiny_llama_as_transformers(tiny, seq_len, stride, ppl, tokens):
    result = zq.perplexity(tiny, DEMO, seq_len, stride)
    assert (result.tokens, result.ppl) == (tokens, pytest.approx(ppl, rel=1e-4))


def test_tiny_llama_quantized(tiny):
    ppl = measured("tiny-llama-5m, the demo's sentences", tiny, DEMO)
    check_costs(ppl)


@pytest.mark.parametrize("scheme", [None, "w8a8", "w4a8"])
def test_batch_equals_single_prompts(tiny, scheme):
    lm = tiny if scheme is None else zq.quantize(tiny, scheme)
    prompts = ["The", "# Title: The Murders in the Rue Morgue", "", "In 1905, a long, long time ago,"]
    stops = {"stop": [",", ".", " the"], "kv_cache": "int8"}  # the texts end at different steps
    for options in ({}, {"temperature": 0.9, "top_p": 0.95, "seed": 11}, stops):
        options = {"max_new_tokens": 24, **options}
        together = lm.generate(prompts, **options)
        assert len({len(r.ids) for r in together}) > 1 or "stop" not in options
        assert together == [lm.generate(prompt, **options) for prompt in prompts]
        assert together[1].text == "".join(lm.generate(prompts[1], stream=True, **options))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g64"])
def test_logits_do_not_depend_on_batch_or_threads(tiny, scheme):
    lm = zq.quantize(tiny, scheme)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 4096, size).tolist() for size in (70, 3, 130, 64)]
    before = zq.get_num_threads()
    try:
        zq.set_num_threads(2)
        together = lm(rows)
        zq.set_num_threads(1)
        for row, logits in zip(rows, together):
            assert (lm([row])[0] == logits[: len(row)]).all()
    finally:
        zq.set_num_threads(before)


@pytest.mark.parametrize("scheme", [None, "w8a8", "w4a8"])
def test_greedy_text_is_the_argmax_of_whole_forwards(tiny, scheme):
    """What the cache gives, token by token, is what a forward over everything gives."""
    lm = tiny if scheme is None else zq.quantize(tiny, scheme)
    result = lm.generate("It was a dark night, and", max_new_tokens=20, stop=())
    ids = lm.tokenizer.encode("It was a dark night, and").ids
    logits = lm([ids + list(result.ids)])[0]
    assert logits[len(ids) - 1 : -1].argmax(axis=1).tolist() == list(result.ids)
    cache = lm.new_cache(1)
    steps = [lm([part], cache=cache, logits="last")[0] for part in (ids, *([i] for i in result.ids))]
    if scheme is None:
        np.testing.assert_allclose(steps, logits[len(ids) - 1 :], atol=1e-4)
    else:
        assert (np.stack(steps) == logits[len(ids) - 1 :]).all()


def test_save_load_generate(tiny, tmp_path):
    q = zq.quantize(tiny, "w4a8")
    q.save(tmp_path / "q")
    again = zq.load(tmp_path / "q")
    assert again.generate("Once", max_new_tokens=16) == q.generate("Once", max_new_tokens=16)
    assert zq.perplexity(again, DEMO[:2000], 128) == zq.perplexity(q, DEMO[:2000], 128)


def test_compare(tiny):
    q = zq.quantize(tiny, "w8a8")
    report = zq.compare(tiny, q, DEMO, rounds=1)
    print(f"\n{report}")
    assert isinstance(report, zq.LanguageReport) and report.scheme == "w8a8"
    assert report.ppl_before == pytest.approx(zq.perplexity(tiny, DEMO).ppl, rel=1e-9)
    assert report.ppl_after == pytest.approx(zq.perplexity(q, DEMO).ppl, rel=1e-9)
    assert 0 < report.mean_kl < 0.01 and report.agreement > 0.96 and report.shrinkage > 1.9  # from float16
    assert all(x.output_db > 15 and x.weight_db > 30 for x in report.layers) and len(report.layers) == 42
    wrong = tiny.replace(linears={"model.layers.2.mlp.down_proj": _without_a_row(tiny)})
    assert zq.compare(tiny, wrong, DEMO[:3000], rounds=0).layers[20].weight_db < 40
    worse = zq.compare(tiny, zq.quantize(tiny, "w4a8"), DEMO, rounds=0)
    assert worse.mean_kl > 10 * report.mean_kl and worse.agreement < report.agreement


def _without_a_row(lm):
    layer = lm.linears["model.layers.2.mlp.down_proj"]
    weight = layer.weight.copy()
    weight[7] = 0
    return layer.with_weight(weight)


# --- with shared/ ------------------------------------------------------------------------------------------------


def test_tiny_llama_on_wikitext(tiny, wiki):
    """All 838 full windows of 512 tokens; the text's last 364 tokens are not in eval.json's figure."""
    known = json.loads((DATA / "tiny-llama-5m" / "eval.json").read_text())
    ids = tiny.tokenizer.encode(wiki.read_text(encoding="utf-8")).ids
    assert len(ids) == known["ntok"]["wiki.test.raw"]
    result = zq.perplexity(tiny, ids[: len(ids) // 512 * 512])
    print(f"\ntiny-llama-5m, wiki.test.raw: {result}; eval.json: {known['ppl']['wiki.test.raw']:.4f}")
    assert result.ppl == pytest.approx(known["ppl"]["wiki.test.raw"], rel=1e-4)


def test_tiny_llama_quantized_on_wikitext(tiny, wiki):
    ids = tiny.tokenizer.encode(wiki.read_text(encoding="utf-8")).ids[: 24 * 512]
    check_costs(measured("tiny-llama-5m, 24 windows of wiki.test.raw", tiny, ids))


def test_gpt2_as_transformers(gpt2, wiki):
    ids = gpt2.tokenizer.encode(wiki.read_text(encoding="utf-8")).ids
    assert zq.perplexity(gpt2, ids[: 16 * 512]).ppl == pytest.approx(196.57340104705406, rel=1e-4)
    assert zq.perplexity(gpt2, ids[:2000], 128, 50).ppl == pytest.approx(222.87961126686386, rel=1e-4)


def test_gpt2_quantized(gpt2, wiki):
    ids = gpt2.tokenizer.encode(wiki.read_text(encoding="utf-8")).ids[: 8 * 512]
    check_costs(measured("gpt2-30m, 8 windows of wiki.test.raw", gpt2, ids))


@pytest.mark.skipif(not os.environ.get("ZQUANT_FULL"), reason="some minutes; ZQUANT_FULL=1 runs it")
def test_gpt2_on_wikitext(gpt2, wiki, shared):
    known = json.loads((shared / "models" / "gpt2-30m" / "eval.json").read_text())["ppl"]["wiki.test.raw"]
    ids = gpt2.tokenizer.encode(wiki.read_text(encoding="utf-8")).ids
    ids = ids[: len(ids) // 512 * 512]
    results = {name: zq.perplexity(lm, ids) for name, lm in (("float32", gpt2), ("w8a8", zq.quantize(gpt2, "w8a8")),
                                                             ("w8a8-sym", zq.quantize(gpt2, "w8a8-sym")))}
    show(f"gpt2-30m, all of wiki.test.raw (eval.json: {known:.4f})", results)
    assert results["float32"].ppl == pytest.approx(known, rel=1e-3)
    for scheme in ("w8a8", "w8a8-sym"):
        assert results[scheme].ppl == pytest.approx(results["float32"].ppl, rel=5e-3)


def test_gpt2_golden_logits(gpt2, shared):
    golden = json.loads((shared / "models" / "gpt2-30m" / "eval.json").read_text())["golden"]
    np.testing.assert_allclose(gpt2([golden["ids"]])[0, -1, :32], golden["last_logits_first32"], atol=2e-3)


def test_stories_perplexity(stories):
    """SOURCE.md: 79,255 tokens, 4.384 (4.3838), 60.3 % of the top tokens right."""
    lm, _, ids = stories
    result = zq.perplexity(lm, ids)
    assert result.tokens == 79255 and result.ppl == pytest.approx(4.3838, rel=1e-4)
    right = sum((lm([story])[0, :-1].argmax(axis=1) == story[1:]).sum() for story in ids)
    assert right / result.tokens == pytest.approx(0.603, abs=5e-4)


def test_stories_quantized(stories):
    """Beside the figures of an independent simulation of round-to-nearest weights."""
    lm, _, ids = stories
    ppl = measured("stories260k", lm, ids, (*SCHEMES, "w8a16+e32", "w4a16-g32+e32", ROWS4))
    check_costs(ppl)
    for scheme, known in (("w8a16+e32", 4.387), (ROWS4.name, 5.204), ("w4a16-g32+e32", 5.024)):
        print(f"  {scheme:22} {ppl[scheme]:9.4f}   known: {known}")
        assert ppl[scheme] == pytest.approx(known, rel=1e-3)


#: What llama2.c's test expects of this model at temperature 0 after 200 steps.
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red \
ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with your \
ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


def test_stories_text(stories):
    lm, tokenizer, _ = stories
    result = lm.generate([BOS], max_new_tokens=200)
    assert result.text is None and tokenizer.decode(list(result.ids)) == STORY
    assert list(lm.generate([BOS], max_new_tokens=200, stream=True)) == list(result.ids)


def test_nano_gpt_sorts(shared):
    """Six letters in, the same letters sorted out: 20 of 20, also with int8."""
    lm = load(shared / "models" / "gpt-nano-sort")
    for model in (lm, zq.quantize(lm, "w8a8")):
        rows = np.random.default_rng(0).integers(0, 3, (20, 6)).tolist()
        results = model.generate(rows, max_new_tokens=6)
        assert [list(r.ids) for r in results] == [sorted(row) for row in rows]
        assert {r.finish_reason for r in results} == {"length"}
