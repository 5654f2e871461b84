"""Text as bytes: a tokenizer without a vocabulary file, a corpus that is always there, batches that can be resumed.

A corpus is one flat array of bytes: documents joined by a separator byte that no text holds. Nothing is downloaded,
and there is no tokenizer to train, so the same two lines work on a fresh laptop and on one's own text.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "valid")
SEPARATOR = 0
VALID_PERCENT = 3

# Folders with fewer text files are split by position: a hash over a handful of files may pick none, or the largest.
FEWEST_FILES_TO_HASH = 200

# Not the language's own prose: the tests, other people's packages, and tables written by programs, which are so
# regular that they would dominate a loss.
_NOT_CORPUS_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "encodings"}
)
_NOT_CORPUS_FILES = frozenset({"pydoc_data/topics.py", "html/entities.py"})
_NOT_CORPUS_PREFIX = "_sysconfigdata"


class ByteTokenizer:
    """Text to bytes and back: token = byte, so that nats per token are nats per byte.

    `separator` (0) stands between the documents of a corpus; as a `stop` token of generation it ends a document.
    """

    vocab_size = 256
    separator = SEPARATOR

    def encode(self, text: str | bytes) -> Tensor:
        """The UTF-8 bytes of `text` as int64 [n]."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64))

    def decode(self, ids: Tensor | Sequence[int] | bytes) -> str:
        """Text of byte values `ids` [n]; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside 0..255.
        """
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        try:
            return bytes(values).decode("utf-8", errors="replace")
        except ValueError as error:
            wrong = next(value for value in values if not 0 <= value < self.vocab_size)
            raise ValueError(f"ids: got {wrong}, a byte is 0..255") from error


def embedded_corpus(split: str = "train") -> np.ndarray:
    """The source of the Python standard library that runs this program, uint8 [n] (about 9 MB in training).

    Real text that every machine has. Tests, installed packages and generated tables are left out; the order is that
    of the sorted names, and a hash of a file's name decides its split, so the split never changes between machines
    (the text does, with the version of Python).

    Raises:
        ValueError: `split` is neither "train" nor "valid", or this Python was installed without its sources.
    """
    _check_split(split)
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [
        name
        for name in _walk(root, skip=_NOT_CORPUS_FOLDERS)
        if name.endswith(".py")
        and name not in _NOT_CORPUS_FILES
        and not name.rpartition("/")[2].startswith(_NOT_CORPUS_PREFIX)
    ]
    chosen = [name for name in names if split_of(name) == split]
    if not chosen:
        raise ValueError(f"this Python has no library sources in {root}; give a text file or a folder instead")
    return _join([(root / name).read_bytes() for name in chosen])


