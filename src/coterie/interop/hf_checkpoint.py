"""transformers' checkpoints as coterie models, and coterie models as transformers' checkpoints.

Every weight of a checkpoint has its place in a coterie tensor, whole or a part of it: `hf_places` makes that list from
the family's table; loading copies along it, saving along it backwards. So what is read and written again is equal, bit
for bit. Nothing is guessed from shapes, and every weight's shape is checked before the first is read.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from coterie.interop._exported import optional
from coterie.interop.hf_config import config_from_hf, config_to_hf, differences, family_of, fitting, is_mxfp4
from coterie.interop.hf_families import FAMILIES, Family
from coterie.interop.hf_mxfp4 import dequantized_headers, dequantized_weights
from coterie.interop.hf_places import LAYER, Header, Place, places_of
from coterie.models.config import TransformerConfig
from coterie.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, write_atomically
from coterie.models.transformer import Transformer
from coterie.report.model_card import write_model_card

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
# Buffers that old checkpoints have, which the config says already.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")
_HEAD = "lm_head.weight"


def from_hf(
    path_or_model: "str | os.PathLike | PreTrainedModel",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Transformer:
    """A transformers checkpoint as coterie's `Transformer`: the same logits, from the same weights.

    The checkpoint's safetensors files are read one weight at a time, so memory holds the model and one weight more.
    Experts in MXFP4, as gpt_oss's are published, become bfloat16, exactly; `to_hf` writes them as that.
    The families are those of `coterie.interop.hf_families.FAMILIES`. transformers' own config stays with the model as
    `model.hf_config`, for `to_hf` to write what coterie has no field for (token ids, dropout) as it was.

    Args:
        path_or_model: a folder with a checkpoint, the name of one on the Hugging Face hub, or a transformers model,
            whose weights are copied.
        device: where to; None: the CPU.
        dtype: of the parameters; None: the checkpoint's.
        revision: of a checkpoint on the hub.

    Raises:
        ImportError: transformers 5 is not installed (pip install 'coterie[hf]').
        FileNotFoundError: no such folder, and no such name on the hub.
        ValueError: a family or a feature that coterie does not have, a weight that is missing, left over or of another
            shape than the config says, a file that is cut short, pickled weights; it is named.
    """
    if isinstance(path_or_model, str | os.PathLike):
        folder = _local_folder(path_or_model, revision)
        hf_config = _read_hf_config(folder)
        files = _weight_files(folder)
        headers, weights = _headers(files), _weights(files)
        if is_mxfp4(hf_config):
            headers, weights = dequantized_headers(headers), dequantized_weights(weights)
            del hf_config.quantization_config
    else:
        hf_config = path_or_model.config
        theirs = _on_disk_names(path_or_model)
        headers = {name: Header(tuple(t.shape), t.dtype) for name, t in theirs.items()}
        weights = theirs.items()
    family = family_of(hf_config.model_type)
    config = config_from_hf(hf_config)
    model = Transformer(config, device="meta")
    places = _checked_places(model, family, headers)

    tensors = _empty_tensors(model, places, headers, device or "cpu", dtype)
    tied_head = None
    for name, weight in tqdm(weights, "weights", len(headers), unit="", leave=False, disable=None):
        if name in places:
            places[name].fill(tensors, weight)
        elif name == _HEAD:
            tied_head = weight
    embedding = tensors["embedding.weight"]
    if tied_head is not None and not torch.equal(tied_head.to(embedding), embedding):
        raise ValueError(f"{_HEAD} differs from the embedding, but the config says tie_word_embeddings")
    model.load_state_dict(tensors, assign=True)
    model.hf_config = hf_config
    return model


def to_hf(
    model: Transformer,
    path: str | os.PathLike,
    *,
    family: str | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write the folder `path` for transformers to load: config.json and the weights in safetensors, as it writes them,
    and a README.md that says what the model is and costs, unless there is one that coterie did not write.

    A model that `from_hf` loaded is written as the family it came from, equal bit for bit where it was not changed.
    Every file is written beside its place and renamed into it; memory holds one shard besides the model.

    Args:
        model: a coterie model.
        path: the folder, which is made if it is not there.
        family: a model type of `coterie.interop.hf_families.FAMILIES`; None: the one it came from, or else the first
            that says all this model does.
        max_shard_size: of one file of weights, in bytes or as "5GB".

    Raises:
        ImportError: transformers 5 is not installed (pip install 'coterie[hf]').
        ValueError: the model has what transformers' family has not, or no family has; it is named.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"path must be a folder, got {folder}")
    hf_config = _their_config(model, family)
    chosen = FAMILIES[hf_config.model_type]
    tensors = model.state_dict()
    places = dict(places_of(tensors, model.config, chosen.weights, chosen.linear_weights))
    if unplaced := sorted(tensors.keys() - {name for place in places.values() for name in place.names}):
        raise ValueError(
            f"a {chosen.model_type} checkpoint has no place for {unplaced[0]} and {len(unplaced) - 1} more of the "
            "model's weights (of adapters: merge_lora or remove_lora first)"
        )
    without_memory = {name: tensor.to("meta") for name, tensor in tensors.items()}
    shapes = {name: place.of(without_memory) for name, place in places.items()}
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    files = shards.filename_to_tensors.items()
    for file, names in tqdm(files, "files", leave=False, disable=None):
        # Copies, for safetensors refuses tensors that share memory, as the experts in one tensor do.
        shard = {name: places[name].of(tensors).cpu().clone() for name in names}
        shard = {name: weight.contiguous() for name, weight in shard.items()}
        write_atomically(folder / file, lambda to, shard=shard: save_file(shard, to, metadata={"format": "pt"}))
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_atomically(folder / INDEX_FILE, lambda to: to.write_text(text, encoding="utf-8"))
    write_atomically(folder / CONFIG_FILE, lambda to: to.write_text(hf_config.to_json_string(), encoding="utf-8"))
    # Of an earlier save with other shards: readers would take them for this one's.
    stale = {file.name for file in folder.glob("model*.safetensors")} - set(shards.filename_to_tensors)
    stale |= {INDEX_FILE} if not shards.is_sharded else set()
    for file in stale:
        (folder / file).unlink(missing_ok=True)
    write_model_card(folder, model.config, dtype=hf_config.dtype, library="transformers")


# --- reading


def _local_folder(path: str | os.PathLike, revision: str | None) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if not isinstance(path, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise FileNotFoundError(f"no folder with a checkpoint at {folder}")
    from huggingface_hub import snapshot_download

    try:
        files = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": "*/*"}  # other formats have folders
        return Path(snapshot_download(path, revision=revision, **files))
    except Exception as error:  # whatever the hub's client raises without a network, a name or a right
        raise FileNotFoundError(f"{path} is no folder, and the hub gave none of that name: {error}") from error


def _read_hf_config(folder: Path) -> "PreTrainedConfig":
    transformers = optional("transformers", "hf")
    file = folder / CONFIG_FILE
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG_FILE}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{file} is not a config of transformers: {error}") from error
    family_of(model_type)  # before transformers reads it, which may ask for code of the model's own
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # of many types, for values of the wrong one
        raise ValueError(f"{file} is not a config of transformers: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of shards: {error}") from error
    else:
        names = [WEIGHTS_FILE]
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names a file outside its folder: {name}")
        if not (folder / name).is_file():
            pickled = sorted(file.name for file in (*folder.glob("*.bin"), *folder.glob("*.pth")))
            hint = f" ({pickled[0]} is pickled: reading it could run any code, so it is not read)" if pickled else ""
            raise ValueError(f"{folder} has no {name}{hint}")
    return [folder / name for name in names]


def _headers(files: Iterable[Path]) -> dict[str, Header]:
    """Shape and dtype of every weight, from the files' headers alone."""
    headers: dict[str, Header] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                weight = file.get_tensor(name)  # mapped, not read
                if name in headers:
                    raise ValueError(f"{name} is twice in the checkpoint, the second time in {path.name}")
                headers[name] = Header(tuple(weight.shape), weight.dtype)
    return headers


