"""LoRA: small trained updates of frozen experts and linear layers, any number of them in one model.

    add_lora(model, rank=8, alpha=16, targets=["experts", "q_proj"])
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-4)

The update of a matrix W is s·B·A of rank R (Hu et al., arXiv:2106.09685): for experts one each (as in MixLoRA,
arXiv:2404.15159), or with A, B or both shared by all experts of a layer. It is computed beside W, on the rows that
were routed there: neither W + s·B·A nor a gradient as large as W is ever made. The factors are a child of the module
whose matrices they update, called `lora`; the names of everything else stay as they were.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from coterie.modules.experts import Experts, is_hf_experts
from coterie.modules.lora_layers import Adapter, ExpertsLoRA, LinearLoRA, LoRA, LoRASettings, LowRank
from coterie.modules.packed import Packed
from coterie.ops.lora import check_adapter_ids


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    *,
    targets: str | Sequence[str] = ("experts",),
    name: str = "default",
    shared: str = "none",
    dropout: float = 0.0,
    rslora: bool = False,
    freeze: bool = True,
) -> list[str]:
    """Gives a model a new adapter, which is the one that applies from now on. At first it changes nothing: B is 0.

    Factors are float32 (float64 beside float64 weights) and are multiplied in the dtype of what they are applied to.

    Args:
        model: any module with `Experts`, with transformers' experts run by `experts_implementation="coterie"`, or with
            `nn.Linear` in it: a `Transformer`, a `MoE`, a transformers model.
        rank: R.
        alpha: the update's scale s is alpha / rank.
        targets: what to update, one or several: the last words of a dotted name ("q_proj", "experts.down_proj"), of a
            matrix, of a linear layer or of a module that has such in it ("experts", "mixer"), with * for anything.
        name: of the adapter.
        shared: which factors all experts of a layer have in common: "none" | "a" | "b" | "both".
        dropout: the probability with which numbers of A's input become 0 in training.
        rslora: s = alpha / sqrt(rank) instead (arXiv:2312.03732).
        freeze: nothing but adapters trains after it: everything else gets requires_grad False.

    Returns:
        Names of the updated matrices.

    Raises:
        ValueError: a setting is out of range, a target matches nothing, the name is taken or an adapter is merged;
            experts that are quantized, or of a transformers model that runs another implementation. The model is as
            it was then.
    """
    settings = LoRASettings(rank, alpha, shared, dropout, rslora)
    sites = find_sites(model, (targets,) if isinstance(targets, str) else targets)
    attach(model, sites, settings, name, freeze=freeze)
    return list(sites)


def set_adapter(model: nn.Module, names: str | Sequence[str] | None, adapter_ids: Tensor | None = None) -> None:
    """Chooses the adapter that applies: one for all, none, or one of several for each sequence or token.

        set_adapter(model, "french")
        set_adapter(model, ["french", "maths"], torch.tensor([0, 1, -1]))  # for a batch of three sequences

    With gradient checkpointing leave the choice as it is until backward has run.

    Args:
        names: of an adapter, or of those that adapter_ids index; None: the model without any.
        adapter_ids: [G] int64 in -1..len(names)-1, -1 being none. Each is for T/G tokens in a row: one a sequence of
            the batch, or one a token.

    Raises:
        ValueError: a name that the model has not, or twice; an id out of range; several names without ids; several
            adapters of different dropout; an adapter is merged.
        TypeError: adapter_ids are not int64.
    """
    _check_unmerged(model)
    one = isinstance(names, str)
    names = () if names is None else (names,) if one else tuple(names)
    for name in names:
        _check_known(model, name)
    if len(set(names)) < len(names):
        raise ValueError(f"names must be different, got {', '.join(map(repr, names))}")
    if adapter_ids is None and len(names) > 1:
        raise ValueError(f"adapter_ids must say which of {len(names)} adapters is for which sequence, got None")
    if adapter_ids is not None:
        check_adapter_ids(adapter_ids, len(names))
    dropouts = {each.settings.dropout for lora in _loras(model) for n, each in lora.adapters.items() if n in names}
    if len(dropouts) > 1:
        raise ValueError(f"adapters that share a batch must have one dropout, got {sorted(dropouts)}")
    for lora in _loras(model):
        lora.choose(names, adapter_ids)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters that a model has, in the order in which they came."""
    return list(dict.fromkeys(name for lora in _loras(model) for name in lora.adapters))


def lora_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The factors of one adapter, or of all: what an optimizer is given.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    if name is not None:
        _check_known(model, name)
    adapters = [item for lora in _loras(model) for item in lora.adapters.items()]
    return [factor for key, adapter in adapters if name in (None, key) for factor in adapter.parameters()]


