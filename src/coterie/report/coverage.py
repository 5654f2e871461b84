"""Before training: which weights train, which an adapter reaches, which are quantized, and which experts were missed.

Experts are stacks [E, .., ..] and no `nn.Linear`s: what looks for linear layers by type or by name passes them by and
says nothing, be it an adapter ("all-linear") or a quantizer, and most of the model stays as it was.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from coterie.modules.experts import Experts, is_hf_experts
from coterie.modules.lora_layers import LoRA
from coterie.report.table import format_table, human_count


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters of one name in all layers, as `layers.*.mixer.q_proj.weight`.

    Attributes:
        name: with * for the numbers of layers (and of experts that are modules of their own).
        count: tensors.
        params: numbers in them, as they are stored: packed quantized ones hold several in one.
        trained: tensors that have a gradient.
        adapted: frozen tensors that an adapter updates.
        quantized: tensors in integers, or in floating point of less than 16 bits.
    """

    name: str
    count: int
    params: int
    trained: int
    adapted: int
    quantized: int

    @property
    def frozen(self) -> int:
        """Tensors without a gradient of their own, whether an adapter updates them or not."""
        return self.count - self.trained


@dataclass(frozen=True)
class Coverage:
    """What `coverage` found.

    Attributes:
        groups: the model's parameters but for adapters' factors, in order.
        adapter_params: numbers in the adapters' factors; all of a model's adapters, coterie's and PEFT's.
        unadapted: names of expert tensors that stay as they are, though something in the model trains: frozen, and
            reached by no adapter.
        unquantized: names of expert tensors in 16 bits or more, though other matrices of the model are quantized.
        unchosen: by experts module, the experts that no token chose, if counts were given.
    """

    groups: tuple[ParameterGroup, ...]
    adapter_params: int
    unadapted: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()
    unchosen: Mapping[str, list[int]] = field(default_factory=dict)


def coverage(model: nn.Module, counts: Mapping[str, Tensor] | None = None) -> Coverage:
    """Looks at a model as it is about to be trained; nothing is run.

    Adapters are coterie's (`add_lora`) and PEFT's. Experts are coterie's `Experts`, what is on transformers' experts
    interface, and whatever else holds stacks [E, .., ..] and is called Experts.

    Args:
        model: any module.
        counts: [E] tokens for each expert, by the name of the experts module, to say which experts none chose: those
            get no gradient, whatever reaches them.

    Raises:
        ValueError: counts name a module that is none of experts.
    """
    parameters = dict(model.named_parameters())
    factors = {id(p) for module in model.modules() for p in _own_factors(module)}
    adapted = {id(p) for module in model.modules() for p in _reached(module)}
    experts = {name: module for name, module in model.named_modules() if _is_experts(module)}
    expert_tensors = [
        (f"{_plain(name)}.{key}".removeprefix("."), p)
        for name, module in experts.items()
        for key, p in module.named_parameters(recurse=False)
        if p.dim() == 3
    ]
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if id(parameter) not in factors:
            groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", _plain(name)), []).append(parameter)
    table = [
        ParameterGroup(
            name,
            len(group),
            sum(p.numel() for p in group),
            sum(p.requires_grad for p in group),
            sum(id(p) in adapted and not p.requires_grad for p in group),
            sum(_is_quantized(p) for p in group),
        )
        for name, group in groups.items()
    ]
    anything_trains = any(p.requires_grad for p in parameters.values())
    own = {id(p) for _, p in expert_tensors}
    anything_quantized = any(id(p) not in own and _is_quantized(p) for p in _matrices(model))
    return Coverage(
        tuple(table),
        sum(p.numel() for p in parameters.values() if id(p) in factors),
        tuple(name for name, p in expert_tensors if anything_trains and not (p.requires_grad or id(p) in adapted)),
        tuple(name for name, p in expert_tensors if anything_quantized and not _is_quantized(p)),
        _unchosen(counts or {}, {_plain(name) for name in experts}),
    )


