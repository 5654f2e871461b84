"""An adapter as a file: its factors, and what it takes to put them back, in one small safetensors file."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from coterie.models.pretrained import check_names_and_shapes, read_tensors, write_tensors
from coterie.modules.lora import adapter_names, all_sites, attach, low_ranks, shape_of
from coterie.modules.lora_layers import LoRASettings, LowRank

_KEY, _VERSION = "coterie_lora", 1


def save_lora(model: nn.Module, path: str | os.PathLike, name: str | None = None) -> None:
    """Write one adapter to the file `path`: whole or not at all, and without the model it belongs to.

    Its tensors are "<name of the matrix>.a" and ".b"; rank, alpha and the like stand in the metadata.

    Args:
        model: one that `add_lora` gave an adapter.
        path: of the file, "….safetensors" as a rule; its folder is made if it is not there.
        name: of the adapter; None: the only one there is.

    Raises:
        ValueError: the model has no such adapter, or several and none is named.
    """
    if name is None:
        names = adapter_names(model)
        if len(names) != 1:
            raise ValueError(f"name must say which adapter to save, for the model has {names or 'none'}")
        (name,) = names
    sites = low_ranks(model, name)
    there = all_sites(model)
    settings = there[next(iter(sites))][0].lora.adapters[name].settings  # the same in all modules
    facts = {"version": _VERSION, "name": name, **asdict(settings), "matrices": list(sites)}
    tensors = {f"{site}.{letter}": getattr(low, letter) for site, low in sites.items() for letter in "ab"}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, {_KEY: json.dumps(facts)})


@torch.no_grad()
def load_lora(model: nn.Module, path: str | os.PathLike, name: str | None = None, *, freeze: bool = True) -> list[str]:
    """Give the model the adapter in the file `path`, as `add_lora` would; it is the one that applies from now on.

    Args:
        model: of the matrices that the adapter was made for, by name and shape.
        path: of the file.
        name: for the adapter; None: the one that it was saved with.
        freeze: as in `add_lora`.

    Returns:
        Names of the updated matrices.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is pickled (and not read), cut short, changed, of another version, no adapter, or of another
            model; the message names what does not fit. Also what `add_lora` refuses. The model is as it was then.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no adapter at {file}")
    tensors, metadata = read_tensors(file)
    settings, saved_name, matrices = _read_facts(file, metadata)
    there = all_sites(model)
    if strangers := [site for site in matrices if site not in there]:
        raise ValueError(f"{file} does not fit the model, which has no {strangers[0]} ({len(strangers)} such in all)")
    wanted = {}
    for site in matrices:
        low = LowRank(shape_of(*there[site]), settings, device="meta")
        wanted |= {f"{site}.a": low.a, f"{site}.b": low.b}
    check_names_and_shapes(file, tensors, wanted, "the model", "the model")
    name = saved_name if name is None else name
    attach(model, {site: there[site] for site in matrices}, settings, name, freeze=freeze)
    for site, low in low_ranks(model, name).items():
        for letter in "ab":
            getattr(low, letter).copy_(tensors[f"{site}.{letter}"])
    return matrices


def _read_facts(file: Path, metadata: dict[str, str]) -> tuple[LoRASettings, str, list[str]]:
    try:
        facts = json.loads(metadata[_KEY])
        version = facts.pop("version")
        if version != _VERSION:
            raise ValueError(f"its version is {version!r}, this coterie reads {_VERSION}")
        name, matrices = facts.pop("name"), facts.pop("matrices")
        if not (isinstance(name, str) and isinstance(matrices, list) and all(isinstance(m, str) for m in matrices)):
            raise ValueError("its name or matrices are not strings")
        return LoRASettings(**facts), name, matrices
    except KeyError as error:
        raise ValueError(f"{file} is no adapter of coterie: its metadata have no {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no adapter of coterie that can be read: {error}") from error