@torch.no_grad()
def merge_lora(model: nn.Module, name: str | None = None) -> None:
    """Adds an adapter's update to the weights, in place: the model computes as with it, at the price of without it.

    The sum is made in float32 and rounded to the weights' dtype. In bfloat16 that drops what is smaller than 1/256
    of a weight: the merged model differs from the unmerged by that rounding, and `unmerge_lora` restores the weights
    to within it (and not bit for bit; in float32 to about 1e-7). Keep a copy of them where that matters.

    Args:
        name: of the adapter, which becomes the one that applies; None: the one that does.

    Raises:
        ValueError: no adapter or several apply and none is named; one is merged already; a weight is tied to another.
        TypeError: a weight is quantized.
    """
    _check_unmerged(model)
    if name is None:
        active = {each for lora in _loras(model) for each in lora.active}
        if len(active) != 1 or any(lora.adapter_ids is not None for lora in _loras(model)):
            raise ValueError(f"name must say which adapter to merge, for {sorted(active) or 'none'} apply")
        (name,) = active
    _check_known(model, name)
    _check_mergeable(model, name)
    set_adapter(model, name)
    for module, lora in _adapted(model):
        if name in lora.adapters:
            _add_update(module, lora.adapters[name], 1)
            lora.merged = name


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Takes the merged adapter out of the weights again, to within rounding; see `merge_lora`.

    Raises:
        ValueError: none is merged.
    """
    merged = [(module, lora) for module, lora in _adapted(model) if lora.merged is not None]
    if not merged:
        raise ValueError("no adapter is merged: there is nothing to unmerge")
    for module, lora in merged:
        _add_update(module, lora.adapters[lora.merged], -1)
        lora.merged = None


def remove_lora(model: nn.Module, name: str | None = None) -> None:
    """Removes an adapter, or all. A merged one stays in the weights, for good; what was frozen stays frozen.

    Where the removed adapter was among those that apply, none applies afterwards.

    Raises:
        ValueError: the model has no such adapter, or another one is merged.
    """
    if name is not None:
        _check_known(model, name)
        for lora in _loras(model):
            if lora.merged not in (None, name):
                raise ValueError(f"adapter {lora.merged!r} is merged: call unmerge_lora(model) first")
    was_active = any(name in lora.active for lora in _loras(model))
    for module, lora in list(_adapted(model)):
        for key in [key for key in lora.adapters if name in (None, key)]:
            del lora.adapters[key]
            lora.merged = None  # it was this one
        if not lora.adapters:
            if lora.hook is not None:
                lora.hook.remove()
            del module.lora
    if was_active:
        set_adapter(model, None)


def low_ranks(model: nn.Module, name: str) -> dict[str, LowRank]:
    """An adapter's factors by the dotted name of the matrix that they update.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    _check_known(model, name)
    return {
        site: module.lora.adapters[name][matrix]
        for site, (module, matrix) in all_sites(model).items()
        if (lora := getattr(module, "lora", None)) and name in lora.adapters and matrix in lora.adapters[name]
    }


