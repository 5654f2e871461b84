"""What a model costs before it is trained: parameters, FLOPs, bytes read and bytes kept, layer by layer.

Everything is counted, nothing is guessed or timed: the model is built without storage (fake tensors), so a model of
any size takes a second or two and no memory. `model_cost` gives the numbers, `format_cost` the table of
`coterie inspect`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from coterie.models import Transformer, TransformerConfig
from coterie.models.config import MIXERS
from coterie.modules.attention import Attention
from coterie.modules.latent_attention import LatentAttention
from coterie.modules.linear_attention import LinearAttention
from coterie.modules.moe import MoE
from coterie.modules.router import TopKRouter
from coterie.modules.sparse_attention import SparseAttention
from coterie.report.table import format_table, human_bytes, human_count

_CACHE_LENGTHS = (1024, 4096, 65536, 262144)  # at which `format_cost` says what a cache takes


@dataclass(frozen=True)
class LayerCost:
    """One row of the table: a mixer or a feed-forward with its norm, the embedding, or the head with the last norm.

    Attributes:
        name: "embedding", "layers.3.mixer", "layers.3.feed_forward", "head", or "total".
        kind: what stands there: "attention", "latent_attention", "moe", "mlp", "embedding", "head", ...
        params: parameters. A tied head has none of its own but the norm's.
        active_params: those that act on a token: all but the experts it is not routed to.
        flops: per token, 2 · multiply-adds of the forward pass's matrix products, as the mean over a causal sequence
            of the given length: a token attends to (L + 1) / 2 on average, fewer in a window, and linear attention
            edits and reads its state once, as it does token by token; sparse attention scores the blocks behind a
            token and sees its window and the chosen ones, as far as there are so many. Norms, softmax, activations and
            the embedding's lookup are not counted.
        weight_bytes: read per token when one sequence is decoded; of the embedding one row, of a tied head all of it.
        cache_bytes: that one more token adds to the cache; of what stands for a block, its token's share.
        state_bytes: that a sequence takes in the cache whatever its length: linear attention's state and the tokens its
            convolution has still to see, and a window's keys and values.
        saved_bytes: kept for backward per token of the training forward, without the loss; parameters, and buffers
            of the model, are not counted, and what several operations share is counted once, where it is first kept.
    """

    name: str
    kind: str
    params: int
    active_params: int
    flops: float
    weight_bytes: int
    cache_bytes: float
    state_bytes: int
    saved_bytes: float


@dataclass(frozen=True)
class BreakEven:
    """How an MoE layer compares with dense MLPs of the same activation.

    Attributes:
        equal_flops_hidden_dim: hidden width of the dense MLP that spends as many FLOPs per token (router aside).
        equal_params_hidden_dim: hidden width of the dense MLP with as many parameters (router aside).
        throughput: from this share of a dense MLP's FLOP/s on, the MoE layer is faster than the dense MLP with as
            many parameters: active / total feed-forward FLOPs, the router's included in the former.
    """

    equal_flops_hidden_dim: int
    equal_params_hidden_dim: int
    throughput: float


@dataclass(frozen=True)
class ModelCost:
    """Costs per layer, in order, at one sequence length.

    Attributes:
        layers: embedding, then mixer and feed-forward of every layer, then head.
        length: tokens per sequence, L.
        dtype: of parameters, cache and activations, as "float32".
        break_even: of the model's MoE layers, or None if there are none.
        full_attention_cache_bytes: what one more token would add to the cache if every mixer but latent attention were
            full attention.
    """

    layers: tuple[LayerCost, ...]
    length: int
    dtype: str
    break_even: BreakEven | None
    full_attention_cache_bytes: int

    @property
    def total(self) -> LayerCost:
        """The sum over all layers."""
        numbers = [field.name for field in fields(LayerCost)][2:]
        return LayerCost("total", "", *(sum(getattr(layer, name) for layer in self.layers) for name in numbers))

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-able values, the total included."""
        return {
            "length": self.length,
            "dtype": self.dtype,
            "layers": [asdict(layer) for layer in self.layers],
            "total": asdict(self.total),
            "break_even": asdict(self.break_even) if self.break_even else None,
            "full_attention_cache_bytes": self.full_attention_cache_bytes,
        }


