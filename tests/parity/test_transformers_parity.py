"""float32 forwards against transformers: all-MiniLM-L6-v2, and random models of every family with both kinds of output.

    python -m pytest tests/parity          # in an environment with torch and transformers; skipped elsewhere
"""
from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from zquant.demo_model import find_minilm
from zquant.encoder import SentenceEncoder
from zquant.models import load

SIZES = dict(vocab_size=97, max_position_embeddings=40)
BERT = dict(SIZES, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=112, num_labels=3)
CONFIGS = {
    "bert": lambda **k: transformers.BertConfig(**BERT, **k),
    "roberta": lambda **k: transformers.RobertaConfig(**BERT, type_vocab_size=1, layer_norm_eps=1e-5, **k),
    "xlm-roberta": lambda **k: transformers.XLMRobertaConfig(**BERT, type_vocab_size=1, layer_norm_eps=1e-5, **k),
    "distilbert": lambda **k: transformers.DistilBertConfig(**SIZES, dim=64, n_layers=3, n_heads=4, hidden_dim=112,
                                                            num_labels=3),
}


def saved(config, auto, directory):
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from zeros and ones
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model


def batch(pad):
    rng = np.random.default_rng(0)
    lengths = np.array([17, 1, 9, 5])
    mask = (np.arange(17) < lengths[:, None]).astype(np.int64)
    return np.where(mask, rng.integers(5, 97, mask.shape), pad), mask


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_hidden_states(kind, tmp_path):
    config = CONFIGS[kind]()
    theirs = saved(config, transformers.AutoModel, tmp_path)
    ids, mask = batch(config.pad_token_id or 0)
    with torch.no_grad():
        want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    got = load(tmp_path)(ids, mask)
    assert np.abs(got - want)[mask == 1].max() <= 1e-5


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_logits(kind, tmp_path):
    config = CONFIGS[kind]()
    theirs = saved(config, transformers.AutoModelForSequenceClassification, tmp_path)
    ids, mask = batch(config.pad_token_id or 0)
    with torch.no_grad():
        want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    assert np.abs(load(tmp_path)(ids, mask) - want).max() <= 1e-5


def test_pooler(tmp_path):
    theirs = saved(CONFIGS["bert"](), transformers.AutoModel, tmp_path)
    ids, _ = batch(0)
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).pooler_output.numpy()
    model = load(tmp_path)
    assert np.abs(model.pooled(model(ids)) - want).max() <= 1e-5


@pytest.fixture(scope="module")
def minilm():
    try:
        return find_minilm()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_minilm_embeddings(minilm):
    from make_golden import SENTENCES, embed, token_ids

    ids = token_ids(minilm)
    encoder = SentenceEncoder(minilm)
    assert [row.tolist() for row in encoder.tokenize(SENTENCES)] == ids
    assert np.abs(encoder.encode(SENTENCES) - embed(minilm, ids)).max() <= 3e-6


def test_the_golden_file_is_what_make_golden_computes(minilm):
    from make_golden import OUT, SENTENCES, embed, token_ids

    data = np.load(OUT)
    assert data["sentences"].tolist() == SENTENCES
    assert np.abs(data["embeddings"] - embed(minilm, token_ids(minilm))).max() <= 1e-6


def test_minilm_against_sentence_transformers(minilm):
    library = pytest.importorskip("sentence_transformers")
    from make_golden import SENTENCES

    want = library.SentenceTransformer(str(minilm), device="cpu").encode(SENTENCES)
    assert np.abs(SentenceEncoder(minilm).encode(SENTENCES) - want).max() <= 3e-6