def all_sites(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every matrix that can be updated: by dotted name, its module and what it is called there."""
    return {
        f"{prefix}.{matrix}".removeprefix("."): (module, matrix)
        for prefix, module in model.named_modules()
        for matrix in _matrices(module)
    }


def find_sites(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[nn.Module, str]]:
    """Those of `all_sites` that `targets` name, as `add_lora` says."""
    there = all_sites(model)
    found = {target: [name for name in there if _matches(name, target)] for target in targets}
    for target, names in found.items():
        if not names:
            endings = [".".join(name.removesuffix(".weight").split(".")[-2:]) for name in there]
            choice = ", ".join(dict.fromkeys(endings)) or "nothing: no experts and no linear layers"
            raise ValueError(f"targets: {target!r} matches nothing that can be updated; there is {choice}")
    if not found:
        raise ValueError("targets must name something to update, got none")
    return {name: site for name, site in there.items() if any(name in names for names in found.values())}


def attach(
    model: nn.Module,
    sites: Mapping[str, tuple[nn.Module, str]],
    settings: LoRASettings,
    name: str,
    *,
    freeze: bool,
) -> None:
    """`add_lora` for matrices that `find_sites` found."""
    _check_unmerged(model)
    if name in adapter_names(model):
        raise ValueError(f"name must be new, but the model has an adapter {name!r} already")
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name must be letters, digits, _ and -, and no method of a module, got {name!r}")
    for site, (module, matrix) in sites.items():
        _check_site(site, module, matrix)
    if freeze:
        factors = set(lora_parameters(model))
        for parameter in model.parameters():
            if parameter not in factors:
                parameter.requires_grad_(False)
    for module, matrix in sites.values():
        if getattr(module, "lora", None) is None:
            _give(module)
        adapters = module.lora.adapters
        if name not in adapters:
            adapters[name] = Adapter(settings)
        weight = getattr(module, matrix)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        adapters[name][matrix] = LowRank(shape_of(module, matrix), settings, device=weight.device, dtype=dtype)
    set_adapter(model, name)


def shape_of(module: nn.Module, matrix: str) -> tuple[int, int, int]:
    """[E, O, I] of a module's matrix, however it is stored."""
    if isinstance(module, nn.Linear):
        return 1, module.out_features, module.in_features  # a quantized weight may have any shape
    return tuple(_as_stack(module, getattr(module, matrix)).shape)


def _matrices(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.Linear):
        return ("weight",)
    if isinstance(module, Experts) or is_hf_experts(module):
        return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    return ()


def _as_stack(module: nn.Module, weight: Tensor) -> Tensor:
    """A view [E, O, I]."""
    if isinstance(module, nn.Linear):
        return weight.unsqueeze(0)
    return weight.mT if getattr(module, "is_transposed", False) else weight


def _matches(name: str, target: str) -> bool:
    """Whether `target` ends the name, or that of a module around it."""
    words = name.split(".")
    return any(fnmatchcase("." + ".".join(words[: end + 1]), "*." + target) for end in range(len(words)))


def _check_site(site: str, module: nn.Module, matrix: str) -> None:
    if isinstance(module, Packed):
        raise ValueError(f"{site} is packed for inference and takes no adapter: coterie.unpack(model) first")
    if isinstance(module, nn.Linear):
        return
    weight = getattr(module, matrix, None)
    if not isinstance(weight, Tensor) or weight.dim() != 3 or not _is_plain(weight):
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{site} must be [E, O, I] in floating point of 16 bits or more to be updated, got {got}")
    if is_hf_experts(module):
        _check_implementation(module)


def _check_implementation(module: nn.Module, *_) -> None:
    """Also a hook before every forward: other implementations would leave the adapter out and say nothing."""
    implementation = module.config._experts_implementation
    if implementation != "coterie" and (getattr(module, "lora", None) is None or module.lora.applies):
        raise ValueError(
            f"an adapter of {type(module).__name__} needs the experts implementation 'coterie' "
            f"(register_hf(), then model.set_experts_implementation('coterie')), got {implementation!r}"
        )


def _give(module: nn.Module) -> None:
    """A `lora` for the module, called in its forward or after it."""
    kind = LinearLoRA if isinstance(module, nn.Linear) else ExpertsLoRA
    module.lora = kind(_matrices(module)).train(module.training)
    if isinstance(module, nn.Linear):
        module.lora.hook = module.register_forward_hook(_add_to_output, with_kwargs=True)
    elif is_hf_experts(module):
        module.lora.hook = module.register_forward_pre_hook(_check_implementation)


def _add_to_output(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    if not module.lora.applies:
        return output
    return output + module.lora(args[0] if args else kwargs["input"]).to(output.dtype)


def _add_update(module: nn.Module, adapter: Adapter, sign: int) -> None:
    """In the weights, one expert at a time."""
    for matrix, factors in adapter.items():
        stack = _as_stack(module, getattr(module, matrix))
        work = torch.promote_types(stack.dtype, torch.float32)
        a, b = (factor.to(work).expand(len(stack), -1, -1) for factor in (factors.a, factors.b))
        for expert, weight in enumerate(stack):
            weight.copy_(weight.to(work).addmm(b[expert], a[expert], alpha=sign * adapter.settings.scale))


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, LoRA]]:
    for module in model.modules():
        if isinstance(lora := getattr(module, "lora", None), LoRA):
            yield module, lora


def _loras(model: nn.Module) -> Iterator[LoRA]:
    return (lora for _, lora in _adapted(model))


def _is_plain(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.element_size() >= 2


def _check_known(model: nn.Module, name: str) -> None:
    if name not in (names := adapter_names(model)):
        raise ValueError(f"the model has no adapter {name!r}, but {', '.join(map(repr, names)) or 'none at all'}")


def _check_unmerged(model: nn.Module) -> None:
    if merged := next((lora.merged for lora in _loras(model) if lora.merged is not None), None):
        raise ValueError(f"adapter {merged!r} is merged: call unmerge_lora(model) first")


def _check_mergeable(model: nn.Module, name: str) -> None:
    places: dict[int, list[str]] = {}
    for place, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(place)
    for module, lora in _adapted(model):
        if name not in lora.adapters:
            continue
        for matrix in lora.adapters[name]:
            weight = getattr(module, matrix)
            first, *others = places.get(id(weight), [matrix])
            if not _is_plain(weight):
                raise TypeError(f"{first} must be floating point of 16 bits or more to merge into, got {weight.dtype}")
            if others:
                raise ValueError(f"{first} is {others[0]} too: an update merged into one would change the other")
