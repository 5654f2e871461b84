"""Models whose matrices are packed for inference on a CPU: a few rows a step read them two to three times as fast.

Packing is explicit, in place, and undone by `unpack`: every module stays the object it is, and its class becomes one
that multiplies by packed matrices. A packed model is for inference alone, in its dtype and on the CPU.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from coterie.modules.attention import Attention
from coterie.modules.embedding import TiedEmbedding
from coterie.modules.experts import Experts, is_hf_experts
from coterie.ops._expert_mlp_packed import packed_expert_mlp
from coterie.ops._packed import PackedMatrix, PackedRows, PackedStack, packable_dtypes, packed_linear
from coterie.ops.routing import Routing


class Packed:
    """Mixed into a module's class while matrices of it are packed.

    Attributes:
        packed: the packed matrices, by the names of the parameters they were.

    Such a parameter is no longer among `parameters()`; reading it, or `state_dict()`, gives a plain copy made for the
    occasion. One that another module has too stays where it is.
    """

    packed: dict[str, PackedMatrix | PackedRows | PackedStack]

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        if value is None and name in self.packed:
            with torch.inference_mode():  # which refuses to be written to: that would change nothing
                return self.packed[name].dense()
        return value

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self.packed and param is not self._parameters[name]:
            raise RuntimeError(f"{name} is packed and cannot be set: coterie.unpack(model) first")
        super().register_parameter(name, param)

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError("a packed model cannot be trained: coterie.unpack(model) first")
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        """Behind `to`, `float`, `cuda` and the like."""
        for dtype in {matrix.dtype for matrix in self.packed.values()}:
            probe = fn(torch.empty(0, dtype=dtype))
            if probe.dtype != dtype or probe.device.type != "cpu":
                raise RuntimeError(
                    f"packed weights stay in {dtype} on the CPU, got {probe.dtype} on {probe.device}: "
                    "coterie.unpack(model) first"
                )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, matrix in self.packed.items():
            if self._parameters[name] is None:
                destination[prefix + name] = matrix.dense()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        raise RuntimeError(f"weights cannot be loaded into a packed model: coterie.unpack(model) first (at {prefix!r})")


class PackedLinear(Packed, nn.Linear):
    """A linear layer by a packed matrix."""

    def forward(self, input: Tensor) -> Tensor:
        return packed_linear(input, self.packed["weight"], self.bias)


class PackedExperts(Packed, Experts):
    """Experts by one packed matrix per expert and layer."""

    def forward(self, x: Tensor, routing: Routing, addend: Tensor | None = None) -> Tensor:
        y = packed_expert_mlp(
            x,
            routing.expert_ids,
            routing.weights,
            self.packed["gate_up_proj"],
            self.packed["down_proj"],
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            activation=self.activation,
        )
        return y if addend is None else y + addend

    def extra_repr(self) -> str:
        num_experts, dim, hidden_dim = self.packed["down_proj"].shape
        return f"{num_experts}, dim={dim}, hidden_dim={hidden_dim}, activation={self.activation!r}"


class PackedAttention(Packed, Attention):
    """Attention whose projections of x are rows of one packed matrix."""

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        parts = _projections(self)
        if not _all_plainly(PackedLinear, parts):
            return super()._project(x)
        bias = None if self.q_proj.bias is None else torch.cat([part.bias for part in parts])
        y = packed_linear(x, self.q_proj.packed["weight"].whole, bias)
        return y.split([part.out_features for part in parts], dim=-1)


class PackedTiedEmbedding(Packed, TiedEmbedding):
    """The embedding plain, for look-ups, and packed beside it, for logits."""

    def logits(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed["weight"])


def pack_for_inference(model: nn.Module) -> nn.Module:
    """Pack, in place, the matrices of all linear layers and experts of a model on a CPU, for faster generation.

    Values stay equal to rounding, and memory too, but for the matrix of a tied head, which is held twice. The model is
    put in evaluation mode; it can be called without gradients, copied and saved (as plain weights), and refuses, by
    name, to be trained, moved, cast or loaded into, until `unpack`.

    Packed are coterie's modules, every other `nn.Linear`, and the experts of transformers' models that run as
    experts_implementation="coterie" (see `coterie.interop.register_hf`); in bfloat16, and in float32 where oneDNN is
    the faster library. The rest stays as it is. A model that reads a packed layer's weight by itself gets a copy each
    time, which is slow.

    Returns:
        The model.

    Raises:
        ValueError: the CPU or this build of torch has no fast packed products, nothing in the model can be packed, its
            experts run by another implementation, or it has adapters (`add_lora`).
    """
    dtypes = packable_dtypes()
    if not dtypes:
        raise ValueError(
            "packing needs a torch with oneDNN and a CPU with bfloat16 instructions (AVX-512 BF16, AMX or ARM's "
            "BF16): there is nothing to gain here"
        )
    modules = [module for module in model.modules() if not isinstance(module, Packed)]
    plain = {id(getattr(module, name)) for module in modules for name in getattr(module, "keeps_plain", ())}
    found = {module: names for module in modules if id(module) not in plain and (names := _matrices(module))}
    kinds = {module: {_kind(module._parameters.get(name)) for name in names} for module, names in found.items()}
    accepted = {f"{dtype} on cpu" for dtype in dtypes}
    fit = [module for module in found if kinds[module] <= accepted]
    if not fit and len(modules) == len(list(model.modules())):
        got = ", ".join(sorted(set().union(*kinds.values()))) or "none"
        raise ValueError(f"model must have linear layers or experts in {' or '.join(sorted(accepted))}, got {got}")
    if any(getattr(module, "lora", None) is not None for module in modules):
        raise ValueError(
            "model has adapters, which packed weights cannot take: merge_lora(model) and remove_lora(model)"
        )
    for module in fit:
        if is_hf_experts(module) and (name := module.config._experts_implementation) != "coterie":
            raise ValueError(
                f"experts of transformers are packed for experts_implementation 'coterie', got {name!r}: call "
                "coterie.interop.register_hf() and model.set_experts_implementation('coterie') first"
            )
    # By identity, for a reference would keep what is packed from being freed.
    owners = Counter(id(parameter) for module in modules for parameter in module._parameters.values())
    alone = {module for module in fit if all(owners[id(module._parameters[name])] == 1 for name in found[module])}
    for module in modules:
        if type(module) is Attention and alone.issuperset(_projections(module)):
            _pack_projections(module)
    for module in fit:
        if isinstance(module, Packed):
            continue
        packed = {}
        for name, transposed in found[module].items():
            parameter = module._parameters[name]
            packed[name] = PackedStack(parameter, transposed) if parameter.dim() == 3 else PackedMatrix(parameter)
            if module in alone and not isinstance(module, TiedEmbedding):
                module._parameters[name] = None
            del parameter
        _become_packed(module, packed)
    return model.eval()


def unpack(model: nn.Module) -> nn.Module:
    """Undo `pack_for_inference`, in place: plain parameters again, bit for bit; the model stays in evaluation mode.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, Packed):
            packed = module.__dict__.pop("packed")
            module.__class__ = type(module).__bases__[1]
            for name in tuple(packed):
                matrix = packed.pop(name)
                if module._parameters[name] is None:
                    module._parameters[name] = nn.Parameter(matrix.dense(), matrix.requires_grad)
    return model