def _weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _on_disk_names(model: "PreTrainedModel") -> Mapping[str, Tensor]:
    """A transformers model's weights by the names of its checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, model.state_dict())


# --- checking


def _checked_places(model: Transformer, family: Family, headers: Mapping[str, Header]) -> dict[str, Place]:
    """The places of the checkpoint's weights; ValueError unless they fill the model, each part once."""
    tensors = model.state_dict()
    wanted = dict(places_of(tensors, model.config, family.weights, family.linear_weights))
    stacked = dict(places_of(tensors, model.config, family.stacked_weights, {}))
    places = {name: place for name, place in {**wanted, **stacked}.items() if name in headers}
    problems = []
    for name, place in places.items():
        shape = tuple(place.of(tensors).shape)
        if headers[name].shape != shape:
            problems.append(f"{name} has the shape {list(headers[name].shape)}, the config makes it {list(shape)}")
    filled = dict.fromkeys(tensors, 0)
    for place in places.values():
        for ours in place.names:
            filled[ours] += tensors[ours][place.index].numel()
    for name, place in wanted.items():
        ours = place.names[0]
        if name not in places and filled[ours] < tensors[ours].numel():
            problems.append(f"{name} is missing")
        elif filled[ours] > tensors[ours].numel():
            problems.append(f"{name} is there twice, alone and among {family.stacked_weights.values()}")
    unread = []
    for name in headers.keys() - places.keys():
        match = LAYER.fullmatch(name.removeprefix("model."))
        if name.startswith("mtp.") or (match and int(match[1]) >= model.config.num_layers):
            unread.append(name)
        elif not _DERIVED.search(name) and not (name == _HEAD and model.head is None):
            problems.append(f"{name} has no place in the model")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("the checkpoint does not fit its config: " + "; ".join(sorted(problems)[:5]) + more)
    if unread:
        warnings.warn(
            f"{len(unread)} weights of layers past the last, {min(unread)} for one, are not read: coterie has no "
            "multi-token prediction, and to_hf will not write them",
            stacklevel=3,
        )
    return places


