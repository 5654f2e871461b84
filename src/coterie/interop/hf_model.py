"""coterie's Transformer as a model of transformers: `generate`, `Trainer`, PEFT and what else takes one take it.

    coterie.interop.register_hf()
    model = AutoModelForCausalLM.from_pretrained(folder)  # that either library's save_pretrained wrote
    model = CoterieForCausalLM(CoterieConfig(**coterie.preset("tiny").to_dict()))

The model inside is the plain one, in `.model`; here is only what the two libraries call differently. This file imports
transformers and is itself imported when one of its names is asked for.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field, fields, make_dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.generic import can_return_tuple

from coterie.models.cache import token_positions
from coterie.models.config import TransformerConfig
from coterie.models.transformer import Transformer, TransformerLayer
from coterie.modules.experts import Experts
from coterie.modules.router import TopKRouter
from coterie.modules.sparse_attention import SparseAttention
from coterie.ops import balance_loss, indexer_loss
from coterie.report.model_card import CARD_FILE, write_model_card

MODEL_TYPE = "coterie"
_NOT_BACK = "what stands for blocks of keys cannot be taken back in caches of transformers"
_FIELDS = tuple(one.name for one in fields(TransformerConfig))
# `TransformerConfig`'s fields as transformers declares its own; required ones stay required.
_Fields = make_dataclass(
    "_Fields",
    [(one.name, one.type, field(default=one.default)) for one in fields(TransformerConfig)],
    bases=(PreTrainedConfig,),
    init=False,  # PreTrainedConfig makes it
    repr=False,
    eq=False,
    kw_only=True,
)


def register_hf_model() -> None:
    """Make "coterie" a model type of transformers' AutoConfig and AutoModelForCausalLM."""
    AutoConfig.register(MODEL_TYPE, CoterieConfig, exist_ok=True)
    AutoModelForCausalLM.register(CoterieConfig, CoterieForCausalLM, exist_ok=True)


