"""Corpora and batches."""

import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from coterie.training import Batches, ByteTokenizer, embedded_corpus, load_corpus
from coterie.training.data import FEWEST_FILES_TO_HASH, split_of


def test_tokenizer_round_trips_utf8_and_shows_what_is_not():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.encode(b"\xff").tolist() == [255]
    text = "σ(x) – naïve\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"
    with pytest.raises(ValueError, match=r"got 256, a byte is 0\.\.255"):
        tokenizer.decode([1, 256])
    with pytest.raises(ValueError, match="got -1"):
        tokenizer.decode(torch.tensor([-1]))


def test_embedded_corpus_is_the_standard_librarys_source():
    train, valid = embedded_corpus("train"), embedded_corpus("valid")
    assert train.dtype == valid.dtype == np.uint8
    assert len(train) + len(valid) > 5_000_000
    assert 0.01 < len(valid) / (len(train) + len(valid)) < 0.07
    text = train.tobytes() + b"\0" + valid.tobytes()
    assert text.count(b"\0") > 400  # documents
    assert b"def dataclass(cls=None" in text
    for left_out in (b"class BaseTestCase(unittest.TestCase)", b"topics = {'assert'", b"decoding_table = ("):
        assert left_out not in text
    assert text.count(b"class TestCase(object):") == 1  # unittest itself stays


def test_embedded_corpus_is_the_same_in_another_process():
    code = (
        "import zlib; from coterie.training import embedded_corpus as e; print(zlib.crc32(e()), zlib.crc32(e('valid')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(zlib.crc32(embedded_corpus(split))) for split in ("train", "valid")]


def test_split_is_fixed_for_ever():
    names = [f"folder/file{i}.py" for i in range(20_000)]
    share = sum(split_of(name) == "valid" for name in names) / len(names)
    assert share == pytest.approx(0.03, abs=0.004)
    assert [name for name in names[:60] if split_of(name) == "valid"] == [
        "folder/file25.py",
        "folder/file50.py",
        "folder/file54.py",
    ]


def test_one_file_is_memory_mapped_and_its_end_is_for_validation(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(1, 201)))
    train, valid = load_corpus(path), load_corpus(str(path), "valid")
    assert isinstance(train, np.memmap)
    assert train.tolist() == list(range(1, 195))
    assert valid.tolist() == list(range(195, 201))


def test_a_folder_is_read_in_order_without_binary_hidden_or_empty_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes(b"zz" * 50)
    (tmp_path / "a.md").write_bytes(b"a" * 100)
    (tmp_path / "c.bin").write_bytes(b"c\0c")
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / ".git" / "config").write_bytes(b"hidden")
    (tmp_path / ".hidden").write_bytes(b"hidden")
    whole = np.concatenate([load_corpus(tmp_path, "train"), load_corpus(tmp_path, "valid")])
    assert whole.tobytes() == b"a" * 100 + b"\0" + b"z" * 100
    assert len(load_corpus(tmp_path, "valid")) == 6


def test_a_large_folder_is_split_by_name(tmp_path):
    names = [f"file{i}.txt" for i in range(FEWEST_FILES_TO_HASH + 50)]
    for name in names:
        (tmp_path / name).write_text(name)
    found = {split: load_corpus(tmp_path, split).tobytes().decode().split("\0") for split in ("train", "valid")}
    for split, files in found.items():
        assert files == sorted(name for name in names if split_of(name) == split)
    assert found["valid"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "no text file or folder at"),
        (b"", ValueError, "is empty"),
        (b"text\0text", ValueError, "is not text"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(tmp_path, content, error, message):
    path = tmp_path / "corpus"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        load_corpus(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_without_text_and_an_unknown_split_are_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="split: got 'test'"):
        load_corpus(None, "test")
    with pytest.raises(ValueError, match="split: got 'test'"):
        embedded_corpus("test")


def test_targets_are_the_text_one_byte_further(corpus):
    inputs, targets = next(Batches(corpus, 3, 16))
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    ring = corpus.tobytes() * 2
    for row in torch.cat((inputs, targets[:, -1:]), dim=1):
        assert bytes(row.tolist()) in ring


def test_batch_i_is_a_function_of_seed_and_i(corpus):
    batches = Batches(corpus, 4, 16, seed=3)
    in_order = [next(batches) for _ in range(300)]  # three epochs
    other = Batches(corpus, 4, 16, seed=3)
    for i in (299, 0, 150, 7, 101, 102):
        assert all(torch.equal(a, b) for a, b in zip(in_order[i], other.batch(i), strict=True))
    assert not torch.equal(in_order[0][0], Batches(corpus, 4, 16, seed=4).batch(0)[0])
    assert not torch.equal(in_order[0][0], in_order[1][0])


def test_an_epoch_visits_every_byte_once():
    corpus = np.arange(240, dtype=np.uint8)
    batches = Batches(corpus, 3, 24, seed=1)  # 10 windows: the fourth batch begins the second epoch
    rows = torch.cat([next(batches)[0] for _ in range(20)])
    for epoch in rows.split(10):
        assert sorted(epoch.flatten().tolist()) == list(range(240))
    assert not torch.equal(rows[:10].sort(0).values, rows[10:20].sort(0).values)  # another offset


def test_a_corpus_smaller_than_a_batch_is_repeated():
    corpus = np.arange(33, dtype=np.uint8)
    inputs, _ = Batches(corpus, 64, 16).batch(5)
    assert inputs.shape == (64, 16)
    assert len(inputs[:, 0].unique()) > 16  # offsets differ from epoch to epoch


def test_batches_continue_from_their_state(corpus):
    batches = Batches(corpus, 4, 16, seed=1)
    for _ in range(5):
        next(batches)
    state = batches.state_dict()
    expected = [next(batches)[0] for _ in range(3)]
    resumed = Batches(corpus, 4, 16, seed=1)
    resumed.load_state_dict(state)
    assert resumed.position == 5
    assert all(torch.equal(next(resumed)[0], inputs) for inputs in expected)
    for wrong in (Batches(corpus, 2, 16, seed=1), Batches(corpus, 4, 16), Batches(corpus[:-1], 4, 16, seed=1)):
        with pytest.raises(ValueError, match=r"state: (batch_size|seed|corpus_bytes) was"):
            wrong.load_state_dict(state)
    with pytest.raises(ValueError, match="'length' is missing"):
        resumed.load_state_dict({key: value for key, value in state.items() if key != "length"})


def test_wrong_batches_are_refused(corpus):
    with pytest.raises(ValueError, match="batch_size: got 0"):
        Batches(corpus, 0, 16)
    with pytest.raises(ValueError, match="more than length = 16"):
        Batches(corpus[:16], 1, 16)
    with pytest.raises(TypeError, match="must be uint8"):
        Batches(corpus.astype(np.int64), 1, 16)