def _empty_tensors(model, places, headers, device, dtype) -> dict[str, Tensor]:
    """Room for all weights, each in the dtype of what will stand there."""
    parameters = {name for name, _ in model.named_parameters()}
    dtypes: dict[str, torch.dtype] = {}
    for name, place in places.items():
        theirs = headers[name].dtype
        if not theirs.is_floating_point or theirs.itemsize < 2:
            raise ValueError(f"{name} is of {theirs}: coterie loads weights of 16 bits and more in floating point")
        for ours in place.names:
            if dtypes.setdefault(ours, theirs) != theirs and dtype is None:
                raise ValueError(f"{name} is of {theirs} and others of the same tensor of {dtypes[ours]}: give dtype")
    return {
        name: torch.empty(
            tensor.shape,
            dtype=(dtype or dtypes[name]) if name in parameters else tensor.dtype,
            device=device,
        )
        for name, tensor in model.state_dict().items()
    }


# --- writing


def _their_config(model: Transformer, family: str | None) -> "PreTrainedConfig":
    """The transformers config to write: the one the model came with, changed where the model was."""
    transformers = optional("transformers", "hf")
    source: Any = getattr(model, "hf_config", None)
    if family is None:
        family = source.model_type if source is not None else _fitting_family(model.config)
    chosen = family_of(family)
    wanted = config_to_hf(model.config, chosen)
    if source is not None and source.model_type == chosen.model_type:
        hf_config = type(source).from_dict(source.to_dict())
        if config_from_hf(source) != model.config:
            for name, value in wanted.items():
                setattr(hf_config, name, value)
    else:
        hf_config = transformers.AutoConfig.for_model(chosen.model_type, **wanted)
    hf_config.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)].__name__]
    hf_config.dtype = model.embedding.weight.dtype
    return hf_config


def _fitting_family(config: TransformerConfig) -> str:
    """The first family that says all a config does."""
    return fitting({name: differences(config, family) for name, family in FAMILIES.items()}, "family of transformers")
