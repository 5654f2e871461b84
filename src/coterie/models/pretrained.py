"""A model as a folder: config.json, and the weights in model.safetensors.

Neither file can hold code, and loading runs none: pickled weights are refused, not read. Each file is written beside
its place and renamed into it once it is on the disk, so whatever is killed, a name leads to a whole file, old or new.
A checksum of every tensor stands in the file's header; weights that other tools wrote are read without.

The folder is one of transformers too: config.json names the class that reads it there (`coterie.interop`), and what
that class writes is read here.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coterie.models.config import TransformerConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FOR_TRANSFORMERS = {"model_type": "coterie", "architectures": ["CoterieForCausalLM"]}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def save_pretrained(path: str | os.PathLike, config: TransformerConfig, state_dict: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors to the folder `path`, which is made if it is not there.

    A tied head is no tensor of its own and is not written. Tensors keep their dtype.

    Raises:
        ValueError: the state has adapters in it, for which the folder has no place.
    """
    if any(".lora.adapters." in name for name in state_dict):
        raise ValueError(
            "the model has adapters: save them with save_lora, and merge_lora or not, then remove_lora before the rest"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, state_dict)
    text = json.dumps({**FOR_TRANSFORMERS, **config.to_dict()}, indent=2) + "\n"
    write_atomically(folder / CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"))


def read_config(path: str | os.PathLike) -> TransformerConfig:
    """The config in the folder `path`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: config.json is missing or is not a config.
    """
    file = _folder(path) / CONFIG_FILE
    try:
        return TransformerConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {CONFIG_FILE}") from None
    except (ValueError, TypeError, RecursionError) as error:  # of JSON, of UTF-8 and of the config itself
        raise ValueError(f"{file} is not a coterie config: {error}") from error


def load_weights(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put the weights in the folder `path` in the place of the model's, which may be on the meta device.

    Args:
        device: where to; None: the CPU.
        dtype: of the parameters; None: the file's. Buffers (the router's selection bias) keep the file's.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: model.safetensors is missing, cut short, changed, pickled, or of another model.
    """
    folder = _folder(path)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = sorted(found.name for pattern in _PICKLED for found in folder.glob(pattern))
        hint = f" ({pickled[0]} is pickled: reading it could run any code, so it is not read)" if pickled else ""
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    tensors, _ = read_tensors(file)
    if all(name.startswith("model.") for name in tensors):  # transformers' class has the model in `.model`
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    check_names_and_shapes(file, tensors, model.state_dict())
    parameters = {name for name, _ in model.named_parameters()}
    placed = {
        name: tensor.to(device=device or "cpu", dtype=dtype if name in parameters else tensor.dtype)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(placed, assign=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file at a temporary name, and put it at `path` in one instant, already on the disk.

    One writer at a time. What a killed writer left behind is written over by the next.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # what safetensors makes of a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder(path: str | os.PathLike) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}")
    return folder


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with a checksum of every tensor, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = json.dumps({name: _checksum(t) for name, t in tensors.items()})
    # "format" is what other readers of safetensors look for.
    metadata = {**(metadata or {}), "format": "pt", "crc32": checksums}
    write_atomically(path, lambda file: save_file(tensors, file, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, in memory of its own, and the file's metadata.

    Raises:
        ValueError: it is pickled, cut short, changed, or no such file at all.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise ValueError(f"{path} is pickled, whatever its name: reading it could run any code, so it is not read")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # A clone, for the tensors lie in the mapped file: wherever the header leaves them, where SIMD kernels
            # take other, differently rounding paths, and gone with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        checksums = json.loads(metadata.get("crc32", "{}"))
        changed = [name for name, t in tensors.items() if checksums.get(name, None) not in (None, _checksum(t))]
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if changed:
        raise ValueError(f"{path} is corrupted: {_listed(changed)} differs from the checksum it was saved with")
    return tensors, metadata


def check_names_and_shapes(
    path: Path,
    got: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    whole: str = f"its {CONFIG_FILE}",
    maker: str = "the config",
) -> None:
    """Raises ValueError unless both have the same names, with tensors of the same shapes."""
    problems = []
    if missing := sorted(wanted.keys() - got.keys()):
        problems.append(f"missing {_listed(missing)}")
    if unexpected := sorted(got.keys() - wanted.keys()):
        problems.append(f"unexpected {_listed(unexpected)}")
    shapes = [
        f"{name} ({list(got[name].shape)}, {maker} makes it {list(wanted[name].shape)})"
        for name in sorted(wanted.keys() & got.keys())
        if got[name].shape != wanted[name].shape
    ]
    if shapes:
        problems.append(f"of another shape {_listed(shapes)}")
    if problems:
        raise ValueError(f"{path} does not fit {whole}: " + "; ".join(problems))


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())
