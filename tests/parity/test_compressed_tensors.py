"""transformers with compressed-tensors reads what we save, and we read what it saves.

What can be asked for. Weights: the same float32 values, bit for bit. Hidden states without activation quantization: the
difference of two float32 forwards (2e-5). A layer with quantized activations, on the same input: compressed-tensors rounds
x / s + z in float32 where we round x * (1 / s), so codes agree except where x / s lies within float32 error of a tie, and
there by one step; the products then differ by those steps times |w| and by float32 rounding. Whole forwards with quantized
activations: rounding is a jump, so a difference of one ulp in a layer's input moves a few codes, those move more codes in
the next, and after six layers of MiniLM the two runs differ by two thirds of what each differs from float32.
Symmetric activations differ by convention: compressed-tensors divides max|x| by 127.5 and clamps 128 to 127, we divide by
127 and reach the maximum; per element that is at most one step, and whole forwards differ as much as each from float32.
"""
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from compressed_tensors import ModelCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402

import zquant as zq  # noqa: E402
from zquant.demo_model import find_minilm  # noqa: E402
from zquant.qtensor import QTensor  # noqa: E402

SCHEMES = ["w8a8", "w8a8-sym", "w4/8a8", "w8a8-b48+e32", "w4a16-g32", "w3a16", "w8a16"]
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def minilm():
    try:
        return zq.load(find_minilm())
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def batch():
    """Token ids of random lengths, padded: (ids, mask)."""
    rng = np.random.default_rng(0)
    lengths = [3, 7, 12, 20, 33, 48]
    ids, mask = np.zeros((len(lengths), max(lengths)), np.int64), np.zeros((len(lengths), max(lengths)), np.int64)
    for row, n in enumerate(lengths):
        ids[row, :n], mask[row, :n] = rng.integers(1000, 30000, n), 1
        ids[row, 0], ids[row, n - 1] = 101, 102
    return ids, mask