def load_corpus(path: str | os.PathLike | None = None, split: str = "train") -> np.ndarray:
    """A corpus as uint8 [n]: the embedded one (`None`), one text file, or every text file below a folder.

    One file is memory-mapped, never read as a whole, and its last 3 % are for validation. A folder's files are read
    in the order of their names, hidden and binary ones (a zero byte within the first 8 KiB, as git decides) skipped;
    from 200 files on the split is by a hash of the relative name, so that adding files moves none; below, the last
    3 % of the joined text are for validation.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: `path` holds no text, or is a binary file, or `split` is neither "train" nor "valid".
    """
    _check_split(split)
    if path is None:
        return embedded_corpus(split)
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, split)
    if not path.exists():
        raise FileNotFoundError(f"no text file or folder at {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if _is_binary(path):
        raise ValueError(f"{path} is not text: it holds zero bytes")
    return _cut_tail(np.memmap(path, dtype=np.uint8, mode="r"), split)


def split_of(name: str) -> str:
    """The split that a file belongs to: "valid" for 3 % of all relative names (with "/"), for ever the same."""
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
    return "valid" if int.from_bytes(digest[:8], "big") % 100 < VALID_PERCENT else "train"


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """Endless batches of windows; batch i is a pure function of (corpus, seed, i), so a position is all its state.

    In every epoch the corpus, taken as a ring, is cut into windows of `length` tokens from a random offset on, and
    the windows are visited in random order, each once. Samples follow one another across epochs, so no window is
    dropped when `batch_size` does not divide their number.

    Args:
        corpus: uint8 [n], n > length.
        batch_size: windows per batch, B.
        length: tokens per window, L.
        seed: any non-negative integer.

    Yields:
        (inputs, targets), int64 [B, L] each; `targets` is the text one byte further.
    """

    def __init__(self, corpus: np.ndarray, batch_size: int, length: int, *, seed: int = 0):
        for name, value, least in (("batch_size", batch_size, 1), ("length", length, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: got {value}, must be at least {least}")
        if corpus.ndim != 1 or corpus.dtype != np.uint8:
            raise TypeError(f"corpus: got {corpus.dtype} {list(corpus.shape)}, must be uint8 [n]")
        if len(corpus) <= length:
            raise ValueError(f"corpus: got {len(corpus)} bytes, must be more than length = {length}")
        self.corpus = corpus
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self.position = 0
        self.windows_per_epoch = len(corpus) // length
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Batch number `index` ≥ 0, wherever the iterator stands."""
        samples = index * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(samples, self.windows_per_epoch)
        starts = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            starts[inside] = self._starts(int(epoch))[places[inside]]
        return windows(self.corpus, starts, self.length)

    def _starts(self, epoch: int) -> np.ndarray:
        """First byte of each window of an epoch, in the order of their visits, int64 [windows_per_epoch]."""
        if epoch not in self._epochs:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            offset = generator.integers(len(self.corpus))
            starts = offset + self.length * generator.permutation(self.windows_per_epoch)
            # A batch touches two neighbouring epochs, or many when the corpus is smaller than a batch.
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = starts
        return self._epochs[epoch]

    def __next__(self) -> tuple[Tensor, Tensor]:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """What to give to `load_state_dict` to continue from here, as plain integers."""
        return {
            "position": self.position,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "length": self.length,
            "corpus_bytes": len(self.corpus),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: `state` is of other batches (seed, sizes or corpus), whose continuation this would not be.
        """
        for name, own in self.state_dict().items():
            if name not in state:
                raise ValueError(f"state: {name!r} is missing")
            if name != "position" and state[name] != own:
                raise ValueError(f"state: {name} was {state[name]}, these batches have {own}")
        self.position = state["position"]


def windows(corpus: np.ndarray, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), int64 [B, length] each, of the windows at `starts` [B] of the ring `corpus`."""
    places = (starts[:, None] + np.arange(length + 1)) % len(corpus)
    ids = torch.from_numpy(corpus[places].astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, must be 'train' or 'valid'")


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> list[str]:
    """Relative names, with "/", of the files below `root`, sorted; hidden ones and folders in `skip` left out."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        inside = Path(folder).relative_to(root)
        names += [(inside / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _load_folder(path: Path, split: str) -> np.ndarray:
    names = [name for name in _walk(path) if (path / name).is_file() and not _is_binary(path / name)]
    hashed = len(names) >= FEWEST_FILES_TO_HASH
    if hashed:
        names = [name for name in names if split_of(name) == split]
    corpus = _join([(path / name).read_bytes() for name in names])
    if not len(corpus):
        raise ValueError(f"{path} holds no text" + (f" for the {split} split" if hashed else ""))
    return corpus if hashed else _cut_tail(corpus, split)


def _cut_tail(corpus: np.ndarray, split: str) -> np.ndarray:
    """All but the last 3 % of the bytes, or only those."""
    cut = len(corpus) - max(1, len(corpus) * VALID_PERCENT // 100)
    return corpus[:cut] if split == "train" else corpus[cut:]


def _join(documents: list[bytes]) -> np.ndarray:
    """The documents that are not empty, with a separator between, uint8 [n]."""
    return np.frombuffer(bytes([SEPARATOR]).join(filter(None, documents)), dtype=np.uint8)
