"""Correlations, cosines, signal-to-noise and the STS file reader, against definitions written out here."""

import math

import numpy as np
import pytest

from zquant.evaluate import Pairs, cosine_fidelity, pearson, read_pairs, spearman, sqnr_db, sts


def slow_ranks(x):
    return np.array([sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x])


def slow_pearson(x, y):
    return float(np.corrcoef(np.asarray(x, float), np.asarray(y, float))[0, 1])


@pytest.mark.parametrize("seed", range(5))
def test_correlations_against_definition(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 40), rng.normal(size=40)  # x has ties
    assert pearson(x, y) == pytest.approx(slow_pearson(x, y), abs=1e-12)
    assert spearman(x, y) == pytest.approx(slow_pearson(slow_ranks(x), slow_ranks(y)), abs=1e-12)
    assert spearman(x, x) == pytest.approx(1.0, abs=1e-15)
    assert spearman(x, -x) == pytest.approx(-1.0, abs=1e-15)


def test_spearman_is_about_order_only():
    x = np.array([0.1, 0.2, 0.4, 0.3])
    assert spearman(x, np.exp(100 * x)) == 1.0
    assert pearson(x, np.exp(100 * x)) < 0.9


@pytest.mark.parametrize("function", [pearson, spearman])
def test_correlation_edges(function):
    assert function([1, 1, 1], [1, 2, 3]) == 0.0
    assert function([1, 2], [5, 9]) == 1.0
    assert function([1e300, -1e300, 0], [1e-300, -1e-300, 0]) == pytest.approx(1.0)
    for x, y, message in [
        ([1], [1], "at least two"),
        ([1, 2], [1, 2, 3], "shapes differ"),
        ([1, np.nan], [1, 2], "row 1 holds NaN or Inf"),
        ([[1, 2]], [[1, 2]], "1 dimension"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(x, y)
    with pytest.raises(TypeError, match="real numbers"):
        function(["a", "b"], [1, 2])


def test_cosine_fidelity():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
    expected = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a.astype(float), b.astype(float))]
    np.testing.assert_allclose(cosine_fidelity(a, b), expected, atol=1e-14)
    assert (cosine_fidelity(a, a) <= 1.0).all() and (cosine_fidelity(a, 3 * a) > 1 - 1e-6).all()
    assert cosine_fidelity(a[:0], b[:0]).shape == (0,)
    zero = np.zeros((1, 5))
    assert cosine_fidelity(zero, zero) == 1.0 and cosine_fidelity(zero, a[:1]) == 0.0
    assert cosine_fidelity(a[:1] * 1e-38, a[:1] * 1e38) == pytest.approx(1.0)
    a[3, 2] = np.inf
    with pytest.raises(ValueError, match="b: row 3"):
        cosine_fidelity(b, a)
    with pytest.raises(ValueError, match="shapes differ"):
        cosine_fidelity(b, b[:, :4])


def test_sqnr():
    rng = np.random.default_rng(0)
    r = rng.normal(size=(50, 40)).astype(np.float32)
    noise = rng.normal(size=r.shape).astype(np.float32)
    direct = 10 * np.log10((r.astype(float) ** 2).sum() / ((r.astype(float) - (r + noise)) ** 2).sum())
    assert sqnr_db(r, r + noise) == pytest.approx(direct, abs=1e-9)
    assert sqnr_db(r, r) == math.inf
    assert sqnr_db(np.zeros(3), np.zeros(3)) == math.inf and sqnr_db(np.zeros(3), np.ones(3)) == -math.inf
    assert sqnr_db([], []) == math.inf
    assert sqnr_db([1e-200, 0], [1.1e-200, 0]) == pytest.approx(20.0)
    one_bit = [sqnr_db(r, np.round(r * s) / s) for s in (32, 64)]
    assert one_bit[1] - one_bit[0] == pytest.approx(6.02, abs=0.2)
    with pytest.raises(ValueError, match="shapes differ"):
        sqnr_db(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="approx.*NaN"):
        sqnr_db([1.0], [np.nan])


# --- files -------------------------------------------------------------------------------------------------------


