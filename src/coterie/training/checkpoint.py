"""Checkpoints that are whole or absent: one file, written beside its place and renamed into it.

A checkpoint is one safetensors file: tensors by name, and everything else as JSON in its header, with a checksum over
both. Reading it executes nothing. There is one file and one rename, so at any moment, whatever is killed, the name
leads to the old checkpoint or to the new one: POSIX makes the rename atomic, and the data has reached the disk before
it (and the folder after it), so that a power cut keeps the promise too.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coterie.models.pretrained import write_atomically

FORMAT = "coterie-checkpoint-1"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_checkpoint(path: str | os.PathLike, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write `tensors` and the JSON-able `state` to `path`, atomically.

    Tensors of any device and layout; ones that share memory are written once each. Floats in `state` are read back bit
    for bit.

    Raises:
        TypeError: `state` holds something that is not JSON, or a tensor's dtype is complex or otherwise unusual.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    header = {"format": FORMAT, "state": text, "checksum": f"{_checksum(own, text):08x}"}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: _write_safetensors(temporary, own, header))


def load_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The (tensors, state) that `save_checkpoint` wrote to `path`, tensors on the CPU.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: the file is not a checkpoint, is cut short, or was changed since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # Copies: what training goes on with must not be a map of the file that it replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint (cut short, damaged, or another format): {error}"
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a training checkpoint: format {header.get('format')!r}, must be {FORMAT!r}")
    text = header.get("state", "")
    if header.get("checksum") != f"{_checksum(tensors, text):08x}":
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    return tensors, json.loads(text)


def _write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file: length of the header, header, and the tensors one after another, without a second copy.

    The library's own `save_file` renames a file of its own into `path`, whose random name a killed process leaves in
    the folder for ever, once per kill; and it refuses tensors that share memory.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # every tensor is aligned
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensors: {name} is {tensor.dtype}, which is none of {', '.join(map(str, _DTYPES))}")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(tensors[name]))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _checksum(tensors: dict[str, Tensor], text: str) -> int:
    """CRC-32 of the state and of every tensor's name, dtype, shape and bytes. safetensors itself checks no content."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(_bytes(tensor), crc)
    return crc