def model_cost(
    config: TransformerConfig, length: int | None = None, *, dtype: torch.dtype = torch.float32
) -> ModelCost:
    """Counts what a model of this configuration costs per token.

    Args:
        config: of the model.
        length: tokens per sequence, L; `config.max_length` if None.
        dtype: of parameters and activations.

    Raises:
        ValueError: `length` is less than 1.
    """
    length = config.max_length if length is None else length
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    # Fake tensors rather than the meta device: they take the code path of the device they stand for, so that what is
    # kept for backward is what a CPU would keep (on meta, attention falls back to the one that keeps L × L scores).
    model = Transformer(config, device="meta", dtype=dtype)
    with FakeTensorMode():
        _fake_cpu(model)
        parts = _parts(model)
        with saved_for_backward(model, {name: modules for name, _, modules in parts}) as saved:
            output = model(torch.zeros(1, length, dtype=torch.int64))
        del output
        layers, seen = [], set()
        for name, kind, modules in parts:
            own = [p for module in modules for p in module.parameters() if id(p) not in seen and not seen.add(id(p))]
            params = sum(p.numel() for p in own)
            active = params - sum(_idle_params(module) for module in modules)
            size = dtype.itemsize
            flops = sum(_flops(module, length) for module in modules)
            read = active
            if kind == "embedding":
                read = config.dim
            elif kind == "head" and config.tie_embeddings:
                read += config.vocab_size * config.dim
                flops += 2 * config.vocab_size * config.dim
            cache = sum(_cache_bytes(module, size) for module in modules)
            state = sum(_state_bytes(module) for module in modules)
            costs = params, active, flops, size * read, cache, state, saved[name] / length
            layers.append(LayerCost(name, kind, *costs))
        return ModelCost(
            tuple(layers),
            length,
            str(dtype).removeprefix("torch."),
            _break_even(model),
            sum(
                layer.cache_bytes if layer.kind == "latent_attention" else size * _attention_cache_elements(config)
                for layer in layers
                if layer.kind in MIXERS
            ),
        )