def write(folder, text, name="pairs.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


GOOD = {
    "plain csv": b'A cat.,"A cat, asleep.",4.5\nA cat.,It rains.,0\n',
    "csv with a header": b'sentence1,sentence2,score\nA cat.,"A cat, asleep.",4.5\nA cat.,It rains.,0\n',
    "header in another order": b'id,score,sentence1,sentence2\n7,4.5,A cat.,"A cat, asleep."\n8,0,A cat.,It rains.\n',
    "unnamed header": b'left,right,how much\nA cat.,"A cat, asleep.",4.5\nA cat.,It rains.,0\n',
    "tsv": b"A cat.\tA cat, asleep.\t4.5\nA cat.\tIt rains.\t0\n",
    "tsv with a header and more columns": (
        b"index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA cat.\tA cat, asleep.\t4.5\n1\ty\tA cat.\tIt rains.\t0"
    ),
    "byte-order mark, CRLF, empty lines": b'\xef\xbb\xbfA cat.,"A cat, asleep.",4.5\r\n\r\nA cat.,It rains.,0\r\n\r\n',
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD.keys())
def test_read_pairs(tmp_path, text):
    assert read_pairs(write(tmp_path, text)) == Pairs(("A cat.", "A cat."), ("A cat, asleep.", "It rains."), (4.5, 0.0))


def test_tsv_quotation_marks_are_text(tmp_path):
    pairs = read_pairs(write(tmp_path, 'He said "no\tHe left\t2\n"Yes" she said\tShe left\t3\n', "x.tsv"))
    assert pairs.first == ('He said "no', '"Yes" she said')


BAD = {
    "a score that is no number": ("a,b,1\na,b,two\n", "line 2: expected a finite number as the score, got 'two'"),
    "a NaN score": ("a,b,1\na,b,nan\n", "line 2: expected a finite number"),
    "a missing column": ("a,b,1\na,b\n", "line 2: expected 3 columns, got 2"),
    "after a quoted line break": ('a,"b\nc",1\na,b\n', "line 3: expected 3 columns, got 2"),
    "one column": ("hello\nworld\n", "line 1: expected two sentences and a score, got 1 column$"),
    "many columns without a header": ("a,b,c,d\n", "line 1: 4 columns and no header"),
    "an open quotation": ('a,b,1\n"a,b,1\n', "line 2: unexpected end of data"),
    "too few": ("a,b,1\n", "at least two sentence pairs, got 1"),
    "empty": ("", "at least two sentence pairs, got 0"),
    "not UTF-8": (b"a,b,1\ncaf\xe9,b,1\n", "line 2: not UTF-8 .byte 0xe9"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD.keys())
def test_read_pairs_refuses(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(path)
    assert str(error.value).startswith(str(path))


def test_read_pairs_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "none.csv")


# --- the score ---------------------------------------------------------------------------------------------------


class Letters:
    """Counts letters; keeps what it was asked."""

    def encode(self, sentences, batch_size=32, show_progress_bar=False):
        self.asked = list(sentences), batch_size
        return np.array([[s.count(c) for c in "abcde"] for s in sentences], np.float32)


def test_sts(tmp_path):
    encoder = Letters()
    path = write(tmp_path, "abc,cba,5\nabc,abd,3\nabc,ade,2\nabc,eee,0\n")
    result = sts(encoder, path, batch_size=7)
    assert encoder.asked == (["abc"] * 4 + ["cba", "abd", "ade", "eee"], 7)
    cosine = [1.0, 2 / 3, 1 / 3, 0.0]
    assert result.spearman == 1.0 and result.n == 4 and result.seconds >= 0
    assert result.pearson == pytest.approx(slow_pearson(cosine, [5, 3, 2, 0]), abs=1e-12)
    assert str(result).startswith("STS: Spearman 100.00, Pearson 99.23 (4 pairs")
    assert sts(encoder, read_pairs(path)).spearman == 1.0
    assert sts(encoder, [("abc", "cba", 0), ("abc", "eee", 5)]).spearman == -1.0


def test_sts_refuses():
    with pytest.raises(ValueError, match="item 1: expected .sentence, sentence, score."):
        sts(Letters(), [("a", "b", 1.0), ("a", "b")])
    with pytest.raises(ValueError, match="at least two"):
        sts(Letters(), [("a", "b", 1.0)])


def test_a_model_with_no_encode_is_refused():
    with pytest.raises(TypeError, match="encoder: expected a SentenceEncoder .*, got int"):
        sts(3, [("a", "b", 1.0), ("a", "c", 2.0)])
