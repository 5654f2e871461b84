"""The decoder-only transformer that the modules make up."""

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coterie.models.cache import KVCache, token_positions
from coterie.models.config import TransformerConfig
from coterie.models.pretrained import load_weights, read_config, save_pretrained
from coterie.modules._init import init_normal
from coterie.modules.attention import Attention
from coterie.modules.attention_cache import AttentionCache, WindowCache
from coterie.modules.embedding import TiedEmbedding
from coterie.modules.gated_mlp import GatedMLP
from coterie.modules.latent_attention import LatentAttention
from coterie.modules.linear_attention import LinearAttention, LinearAttentionCache
from coterie.modules.moe import MoE
from coterie.modules.norm import RMSNorm
from coterie.modules.rotary import RotaryEmbedding
from coterie.modules.router import TopKRouter
from coterie.modules.sparse_attention import SparseAttention
from coterie.ops import Routing, Selection


class TransformerOutput(NamedTuple):
    """What a forward returns.

    Attributes:
        logits: [B, L, vocab] in the model's dtype (autocast's, under autocast).
        routings: one `Routing` a MoE layer, bottom up; losses and telemetry are functions of them.
        selections: one `coterie.ops.Selection` a layer that chooses blocks of keys, bottom up.
    """

    logits: Tensor
    routings: tuple[Routing, ...]
    selections: tuple[Selection, ...] = ()