@pytest.fixture(scope="module", params=SCHEMES)
def saved(request, minilm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    zq.quantize(minilm, request.param).save(directory)
    return request.param, directory


def theirs(directory):
    return transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()


def forward(model, ids, mask):
    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.float().numpy()
    return out * mask[..., None]


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_weights_are_the_same_bits(saved, batch):
    name, directory = saved
    model, ours = theirs(directory), zq.load(directory)
    forward(model, *batch)  # the first forward decompresses
    modules = dict(model.named_modules())
    for layer_name, layer in ours.named_linears():
        module = modules[layer_name]
        assert (getattr(module, "quantization_scheme", None) is not None) == (layer.spec is not None), layer_name
        np.testing.assert_array_equal(module.weight.detach().numpy(), layer.dense(), err_msg=layer_name)
        np.testing.assert_array_equal(module.bias.detach().numpy(), layer.bias, err_msg=layer_name)
    parameters = dict(model.named_parameters())
    for tensor, value in ours.tensors.items():
        value = value.dequantize() if isinstance(value, QTensor) else value
        np.testing.assert_array_equal(parameters[tensor].detach().numpy(), value, err_msg=tensor)
    embeddings = isinstance(ours.word_embeddings, QTensor)
    assert embeddings == ("+e32" not in name)


def test_hidden_states_with_float_activations(saved, batch, tmp_path):
    _, directory = saved
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (copy / "config.json").write_text(json.dumps(config))
    ours, want = zq.load(copy), forward(theirs(copy), *batch)
    in_float = ours.replace(linears={name: layer.with_weight(layer.dense()) for name, layer in ours.named_linears()})
    assert np.abs(in_float(*batch) - want).max() < 4e-5  # six GELUs, each within 2.4e-6
    assert np.abs(ours(*batch) - want).max() < 2e-3  # integer weights multiply int16 codes of the activations


def tie(t):
    """Within float32 error of a quotient below 256, and more, of where rounding jumps."""
    return np.abs(t - np.floor(t) - 0.5) < 1e-4


def layer_bound(x, layer):
    """|ours - theirs| for one layer on the same x (tokens, k) at most; and the share of codes that may differ."""
    x, weight = x.astype(np.float64), layer.dense()
    if layer.extras.static is not None:
        step = np.float64(layer.extras.static.scale)
        near = tie(x / step).astype(np.float64)
    elif layer.activations.symmetric:
        step, near = np.abs(x).max(1, keepdims=True) / 127, np.ones_like(x)
    else:
        lo, hi = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
        step = (hi - lo) / 255
        near = (tie(x / step) | tie(lo / step)).astype(np.float64)
    weight = np.abs(weight.astype(np.float64))
    return (near * step) @ weight.T * 1.01 + 64 * EPS * (np.abs(x) @ weight.T + 1), near.mean()


def layer_differences(model, ours, batch):
    """(name, difference, bound, share of near ties) of every quantized layer, on the inputs of our forward."""
    records, modules = [], dict(model.named_modules())

    def tap(name, x, y):
        layer = ours.linears[name]
        if layer.activations is None:
            return
        with torch.no_grad():
            out = modules[name](torch.tensor(x)[None])[0].numpy()
        bound, ties = layer_bound(x, layer)
        records.append((name, out - y, bound, ties))

    ours(*batch, tap=tap)
    return records


@pytest.mark.parametrize("name", ["w8a8", "w8a8-sym", "w4/8a8"])
def test_each_layer_on_the_same_input(name, minilm, batch, tmp_path):
    zq.quantize(minilm, name).save(tmp_path / "m")
    model, ours = theirs(tmp_path / "m"), zq.load(tmp_path / "m")
    forward(model, *batch)
    records = layer_differences(model, ours, batch)
    assert len(records) == 36
    for layer, difference, bound, ties in records:
        assert (np.abs(difference) <= bound).all(), (layer, (np.abs(difference) / bound).max())
        assert ties < 0.02 or name.endswith("-sym"), (layer, ties)
        # The comparator sees an error of a hundredth.
        assert (np.abs(difference + 0.01) > bound).any() or name.endswith("-sym")


@pytest.mark.parametrize("name", ["w8a8-static", "w8a8-static-sym"])
def test_static_ranges(name, minilm, batch, tmp_path):
    """Theirs saturates as ours does, at -128 too: the calibration has seen one sequence only."""
    zq.quantize(minilm, name, calib=[batch[0][2, :12]], mode="parallel").save(tmp_path / "m")
    model, ours = theirs(tmp_path / "m"), zq.load(tmp_path / "m")
    forward(model, *batch)
    modules = dict(model.named_modules())
    for layer_name, layer in ours.named_linears():
        if layer.spec is not None:
            assert modules[layer_name].input_scale.item() == layer.extras.static.scale
    for layer, difference, bound, ties in layer_differences(model, ours, batch):
        assert (np.abs(difference) <= bound).all(), (layer, (np.abs(difference) / bound).max())
        assert ties < 0.02 and (np.abs(difference + 0.01) > bound).any(), layer


@pytest.mark.parametrize("name, share", [("w8a8", 1.0), ("w8a8-sym", 1.2), ("w4/8a8", 0.3)])
def test_whole_forward_differs_by_less_than_quantization(name, share, minilm, batch, tmp_path):
    zq.quantize(minilm, name).save(tmp_path / "m")
    ours, other, exact = zq.load(tmp_path / "m")(*batch), forward(theirs(tmp_path / "m"), *batch), minilm(*batch)
    print(f"\n{name}: |ours - theirs| {distance(ours, other):.4f}, |ours - fp32| {distance(ours, exact):.4f}, "
          f"|theirs - fp32| {distance(other, exact):.4f}")
    assert distance(ours, other) < share * distance(other, exact)
    assert distance(ours, exact) < 1.1 * distance(other, exact)


def make_foreign(directory, dtype, weights, activations, fmt):
    """A small BERT quantized and saved by compressed-tensors itself; returns that model, decompressed."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=16)
    model = transformers.BertModel(config).to(dtype).eval()
    settings = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations,
                                              "format": fmt}},
                "format": fmt, "ignore": ["pooler.dense"], "quantization_status": "frozen"}
    qconfig = QuantizationConfig.model_validate(settings)
    apply_quantization_config(model, qconfig)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            w = module.weight.data
            groups = w.reshape(w.shape[0], -1, weights.get("group_size") or w.shape[1])
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), module.quantization_scheme.weights)
            module.weight_scale.data[:] = scale
            if getattr(module, "weight_zero_point", None) is not None:
                module.weight_zero_point.data[:] = zero
            if getattr(module, "input_scale", None) is not None:
                module.input_scale.data[:] = 0.04
                module.input_zero_point.data[:] = 0 if activations["symmetric"] else -3
    compressor = ModelCompressor(quantization_config=qconfig)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    # Not loaded again: compressed-tensors 0.20 does not read its own packed zero points back.
    compressor.decompress_model(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits, group, symmetric, fmt", [(8, None, True, "int-quantized"), (8, None, False, "int-quantized"),
                                                         (4, 16, True, "pack-quantized"), (4, 16, False, "pack-quantized"),
                                                         (3, 8, True, "pack-quantized"), (8, None, True, "pack-quantized")])
def test_models_of_other_tools(dtype, bits, group, symmetric, fmt, tmp_path):
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group" if group else "channel", "group_size": group}
    quantize_inputs = fmt == "int-quantized" and symmetric
    activations = {"num_bits": 8, "symmetric": False, "strategy": "token", "dynamic": True} if quantize_inputs else None
    reference = make_foreign(tmp_path, dtype, weights, activations, fmt)
    ours = zq.load(tmp_path)
    modules = dict(reference.named_modules())
    for name, layer in ours.named_linears():
        assert (layer.spec is None) == (name == "pooler.dense")
        # Theirs are rounded to the model's type once more; the codes and scales are the same.
        other = modules[name].weight.detach()
        np.testing.assert_array_equal(torch.tensor(layer.dense()).to(dtype).float().numpy(), other.float().numpy(),
                                      err_msg=name)
    if bits == 8 and symmetric:
        assert any((layer.weight.codes == -128).any() for _, layer in ours.named_linears() if layer.spec)
    ids = np.arange(10)[None]
    out, other = ours(ids), forward(reference, ids, np.ones_like(ids))
    assert distance(out, other) < {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_of_other_tools(symmetric, tmp_path):
    activations = {"num_bits": 8, "symmetric": symmetric, "strategy": "tensor", "dynamic": False}
    reference = make_foreign(tmp_path, torch.float32, {"num_bits": 8, "symmetric": True, "strategy": "channel"}, activations,
                             "int-quantized")
    ours, ids = zq.load(tmp_path), np.arange(10)[None]
    for name, layer in ours.named_linears():
        if layer.spec is not None:
            assert layer.extras.static == zq.extras.StaticRange(0.04, 128 if symmetric else 125)
    assert distance(ours(ids), forward(reference, ids, np.ones_like(ids))) < 2e-3


@pytest.mark.parametrize("scheme", ["w8a16", "w4/8a16-g16"])
@pytest.mark.parametrize("loader", ["AutoModel", "AutoModelForSequenceClassification"])
def test_names_with_and_without_the_prefix(scheme, loader, tmp_path):
    """A model with a head is "bert.encoder..." in the file; a client may load the encoder alone."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=16)
    transformers.BertForSequenceClassification(config).eval().save_pretrained(tmp_path / "float")
    ours = zq.quantize(zq.load(tmp_path / "float"), scheme)
    ours.save(tmp_path / "saved")
    model = getattr(transformers, loader).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids = np.arange(10)[None]
    with torch.no_grad():
        out = model(torch.tensor(ids))
    theirs_out, want = (out.last_hidden_state, ours.hidden_states(ids)) if loader == "AutoModel" else (out.logits, ours(ids))
    assert np.abs(theirs_out.numpy() - want).max() < 2e-5
    assert not hasattr(dict(model.named_modules())["pooler.dense" if loader == "AutoModel" else "classifier"],
                       "quantization_scheme")


def test_sentence_transformers_reads_the_directory(tmp_path):
    """It calls ``forward`` past the hook that decompresses on the first call (6.2), so it is told to do so on loading."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    try:
        encoder = zq.SentenceEncoder(find_minilm())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    q = zq.quantize(encoder, "w8a8")
    settings = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    other = sentence_transformers.SentenceTransformer(str(q.save(tmp_path / "saved")), device="cpu", model_kwargs=settings)
    sentences = ["A cat sleeps on the sofa.", "Nobody expected the committee to agree so quickly.", "word " * 300]
    assert (q.encode(sentences) * other.encode(sentences)).sum(1).min() > 0.998