class CoterieConfig(_Fields):
    """The fields of `TransformerConfig`, under their names there, and what transformers adds.

    Attributes:
        use_cache: keep keys and values where no gradients are asked for.
        router_aux_loss_coef: how much of `coterie.balance_loss` is added to the loss in training.
        output_router_logits: return the routers' logits.

    Raises:
        TypeError, ValueError: as `TransformerConfig` does.
    """

    model_type = MODEL_TYPE
    # Of transformers' Trainer, when it gathers predictions.
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss"]  # noqa: RUF012 (as transformers has it)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "hidden_dim",
        "moe_intermediate_size": "expert_hidden_dim",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "top_k",
        "hidden_act": "activation",
        "rms_norm_eps": "norm_eps",
        "initializer_range": "init_std",
        "max_position_embeddings": "max_length",
        "tie_word_embeddings": "tie_embeddings",
    }

    use_cache: bool = True
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs) -> None:
        for name, value in vars(self.to_transformer()).items():  # checked, JSON's lists made tuples
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """What the layers keep, in transformers' terms: its caches are made accordingly."""
        mixers = self.to_transformer().layer_mixers
        return ["linear_attention" if mixer == "linear_attention" else "full_attention" for mixer in mixers]

    def to_transformer(self) -> TransformerConfig:
        """The model's own config."""
        return TransformerConfig(**{name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def from_transformer(cls, config: TransformerConfig, **kwargs) -> "CoterieConfig":
        """The same model's config for transformers; `kwargs` are the fields it adds."""
        return cls(**config.to_dict(), **kwargs)


class _GenerationConfig(GenerationConfig):
    """Read from a model's config without what means something else there: top_k and max_length."""

    @classmethod
    def from_model_config(cls, model_config: CoterieConfig) -> GenerationConfig:
        others = {name: value for name, value in model_config.to_dict().items() if name not in _FIELDS}
        config = GenerationConfig.from_model_config(others)
        config._from_model_config = False  # a file with it is one that was written for generation
        return config


class CoterieForCausalLM(PreTrainedModel, GenerationMixin):
    """`coterie.Transformer` as a causal language model of transformers.

    Mixers and experts are coterie's: transformers' attention and experts implementations are not consulted. Its
    caches are: they keep all keys, those that are out of a "window_attention"'s window too. Weights start as
    `Transformer` draws them. A router's selection bias is used, loaded and saved, but only a call of
    `TopKRouter.update_selection_bias` moves it: transformers' Trainer balances by config.router_aux_loss_coef.

    Attributes:
        model: the `Transformer`; its state dict is this one's without "model.".
    """

    config: CoterieConfig
    config_class = CoterieConfig
    generation_config_class = _GenerationConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerLayer"]  # noqa: RUF012 (as transformers has it)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: CoterieConfig) -> None:
        super().__init__(config)
        self.model = Transformer(config.to_transformer())
        if self.model.embedding.weight.device.type != "meta":
            for tensor in (*self.parameters(), *self.buffers()):
                tensor._is_hf_initialized = True  # drawn: not to be drawn again
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of the token after each position, and the loss where there are labels.

        Args:
            input_ids: [B, L].
            attention_mask: [B, past + L], 0 = padding, anywhere; positions are counted over tokens alone.
            past_key_values: a cache of transformers that grows, a `DynamicCache`: these L positions are appended.
            labels: [B, L], as input_ids (they are shifted here); -100 is not predicted.
            use_cache: None: config.use_cache, unless gradients are asked for.
            output_hidden_states: return what every layer is given, and the last norm's output.
            logits_to_keep: only the last so many positions' logits, or those at these indices; 0: all.
            num_items_in_batch: labels that are predicted in all micro-batches together: the loss is this one's part
                of their mean, and so is the router's loss and an indexer's. None: the mean of these.

        Returns:
            loss: of the labels; in training plus config.router_aux_loss_coef · aux_loss, and what indexers learn from.
            aux_loss: `coterie.balance_loss` of this batch, where the coefficient is not 0.

        Raises:
            ValueError: something that is not supported is given, or of the wrong shape.
            TypeError: an argument is unknown.
        """
        _refuse(inputs_embeds=inputs_embeds, output_attentions=output_attentions or None, **kwargs)
        if input_ids is None:
            raise ValueError("input_ids must be given, [B, L], got None")
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError("labels need the logits of all positions: logits_to_keep must be 0")
        counts = "full_attention" in self.config.layer_types
        if not counts and (use_cache or past_key_values is not None):
            raise ValueError(
                "use_cache must be False where all mixers are 'linear_attention': transformers counts positions by keys"
            )
        if use_cache is None:
            use_cache = counts and self.config.use_cache and not torch.is_grad_enabled()
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        cache, token_mask = None, _token_mask(attention_mask, input_ids, past_key_values)
        if past_key_values is not None:
            cache = _HFCache(past_key_values, token_mask, self.model.layers)
        if token_mask is not None:
            token_mask = token_mask[:, -input_ids.shape[1] :]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits

        last = logits_to_keep if isinstance(logits_to_keep, int) and not output_hidden_states else 0
        with _hidden_states(self.model, output_hidden_states) as hidden_states:
            output = self.model(input_ids, token_mask=token_mask, cache=cache, num_logits=last or None)
        logits, routings = output.logits, output.routings
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        elif logits_to_keep and not last:
            logits = logits[:, -logits_to_keep:]

        loss = aux_loss = None
        if self.config.router_aux_loss_coef and routings:
            aux_loss = balance_loss(routings)
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
            if self.training:
                share = 1.0
                if num_items_in_batch is not None:
                    share = (labels[:, 1:] != -100).sum() / num_items_in_batch
                if aux_loss is not None:
                    loss = loss + self.config.router_aux_loss_coef * share * aux_loss
                for selection in output.selections:
                    if selection.scores is not None:
                        loss = loss + share * indexer_loss(selection, token_mask)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            router_logits=tuple(routing.logits for routing in routings) if output_router_logits else None,
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is tied, for then it is the input embedding and no module of its own."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As transformers does; the model's own config follows."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.to_transformer()
        return embedding

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Keep each layer's input only, and compute the layer again in backward; see `Transformer`.

        Raises:
            ValueError: reentrant checkpointing, or a setting besides, is asked for.
        """
        only = {"use_reentrant": False, "every_n_layers": 1, "offload": False}
        for name, value in {**(gradient_checkpointing_kwargs or {}), **kwargs}.items():
            if name not in only or value != only[name]:
                raise ValueError(f"gradient checkpointing is every layer's, with {only}, got {name}={value!r}")
        self.model.gradient_checkpointing = True

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        """As transformers does, and a README.md that says what the model is, unless there is one of yours."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self._write_card(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs) -> str:
        """On the way to the Hub, where transformers puts an empty form if the repository has no card yet."""
        card = Path(working_dir) / CARD_FILE
        if card.exists() and "This model card has been automatically generated" in card.read_text(encoding="utf-8"):
            card.unlink()
        self._write_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _write_card(self, folder: str | os.PathLike) -> None:
        if not self._hf_peft_config_loaded:  # or the folder is an adapter's
            write_model_card(folder, self.model.config, dtype=self.dtype)

    def _assisted_decoding(self, *args, **kwargs) -> object:
        """As transformers does; refused where guesses could not be taken back from the cache."""
        if any(map(_keeps_blocks, self.model.layers)):
            raise ValueError(f"guesses cannot be taken back of a model with 'sparse_attention': {_NOT_BACK}")
        return super()._assisted_decoding(*args, **kwargs)

    def adjust_generation_fn(self, generation_config, from_auto_class, from_pipeline, path, **kwargs) -> None:
        """As transformers does, but a config.json is not read for the generation_config.json that is not there."""
        own = self.generation_config
        if generation_config is None and os.path.isdir(path) and GENERATION_CONFIG_NAME not in os.listdir(path):
            return
        super().adjust_generation_fn(generation_config, from_auto_class, from_pipeline, path, **kwargs)
        if self.generation_config._from_model_config:
            self.generation_config = own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What a checkpoint lacks; transformers keeps this from what has been drawn or loaded."""
        if isinstance(module, Experts | TopKRouter):
            module.reset_parameters(self.config.init_std)
        else:
            super()._init_weights(module)


class _HFCache:
    """A cache of transformers, spoken to as a `KVCache`.

    It holds nothing and lives for one forward: what reorders, crops or repeats the other needs to know nothing of it.

    Args:
        cache: theirs.
        token_mask: [B, past + L] bool, or None: no padding.
        layers: of the model.
    """

    max_length = math.inf

    def __init__(self, cache: Cache, token_mask: Tensor | None, layers: Sequence[TransformerLayer]) -> None:
        self.length = cache.get_seq_length()
        self._seen = self.length if token_mask is None else token_mask[:, : self.length].sum(-1)
        self.layers = [
            _HFBlockCacheLayer(cache, index, token_mask, layer.mixer, self._seen)
            if _keeps_blocks(layer)
            else _HFCacheLayer(cache, index, token_mask)
            for index, layer in enumerate(layers)
        ]

    def positions(self, input_ids: Tensor, token_mask: Tensor | None) -> Tensor:
        return token_positions(input_ids, token_mask, self._seen)

    def advance(self, input_ids: Tensor, token_mask: Tensor | None) -> None:
        """Theirs has counted."""


class _HFCacheLayer:
    """One layer of it, spoken to as an `AttentionCache` or a `LinearAttentionCache`."""

    def __init__(self, cache: Cache, index: int, token_mask: Tensor | None) -> None:
        self._cache, self._index, self._token_mask = cache, index, token_mask

    def append(
        self, keys: Tensor, values: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values = self._cache.update(keys, values, self._index)
        return keys, values, self._token_mask

    def read(self, batch_size: int) -> tuple[Tensor | None, Tensor | None]:
        tail = self._cache.get_conv_state(self._index)  # [B, channels, W-1]
        return self._cache.get_recurrent_state(self._index), None if tail is None else tail.mT

    def write(self, state: Tensor, tail: Tensor | None) -> None:
        if state.requires_grad:
            raise ValueError("a cache of linear attention carries no gradients: call under torch.no_grad()")
        tail = state.new_zeros(len(state), 0, 0) if tail is None else tail  # theirs has one, whatever ours has
        self._cache.update_conv_state(tail.mT, self._index)
        self._cache.update_recurrent_state(state, self._index)


def _keeps_blocks(layer: TransformerLayer) -> bool:
    return isinstance(layer.mixer, SparseAttention) and bool(layer.mixer.block_shapes)


class _HFBlockCacheLayer(_HFCacheLayer):
    """One layer of it, spoken to as a `BlockCache`. seen: tokens that came before, a number or [B]."""

    def __init__(
        self, cache: Cache, index: int, token_mask: Tensor | None, mixer: SparseAttention, seen: int | Tensor
    ) -> None:
        super().__init__(cache, index, token_mask)
        self._shapes, self._block_size, self._seen = mixer.block_shapes, mixer.block_size, seen
        while len(cache.layers) <= index:  # one that was made without a config
            cache.layers.append(cache.layer_class_to_replicate())
        own = cache.layers[index]
        if not isinstance(own, _BlockLayer):
            if type(own) is not DynamicLayer:
                raise ValueError(f"past_key_values' layer {index} must be a DynamicLayer, got {type(own).__name__}")
            if own.get_seq_length():
                raise ValueError(f"past_key_values' layer {index} has keys and no blocks: it is not of this model")
            cache.layers[index] = _BlockLayer()

    def positions(self, added: int, token_mask: Tensor | None) -> int | Tensor:
        return self._seen if token_mask is None else token_positions(token_mask, token_mask, self._seen)

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        layer = self._cache.layers[self._index]
        return layer.make_room(-(-layer.get_seq_length() // self._block_size), self._shapes)


class _BlockLayer(DynamicLayer):
    """Keys and values, as in transformers, and what stands for blocks of them."""

    is_croppable = False
    blocks: tuple[Tensor, ...] = ()

    def make_room(self, count: int, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """For so many blocks: [B, at least `count`, heads, width] each; the new ones are 0."""
        if not self.blocks:
            wide = torch.promote_types(self.keys.dtype, torch.float32)
            self.blocks = tuple(self.keys.new_zeros(len(self.keys), 0, *shape, dtype=wide) for shape in shapes)
        room = self.blocks[0].shape[1]
        if room < count:  # half as much again, so that growing costs nothing in the long run
            self.blocks = tuple(F.pad(t, (0, 0, 0, 0, 0, count + count // 2 - room)) for t in self.blocks)
        if self.blocks[0].is_inference() and not torch.is_inference_mode_enabled():
            self.blocks = tuple(t.clone() for t in self.blocks)  # to be written to
        return self.blocks

    def offload(self) -> None:
        super().offload()
        self.blocks = tuple(t.to("cpu", non_blocking=True) for t in self.blocks)

    def prefetch(self) -> None:
        super().prefetch()
        self.blocks = tuple(t.to(self.device, non_blocking=True) for t in self.blocks)

    def reset(self) -> None:
        super().reset()
        self.blocks = ()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.blocks = tuple(t.index_select(0, beam_idx.to(t.device)) for t in self.blocks)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.blocks = tuple(t.repeat_interleave(repeats, 0) for t in self.blocks)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.blocks = tuple(t[indices] for t in self.blocks)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(_NOT_BACK)
        super().crop(tokens_to_remove)


def _token_mask(attention_mask: Tensor | None, input_ids: Tensor, cache: Cache | None) -> Tensor | None:
    """[B, past + L] bool; None where nothing is padding, which is faster. Refuses caches that do not grow."""
    if cache is not None and cache.is_compileable:
        raise ValueError(f"past_key_values must be a cache that grows, a DynamicCache, got {type(cache).__name__}")
    if attention_mask is None:
        return None
    past = 0 if cache is None else cache.get_seq_length()
    wanted = (input_ids.shape[0], past + input_ids.shape[1])
    if attention_mask.shape != wanted:
        raise ValueError(f"attention_mask must be [B, past + L] = {wanted}, got {tuple(attention_mask.shape)}")
    token_mask = attention_mask.bool()
    return None if not torch.compiler.is_compiling() and token_mask.all() else token_mask


def _refuse(**given: object) -> None:
    """What other models take and this one cannot."""
    reasons = {
        "inputs_embeds": "a coterie model takes input_ids [B, L]",
        "output_attentions": "attention weights are never formed",
        "position_ids": "positions are counted over the attention_mask; several texts in one row are not kept apart",
    }
    for name, value in given.items():
        if value is None or name == "token_type_ids":  # which tokenizers send to every model
            continue
        if name in reasons:
            raise ValueError(f"{name} is not supported: {reasons[name]}")
        raise TypeError(f"CoterieForCausalLM.forward has no argument {name!r}")


@contextmanager
def _hidden_states(model: Transformer, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects every layer's input and the last norm's output, as transformers counts hidden states."""
    states: list[Tensor] = []
    hooks = []
    if wanted:
        hooks = [layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for layer in model.layers]
        hooks.append(model.norm.register_forward_hook(lambda _, inputs, output: states.append(output)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