@contextmanager
def saved_for_backward(model: nn.Module, parts: Mapping[str, list[nn.Module]]) -> Iterator[dict[str, int]]:
    """Counts the bytes that forward passes inside the context keep for backward, by part of the model.

    Args:
        model: whose parameters and buffers are not counted.
        parts: named groups of its submodules, in the order in which they run. What is kept between two of them
            belongs to the former, before the first to the first.

    Yields:
        Bytes per part, filled while the passes run: every storage once, with the part that keeps it first.
    """
    names = list(parts)
    saved = dict.fromkeys(names, 0)
    # Storages are held, so that none is freed and its address counted as known when another one takes it.
    known: dict[int, torch.UntypedStorage] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        known[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
    current = names[0]

    def enter(name: str):
        def hook(*_):
            nonlocal current
            current = name

        return hook

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = storage
            saved[current] += storage.nbytes()
        return tensor

    hooks = [module.register_forward_pre_hook(enter(name)) for name in names for module in parts[name]]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        for hook in hooks:
            hook.remove()


def format_cost(cost: ModelCost) -> str:
    """The table of `coterie inspect`: equal layers in one row, then what the MoE layers break even with."""
    columns = ["params", "active_params", "flops", "weight_bytes", "cache_bytes", "state_bytes"]
    titles = ["params", "active", "FLOPs", "weights read", "cache", "state"]
    if not cost.total.state_bytes:
        del columns[-1], titles[-1]
    groups: dict[tuple, list[LayerCost]] = {}
    for layer in cost.layers:
        # Not by saved bytes: what all layers share, the rotary's table, is counted where it is kept first.
        groups.setdefault((layer.kind, *(getattr(layer, name) for name in columns)), []).append(layer)
    rows = []
    for (kind, *numbers), group in groups.items():
        saved = sum(layer.saved_bytes for layer in group) / len(group)
        rows.append([f"{kind} × {len(group)}" if len(group) > 1 else kind, *_cells(*numbers, saved)])
    total = cost.total
    rows.append(["all layers", *_cells(*(getattr(total, name) for name in columns), total.saved_bytes)])
    text = format_table(["one layer", *titles, "saved"], rows, rules=[len(rows) - 1])
    text += (
        f"\n\nFLOPs, bytes read and cached (one sequence decoded) and bytes saved for backward are per token,"
        f"\nat length {cost.length} in {cost.dtype}."
    )
    if total.state_bytes:
        text += "\nA state is kept per sequence, whatever its length."
    if (total.state_bytes, total.cache_bytes) != (0, cost.full_attention_cache_bytes):
        text += " So a sequence's cache is\n\n" + _format_cache(cost)
    if cost.break_even is not None:
        even = cost.break_even
        text += (
            f"\n\nAn MoE layer spends the FLOPs of a dense MLP of hidden width {even.equal_flops_hidden_dim},"
            f"\nand holds the parameters of one of width {even.equal_params_hidden_dim}. It is faster than the latter"
            f"\nwherever it runs at more than {100 * even.throughput:.1f} % of a dense MLP's FLOP/s."
        )
    return text


def _fake_cpu(model: nn.Module) -> None:
    """Puts fake CPU tensors in the place of the parameters and buffers; `Module.to_empty` cannot make fake ones."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    if id(tensor) not in fakes:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        fakes[id(tensor)] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
                    own[name] = fakes[id(tensor)]


def _cells(params, active_params, flops, *sizes) -> list[str]:
    return [human_count(number) for number in (params, active_params, flops)] + [human_bytes(size) for size in sizes]


def _format_cache(cost: ModelCost) -> str:
    """Bytes of a sequence's cache at several lengths, beside those of full attention in every layer."""
    rows = []
    for length in _CACHE_LENGTHS:
        own = cost.total.cache_bytes * length + cost.total.state_bytes
        full = cost.full_attention_cache_bytes * length
        rows.append([f"{length:,}", human_bytes(own), human_bytes(full), f"{own / full:.2f} ×"])
    return format_table(["at length", "this model", "full attention", "this : full"], rows)


def _parts(model: Transformer) -> list[tuple[str, str, list[nn.Module]]]:
    """(name, kind, modules) of every row, in the order in which they run."""
    config = model.config
    parts = [("embedding", "embedding", [model.embedding])]
    for index, layer in enumerate(model.layers):
        mixer, feed_forward = config.layer_mixers[index], config.layer_feed_forwards[index]
        parts.append((f"layers.{index}.mixer", mixer, [layer.mixer_norm, layer.mixer]))
        parts.append((f"layers.{index}.feed_forward", feed_forward, [layer.feed_forward_norm, layer.feed_forward]))
    head = [model.norm] if model.head is None else [model.norm, model.head]
    return [*parts, ("head", "head", head)]


def _moe_layers(module: nn.Module) -> list[MoE]:
    return [part for part in module.modules() if isinstance(part, MoE)]


def _num_experts(moe: MoE) -> int:
    return moe.experts.gate_up_proj.shape[0]


def _idle_params(module: nn.Module) -> int:
    """Parameters of the experts that a token is not routed to."""
    idle = 0
    for moe in _moe_layers(module):
        num_experts = _num_experts(moe)
        each = sum(p.numel() for p in moe.experts.parameters()) // num_experts
        idle += each * (num_experts - moe.router.top_k)
    return idle


def _matrix_elements(moe: MoE) -> int:
    """Elements of one expert's matrices."""
    return (moe.experts.gate_up_proj.numel() + moe.experts.down_proj.numel()) // _num_experts(moe)


def _flops(module: nn.Module, length: int) -> float:
    """2 · multiply-adds per token, from the parts that multiply: a new mixer's projections count by themselves."""
    flops = 0.0
    for part in module.modules():
        if isinstance(part, nn.Linear | TopKRouter):
            flops += 2 * part.weight.numel()
        elif isinstance(part, MoE):
            flops += 2 * part.router.top_k * _matrix_elements(part)
        elif isinstance(part, SparseAttention):
            flops += _sparse_flops(part, length)
        elif isinstance(part, Attention):
            # Scores and their use, each H · P per key; in the mean over a causal sequence it sees so many.
            flops += 2 * 2 * part.num_heads * part.head_dim * _mean_keys(part.window or length, length)
        elif isinstance(part, LinearAttention):
            flops += 2 * part.num_heads * part.head_dim * part.value_dim * (1 + part.num_edits)  # read, and written
            if part.beta_proj is not None:
                flops += 2 * part.num_heads * part.head_dim * part.value_dim * part.num_edits  # what stood there
            if part.conv_weight is not None:
                flops += 2 * part.conv_weight.numel()
        elif isinstance(part, LatentAttention):
            flops += 2 * part.num_heads * (part.head_dim + part.value_dim) * (length + 1) / 2
    return flops


def _mean_keys(most: int, length: int) -> float:
    """Keys that a position sees of the last `most`, in the mean over a causal sequence."""
    most = min(most, length)
    return (most * (most + 1) / 2 + (length - most) * most) / length


def _sparse_flops(part: SparseAttention, length: int) -> float:
    """Of the keys that are attended to, and of the scores of blocks."""
    per_key, blocks = 2 * 2 * part.num_heads * part.head_dim, (length + 1) / 2 / part.block_size
    chosen = part.num_blocks * part.block_size
    if part.scorer == "nsa":
        return per_key * (_mean_keys(part.window, length) + _mean_keys(chosen, length) + blocks)
    if part.scorer == "window":
        return per_key * _mean_keys(part.window + part.sinks, length)
    flops = per_key * _mean_keys(part.window + part.sinks + chosen, length)
    if part.scorer == "moba":
        flops += 2 * part.num_kv_heads * part.head_dim * blocks
    elif part.scorer == "indexer":
        flops += 2 * part.indexer.num_heads * (part.indexer.head_dim + 1) * blocks
    return flops


def _cache_bytes(module: nn.Module, size: int) -> float:
    """What one token adds to the cache: a key and a value per kv head, or a latent and a rotary key."""
    if isinstance(module, LatentAttention):
        return size * (module.kv_rank + module.rotary_dim)
    if not isinstance(module, Attention) or _has_window_cache(module):
        return 0
    keys = size * 2 * module.num_kv_heads * module.head_dim
    if isinstance(module, SparseAttention):
        block = module.new_cache(1, module.block_size).blocks
        return keys + sum(t.nbytes for t in block) / module.block_size
    return keys


def _has_window_cache(module: Attention) -> bool:
    return module.scorer == "window" if isinstance(module, SparseAttention) else module.window is not None


def _state_bytes(module: nn.Module) -> int:
    """Bytes of the cache of a mixer whose cache does not grow with the length, once that is long."""
    if isinstance(module, LinearAttention):
        return module.new_cache(1).nbytes
    if not isinstance(module, Attention) or not _has_window_cache(module):
        return 0
    return module.new_cache(1, module.window + getattr(module, "sinks", 0)).nbytes


def _attention_cache_elements(config: TransformerConfig) -> int:
    """The same for a layer of attention, were there one."""
    return 2 * (config.num_kv_heads or config.num_heads) * (config.head_dim or config.dim // config.num_heads)


def _break_even(model: Transformer) -> BreakEven | None:
    layers = _moe_layers(model)
    if not layers:
        return None
    moe, config = layers[0], model.config
    active = config.top_k * config.expert_hidden_dim + config.shared_hidden_dim
    total = config.num_experts * config.expert_hidden_dim + config.shared_hidden_dim
    dense = 2 * _matrix_elements(moe) * total / config.expert_hidden_dim
    return BreakEven(active, total, _flops(moe, 1) / dense)