def check_coverage(model: nn.Module, allow: Sequence[str] = ()) -> Coverage:
    """`coverage`, which must have missed no experts.

    Args:
        model: about to be trained.
        allow: names, with * for anything, of expert tensors that may be missed.

    Raises:
        ValueError: an adapter or a quantizer missed expert tensors; they are named.
    """
    found = coverage(model)
    problems = []
    for names, what in (
        (found.unadapted, "frozen and reached by no adapter"),
        (found.unquantized, "not quantized, though other weights are"),
    ):
        missed = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allow)]
        if missed:
            more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
            problems.append(f"{', '.join(missed[:3])}{more}: {what}")
    if problems:
        raise ValueError(f"experts were missed: {'; '.join(problems)}. What may be, name in `allow`")
    return found


def format_coverage(found: Coverage) -> str:
    """The table, then what was missed."""
    rows = [
        [
            f"{group.name} × {group.count}" if group.count > 1 else group.name,
            human_count(group.params),
            *(_share(n, group.count) for n in (group.trained, group.frozen, group.adapted, group.quantized)),
        ]
        for group in found.groups
    ]
    total = sum(group.params for group in found.groups)
    rows.append(["all but adapters", human_count(total), "", "", "", ""])
    rows.append(["adapters", human_count(found.adapter_params), "", "", "", ""])
    text = format_table(["parameter", "params", "train", "frozen", "adapted", "quantized"], rows, rules=[len(rows) - 2])
    for names, what in (
        (found.unadapted, "Frozen experts that no adapter reaches"),
        (found.unquantized, "Experts that are not quantized, though other weights are"),
        ([f"{name}: {', '.join(map(str, e))}" for name, e in found.unchosen.items()], "Experts that no token chose"),
    ):
        if names:
            text += f"\n\n{what}:\n" + "\n".join(f"  {name}" for name in names)
    return text


def _share(count: int, of: int) -> str:
    return "–" if not count else "all" if count == of else f"{count} of {of}"


def _plain(name: str) -> str:
    """Without what PEFT wraps around a model and its layers."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name).removeprefix("base_model.model.")


def _matrices(model: nn.Module) -> Iterator[Tensor]:
    """Weights of two dimensions and more; quantizers keep some in buffers."""
    for tensor in model.parameters():
        if tensor.dim() > 1 or _is_quantized(tensor):
            yield tensor
    for name, tensor in model.named_buffers():
        if tensor.dim() > 1 and "weight" in name.rpartition(".")[2]:
            yield tensor


def _is_experts(module: nn.Module) -> bool:
    if isinstance(module, Experts) or is_hf_experts(module):
        return True
    stacks = any(p.dim() == 3 for p in module.parameters(recurse=False))
    return stacks and type(module).__name__.endswith("Experts")


def _own_factors(module: nn.Module) -> Iterator[Tensor]:
    """An adapter's parameters, if the module is one or, of PEFT's, holds them."""
    if isinstance(module, LoRA):
        yield from module.parameters()
    elif hasattr(module, "base_layer"):
        for name in getattr(module, "adapter_layer_names", ()):
            held = getattr(module, name, None)
            if isinstance(held, nn.Module):
                yield from held.parameters()


def _reached(module: nn.Module) -> Iterator[Tensor]:
    """The parameters that the module's adapters update."""
    lora = getattr(module, "lora", None)
    if isinstance(lora, LoRA):
        for adapter in lora.adapters.values():
            yield from (getattr(module, matrix) for matrix in adapter)
    elif hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):  # PEFT's
        base = module
        while hasattr(base, "base_layer"):
            base = base.base_layer
        yield getattr(base, getattr(module, "parameter_name", "weight"))
    elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):  # PEFT trains a copy instead
        yield from module.original_module.parameters()


def _is_quantized(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        # A wrapper that claims a wide dtype and holds narrow numbers, as torchao's do.
        return any(_is_quantized(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.dtype != torch.bool and (not tensor.is_floating_point() or tensor.element_size() < 2)


def _unchosen(counts: Mapping[str, Tensor], experts: set[str]) -> dict[str, list[int]]:
    found = {}
    for name, count in counts.items():
        if name not in experts:
            raise ValueError(f"counts must be by experts module, {', '.join(sorted(experts)) or 'none'}; got {name!r}")
        if dead := (count == 0).nonzero().flatten().tolist():
            found[name] = dead
    return found