class TransformerLayer(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)).

    Args:
        config: the model's.
        index: which layer this is, from 0; its place in the config's patterns.
    """

    def __init__(
        self,
        config: TransformerConfig,
        index: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        place = {"device": device, "dtype": dtype}
        self.mixer_norm = _norm(config, **place)
        self.mixer: Attention | LatentAttention | LinearAttention
        if config.layer_mixers[index] == "sparse_attention":
            self.mixer = _sparse_attention(config, config.layer_scorers[index], **place)
        else:
            self.mixer = _MIXERS[config.layer_mixers[index]](config, **place)
        self.feed_forward_norm = _norm(config, **place)
        self.feed_forward: MoE | GatedMLP
        if config.layer_feed_forwards[index] == "moe":
            self.feed_forward = _moe(config, **place)
        else:
            self.feed_forward = GatedMLP(config.dim, config.hidden_dim, activation=config.activation, **place)

    def reset_parameters(self, std: float, output_std: float) -> None:
        """Norms 1, biases 0, weights normal(0, std); normal(0, output_std) where they write to the residual stream.

        Decays and convolutions of linear attention begin as its class says.
        """
        self.mixer_norm.reset_parameters()
        self.mixer.reset_parameters(std, output_std)
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.reset_parameters(std, output_std)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        token_mask: Tensor | None = None,
        cache_layer: AttentionCache | WindowCache | LinearAttentionCache | None = None,
        block_ids: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None, Selection | None]:
        """[B, L, D] → ([B, L, D], the routing of a MoE or None, the blocks that sparse attention chose or None).

        block_ids: of an earlier layer, for sparse attention that does not choose.
        """
        h, where, selection = self.mixer_norm(x), {"token_mask": token_mask, "cache_layer": cache_layer}, None
        if not isinstance(self.mixer, SparseAttention):
            y = self.mixer(h, rotary, **where)
        elif self.mixer.scorer is None:
            y = self.mixer(h, rotary, block_ids=block_ids, **where)
        else:
            y, selection = self.mixer(h, rotary, return_selection=True, **where)
        x = x + _scaled(y, self.residual_scale)
        h, routing = self.feed_forward_norm(x), None
        if isinstance(self.feed_forward, MoE):
            y, routing = self.feed_forward(h, token_mask)
        else:
            y = self.feed_forward(h)
        return x + _scaled(y, self.residual_scale), routing, selection


class Transformer(nn.Module):
    """tokens → embedding → layers → norm → head → logits; every position sees itself and those before it.

    Weights start normal(0, config.init_std), embedding and head included; those that write to the residual stream
    (every mixer's o_proj, every down_proj) start normal(0, init_std / sqrt(2 · num_layers)), so that the stream's
    variance does not grow with depth (GPT-2). Norms start at 1, biases at 0.

    Set `gradient_checkpointing = True` to keep only each layer's input for backward, and compute the layer again
    then: the same gradients, bit for bit, for about a third more time and far less memory.

    Args:
        config: the description.
        device: where to; "meta" builds the shapes alone, without memory.
        dtype: of the parameters.
    """

    gradient_checkpointing: bool = False

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        # Built without memory first, so that the weights are drawn once, by the rule above, and not by every module.
        place = {"device": "meta", "dtype": dtype}
        # Its own constructor would draw, even there.
        embedding = TiedEmbedding if config.tie_embeddings else nn.Embedding
        self.embedding = embedding.from_pretrained(torch.empty(config.vocab_size, config.dim, **place), freeze=False)
        self.layers = nn.ModuleList(TransformerLayer(config, i, **place) for i in range(config.num_layers))
        self.norm = _norm(config, **place)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False, **place)
        head_dim = config.head_dim or config.dim // config.num_heads
        self.rotary = RotaryEmbedding(config.rotary_dim or head_dim, config.rope_theta, config.rotary_scaling)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, from the global random state."""
        std = self.config.init_std
        init_normal(self.embedding.weight, std)
        for layer in self.layers:
            layer.reset_parameters(std, std / (2 * self.config.num_layers) ** 0.5)
        self.norm.reset_parameters()
        if self.head is not None:
            init_normal(self.head.weight, std)

    def forward(
        self,
        input_ids: Tensor,
        *,
        token_mask: Tensor | None = None,
        cache: KVCache | None = None,
        num_logits: int | None = None,
    ) -> TransformerOutput:
        """Logits of the token after each position.

        Args:
            input_ids: [B, L] int64.
            token_mask: [B, L] bool, False = padding, anywhere. The logits of the tokens are those of the sequence
                without its padding: padding is attended by none, routed nowhere and counted in no position.
            cache: what came before; these L positions are appended to it. Call under `torch.no_grad()`.
            num_logits: only the last so many positions' logits, [B, num_logits, vocab]; the head is not computed for
                the others.
        """
        _check_inputs(input_ids, token_mask, cache)
        place = token_positions if cache is None else cache.positions
        rotary = self.rotary(place(input_ids, token_mask))
        x = _scaled(self.embedding(input_ids), self.config.embedding_scale)  # [B, L, D]
        recompute = self.gradient_checkpointing and cache is None and torch.is_grad_enabled()
        routings, selections, block_ids = [], [], None
        for index, layer in enumerate(self.layers):
            own = x, rotary, token_mask, None if cache is None else cache.layers[index], block_ids
            x, routing, selection = checkpoint(layer, *own, use_reentrant=False) if recompute else layer(*own)
            if routing is not None:
                routings.append(routing)
            if selection is not None:
                selections.append(selection)
                block_ids = selection.block_ids
        if cache is not None:
            cache.advance(input_ids, token_mask)
        if num_logits is not None:
            x = x[:, max(x.shape[1] - num_logits, 0) :]
        x = self.norm(x)
        logits = _tied_logits(self.embedding, x) if self.head is None else self.head(x)
        if self.config.logit_divisor != 1:
            logits = logits / self.config.logit_divisor
        return TransformerOutput(logits, tuple(routings), tuple(selections))

    def moe_layers(self) -> list[MoE]:
        """The MoE modules, in the order of `TransformerOutput.routings`."""
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoE)]

    def new_cache(self, batch_size: int, max_length: int | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache on the model's device.

        Args:
            batch_size: B, fixed for its life.
            max_length: positions to make room for; None: config.max_length.
            dtype: of keys and values; None: the weights'. States of linear attention are float32 whatever it is.
        """
        if max_length is None:
            max_length = self.config.max_length
        layers = [layer.mixer.new_cache(batch_size, max_length, dtype=dtype) for layer in self.layers]
        return KVCache(layers, max_length)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write config.json and model.safetensors to the folder `path`; see `coterie.models.pretrained`."""
        save_pretrained(path, self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Transformer":
        """The model that `save_pretrained` wrote to the folder `path`.

        Args:
            path: the folder.
            device: where to; None: the CPU.
            dtype: of the parameters; None: the file's.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: a file in it is missing, cut short, changed, pickled, or of another model; the message says
                which and how. Nothing in the files is executed.
        """
        model = cls(read_config(path), device="meta")
        load_weights(path, model, device=device, dtype=dtype)
        return model


def _norm(config: TransformerConfig, **place) -> RMSNorm:
    return RMSNorm(config.dim, config.norm_eps, zero_centered=config.norm_zero_centered, **place)


def _attention(config: TransformerConfig, **place) -> Attention:
    return Attention(config.dim, config.num_heads, **_attention_settings(config), **place)


def _window_attention(config: TransformerConfig, **place) -> Attention:
    settings = _attention_settings(config)
    return Attention(config.dim, config.num_heads, window=config.attention_window, **settings, **place)


def _sparse_attention(config: TransformerConfig, scorer: str | None, **place) -> SparseAttention:
    return SparseAttention(
        config.dim,
        config.num_heads,
        scorer=scorer,
        window=config.sparse_window,
        sinks=config.sparse_sinks,
        block_size=config.sparse_block_size,
        num_blocks=config.sparse_num_blocks,
        compression=config.sparse_compression if scorer == "nsa" else "mean",
        **_attention_settings(config),
        **place,
    )


def _attention_settings(config: TransformerConfig) -> dict[str, Any]:
    return {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "qk_norm": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "output_bias": config.output_bias,
        "output_gate": config.attention_output_gate,
        "sink_logits": config.attention_sink_logits,
        "scale": config.attention_scale,
        "rotary_interleaved": config.rotary_interleaved,
        "norm_eps": config.norm_eps,
        "norm_zero_centered": config.norm_zero_centered,
    }


def _latent_attention(config: TransformerConfig, **place) -> LatentAttention:
    return LatentAttention(
        config.dim,
        config.num_heads,
        head_dim=config.head_dim or config.dim // config.num_heads,
        rotary_dim=config.rotary_dim,
        kv_rank=config.kv_rank,
        query_rank=config.query_rank,
        value_dim=config.value_dim,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        scale=config.attention_scale,
        rotary_interleaved=config.rotary_interleaved,
        **place,
    )


def _linear_attention(config: TransformerConfig, **place) -> LinearAttention:
    return LinearAttention(
        config.dim,
        config.linear_num_heads or config.num_heads,
        head_dim=config.linear_head_dim or config.head_dim or config.dim // config.num_heads,
        value_dim=config.linear_value_dim,
        num_key_heads=config.linear_num_key_heads,
        rule=config.linear_rule,
        short_conv=config.linear_conv,
        allow_negative_eigenvalues=config.linear_negative_eigenvalues,
        num_edits=config.linear_num_edits,
        norm_eps=config.norm_eps,
        **place,
    )


_MIXERS = {
    "attention": _attention,
    "window_attention": _window_attention,
    "latent_attention": _latent_attention,
    "linear_attention": _linear_attention,
}


def _moe(config: TransformerConfig, **place) -> MoE:
    router = TopKRouter(
        config.dim,
        config.num_experts,
        config.top_k,
        score=config.router_score,
        order=config.router_order,
        normalize=config.router_normalize,
        scale=config.router_scale,
        num_groups=config.router_groups,
        top_groups=config.router_top_groups,
        group_score=config.router_group_score,
        selection_bias=config.selection_bias,
        **place,
    )
    return MoE(
        config.dim,
        config.expert_hidden_dim,
        config.num_experts,
        config.top_k,
        activation=config.activation,
        shared_hidden_dim=config.shared_hidden_dim,
        shared_gate=config.shared_gate,
        router=router,
        recompute=config.recompute,
        **place,
    )


def _tied_logits(embedding: nn.Module, x: Tensor) -> Tensor:
    if isinstance(embedding, TiedEmbedding):
        return embedding.logits(x)
    return F.linear(x, embedding.weight)  # put in its place by someone: an adapter


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _check_inputs(input_ids: Tensor, token_mask: Tensor | None, cache: KVCache | None) -> None:
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be integers of shape [B, L], got {input_ids.dtype} {tuple(input_ids.shape)}")
    if token_mask is not None and (token_mask.shape != input_ids.shape or token_mask.dtype != torch.bool):
        raise ValueError(
            f"token_mask must be bool of input_ids' shape {tuple(input_ids.shape)}, got {token_mask.dtype} "
            f"{tuple(token_mask.shape)}"
        )
    if cache is not None and cache.length + input_ids.shape[1] > cache.max_length:
        raise ValueError(
            f"the cache is full: it holds {cache.length} of at most {cache.max_length} positions, and "
            f"{input_ids.shape[1]} more came; make it with a larger max_length"
        )