def _matrices(module: nn.Module) -> dict[str, bool]:
    """The names of the parameters that can be packed, and whether they are stored transposed."""
    if type(module) in (nn.Linear, TiedEmbedding):
        return {"weight": False}
    if type(module) is Experts:
        return {"gate_up_proj": False, "down_proj": False}
    if is_hf_experts(module):
        return dict.fromkeys(("gate_up_proj" if module.has_gate else "up_proj", "down_proj"), module.is_transposed)
    return {}


def _projections(attention: Attention) -> tuple[nn.Module, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _all_plainly(kind: type[nn.Module], parts: Sequence[nn.Module]) -> bool:
    """Whether all are of this very class, and nobody looks at what they do."""
    return not any(type(part) is not kind or part._forward_hooks or part._forward_pre_hooks for part in parts)


def _pack_projections(attention: Attention) -> None:
    parts, stop = _projections(attention), 0
    if not _all_plainly(nn.Linear, parts) or len({(part.weight.dtype, part.bias is None) for part in parts}) > 1:
        return
    whole = PackedMatrix(torch.cat([part.weight.detach() for part in parts]))
    for part in parts:
        start, stop = stop, stop + len(part.weight)
        rows = PackedRows(whole, start, stop, part.weight.requires_grad)
        part._parameters["weight"] = None
        _become_packed(part, {"weight": rows})
    _become_packed(attention, {})


def _become_packed(module: nn.Module, packed: dict[str, PackedMatrix | PackedRows | PackedStack]) -> None:
    module.packed = packed
    module.__class__ = _packed_class(type(module))


def _kind(parameter: nn.Parameter | None) -> str:
    if type(parameter) is not nn.Parameter or not parameter.numel():
        return type(parameter).__name__
    return f"{parameter.dtype} on {parameter.device.type}"


@cache
def _packed_class(plain: type[nn.Module]) -> type[Packed]:
    own = (PackedLinear, PackedExperts, PackedAttention, PackedTiedEmbedding)
    return {packed.__bases__[1]: packed for packed in own}.get(plain) or type(
        f"Packed{plain.__name__}", (Packed, plain), {}
    )
