"""The description of a model: a frozen dataclass that checks itself and travels as JSON."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from coterie.modules.attention import QK_NORMS
from coterie.modules.linear_attention import RULES
from coterie.modules.rotary import parse_rotary_scaling
from coterie.modules.sparse_attention import COMPRESSIONS, SCORERS
from coterie.ops import activation_is_gated

MIXERS = ("attention", "window_attention", "sparse_attention", "latent_attention", "linear_attention")
_ATTENTION = ("attention", "window_attention", "sparse_attention")  # with the same projections
FEED_FORWARDS = ("mlp", "moe")


@dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer, pre-norm: x + mixer(norm(x)), then x + feed_forward(norm(x)), in every layer.

    Attributes:
        vocab_size: tokens.
        dim: D, the width of the residual stream.
        num_layers: layers, each a mixer and a feed-forward.
        num_heads: H, query heads.
        num_kv_heads: G, key/value heads, which divides H; None: H.
        head_dim: P, even; None: D / H.
        mixers: what mixes positions in each layer: "attention", "window_attention" (over the last few positions),
            "sparse_attention" (over those and blocks chosen for each), "latent_attention" (deepseek_v3) or
            "linear_attention". A pattern: repeated up the layers, so its length
            must divide num_layers; ("linear_attention",) * 3 + ("attention",) makes a hybrid.
        feed_forwards: the feed-forward of each layer, "mlp" or "moe"; a pattern too: ("mlp", "moe") alternates.
        hidden_dim: width of every "mlp"; 0 if there is none.
        activation: of all feed-forwards; see `coterie.ops.apply_activation`.
        num_experts: E; 0 if there is no "moe".
        top_k: K, experts a token.
        expert_hidden_dim: F, the width of one expert.
        shared_hidden_dim: width of the expert that every token goes through besides; 0: none.
        shared_gate: weigh the shared expert by a sigmoid of a projection of the token (qwen2_moe).
        router_score, router_order, router_normalize, router_scale, router_groups, router_top_groups,
            router_group_score: how experts are chosen and weighted; see `coterie.ops.route_topk`.
        selection_bias: balance the experts by a bias on the choice, updated by the trainer, without a gradient
            (arXiv:2408.15664).
        kv_rank: width of the latent that "latent_attention" makes keys and values from; 0 if there is none.
        query_rank: width that "latent_attention" compresses queries to; None: it does not.
        value_dim: V, the width of a head's values in "latent_attention"; None: head_dim - rotary_dim.
        sparse_scorer: how "sparse_attention" chooses blocks, "moba", "nsa", "indexer", or "window" (not at all); see
            `coterie.SparseAttention`.
        sparse_window: the last positions it sees besides, its own included; 0: none.
        sparse_sinks: the first positions it sees besides.
        sparse_block_size: Q, positions of a block.
        sparse_num_blocks: S, blocks of a query.
        sparse_compression: how "nsa" makes one key of a block, as their "mean" or by "learned" weights.
        sparse_share: so many layers of "sparse_attention", one after the other, see the blocks that the first of them
            chose.
        linear_rule: how "linear_attention" edits its state, "gated_delta" and others; see `coterie.LinearAttention`.
        linear_num_heads: its heads, with a state each; None: H.
        linear_num_key_heads: its heads of queries and keys, which divides those; None: the same.
        linear_head_dim: the width of its queries and keys; None: P.
        linear_value_dim: the width of its values; None: that of its keys.
        linear_conv: the tokens that its short convolution sees, the last one included; 0: no convolution.
        linear_num_edits: a token's edits of the state under the rule "delta_product"; None: 2.
        linear_negative_eigenvalues: edits may turn a direction of the state round, under rules that erase.
        qk_norm: RMSNorm on queries and keys, "head" by head (qwen3) or over "all" heads side by side (olmoe); None:
            none. Of "attention", "window_attention" and "sparse_attention" alone, as num_kv_heads is.
        qkv_bias: biases on the attention's projections of queries, keys and values; of "latent_attention", on those
            that compress.
        output_bias: a bias on the attention's output projection.
        attention_output_gate: a sigmoid gate on what every head of those reads (qwen3_next).
        attention_window: how many positions "window_attention" sees, its own included; None if there is none.
        attention_sink_logits: those have a learned score a head of a position that is not there (gpt_oss).
        attention_scale: what scores are multiplied by; None: P^-0.5.
        rope_theta: the rotary embedding's base.
        rotary_scaling: of a model that was trained on shorter texts; see `coterie.RotaryEmbedding`. None: none.
        rotary_dim: the first channels of a head, as many as these, are turned by the rotary embedding, the others are
            left as they are (glm4_moe); even; None: all P. Of "latent_attention" the last channels, and not all.
        rotary_interleaved: the rotary embedding turns pairs of neighbouring channels (deepseek_v3), not those half of
            its width apart.
        embedding_scale, residual_scale, logit_divisor: x = embedding_scale · embedding; x + residual_scale · layer(x);
            logits = head(x) / logit_divisor (granitemoe).
        norm_eps: of every RMSNorm but those within "latent_attention", which have 1e-6 as DeepSeek's.
        norm_zero_centered: those weights are differences from 1, but for "linear_attention"'s output (qwen3_next).
        tie_embeddings: the head's weight is the embedding's.
        max_length: the longest sequence the model is meant for, and the length of a cache unless told otherwise.
            Nothing stops a longer one: the rotary embedding goes on, the quality does not.
        init_std: standard deviation of initial weights; of those that write to the residual stream,
            init_std / sqrt(2 · num_layers).
        recompute: do the experts' first layer again in backward instead of keeping its output: less memory, more time.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mixers: tuple[str, ...] = ("attention",)
    feed_forwards: tuple[str, ...] = ("moe",)
    hidden_dim: int = 0
    activation: str = "swiglu"
    num_experts: int = 0
    top_k: int = 0
    expert_hidden_dim: int = 0
    shared_hidden_dim: int = 0
    shared_gate: bool = False
    router_score: str = "softmax"
    router_order: str = "before"
    router_normalize: bool = True
    router_scale: float = 1.0
    router_groups: int = 1
    router_top_groups: int = 1
    router_group_score: str = "max"
    selection_bias: bool = False
    kv_rank: int = 0
    query_rank: int | None = None
    value_dim: int | None = None
    sparse_scorer: str = "moba"
    sparse_window: int = 512
    sparse_sinks: int = 0
    sparse_block_size: int = 64
    sparse_num_blocks: int = 16
    sparse_compression: str = "mean"
    sparse_share: int = 1
    linear_rule: str = "gated_delta"
    linear_num_heads: int | None = None
    linear_num_key_heads: int | None = None
    linear_head_dim: int | None = None
    linear_value_dim: int | None = None
    linear_conv: int = 4
    linear_num_edits: int | None = None
    linear_negative_eigenvalues: bool = False
    qk_norm: str | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    attention_output_gate: bool = False
    attention_window: int | None = None
    attention_sink_logits: bool = False
    attention_scale: float | None = None
    rope_theta: float = 10000.0
    rotary_scaling: str | None = None
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    norm_eps: float = 1e-6
    norm_zero_centered: bool = False
    tie_embeddings: bool = True
    max_length: int = 2048
    init_std: float = 0.02
    recompute: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        positive = ["vocab_size", "dim", "num_layers", "num_heads", "max_length", "rope_theta", "norm_eps"]
        positive += ["embedding_scale", "residual_scale", "logit_divisor"]
        positive += ["sparse_block_size", "sparse_num_blocks", "sparse_share"]
        optional = [
            "num_kv_heads",
            "head_dim",
            "query_rank",
            "value_dim",
            "rotary_dim",
            "attention_scale",
            "attention_window",
        ]
        linear = ("num_heads", "num_key_heads", "head_dim", "value_dim", "num_edits")
        optional += [f"linear_{name}" for name in linear]
        positive += [name for name in optional if getattr(self, name) is not None]
        if "latent_attention" in self.mixers:
            positive += ["kv_rank"]
        if "mlp" in self.feed_forwards:
            positive += ["hidden_dim"]
        if "moe" in self.feed_forwards:
            positive += ["num_experts", "top_k", "expert_hidden_dim"]
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        widths = ("kv_rank", "hidden_dim", "expert_hidden_dim", "shared_hidden_dim", "linear_conv", "sparse_window")
        for name in (*widths, "num_experts", "top_k", "init_std", "sparse_sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        self._check_patterns()
        self._check_heads()
        self._check_sparse()
        self._check_linear()
        if "moe" in self.feed_forwards:
            self._check_router()
        activation_is_gated(self.activation)
        if self.rotary_scaling is not None:
            parse_rotary_scaling(self.rotary_scaling)

    def _check_patterns(self) -> None:
        for name, accepted in (("mixers", MIXERS), ("feed_forwards", FEED_FORWARDS)):
            pattern = getattr(self, name)
            for entry in pattern:
                if entry not in accepted:
                    raise ValueError(f"{name} must be of {', '.join(map(repr, accepted))}, got {entry!r}")
            if not pattern or self.num_layers % len(pattern):
                raise ValueError(
                    f"{name} is repeated up the layers: its length must divide num_layers = {self.num_layers}, "
                    f"got {len(pattern)}"
                )

    def _check_heads(self) -> None:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim = {self.dim} unless head_dim is given, got {self.num_heads}")
        head_dim = self.head_dim or self.dim // self.num_heads
        if self.rotary_dim is None and head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotary embedding, got {head_dim}")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > head_dim):
            raise ValueError(f"rotary_dim must be even and at most head_dim = {head_dim}, got {self.rotary_dim}")
        if self.qk_norm not in (None, *QK_NORMS):
            raise ValueError(f"qk_norm must be None or one of {', '.join(map(repr, QK_NORMS))}, got {self.qk_norm!r}")
        if "latent_attention" in self.mixers and (self.rotary_dim is None or self.rotary_dim == head_dim):
            raise ValueError(
                f"rotary_dim must be given and less than head_dim = {head_dim} for 'latent_attention', "
                f"got {self.rotary_dim}"
            )
        if ("window_attention" in self.mixers) != (self.attention_window is not None):
            raise ValueError(
                f"attention_window must be given with the mixer 'window_attention', and only then, "
                f"got {self.attention_window} with {self.mixers}"
            )
        if not {*_ATTENTION} & {*self.mixers}:
            where = f"where no mixer is one of {', '.join(map(repr, _ATTENTION))}"
            if self.num_kv_heads not in (None, self.num_heads):
                raise ValueError(
                    f"num_kv_heads must be None or num_heads = {self.num_heads} {where}, got {self.num_kv_heads}"
                )
            if self.qk_norm is not None:
                raise ValueError(f"qk_norm must be None {where}, got {self.qk_norm!r}")
            for name in ("attention_output_gate", "attention_sink_logits"):
                if getattr(self, name):
                    raise ValueError(f"{name} must be False {where}, got True")

    def _check_sparse(self) -> None:
        for name, accepted in (("sparse_scorer", SCORERS), ("sparse_compression", COMPRESSIONS)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {getattr(self, name)!r}")
        nsa, window = self.sparse_scorer == "nsa", self.sparse_scorer == "window"
        for name, wrong, accepted in (
            ("sparse_compression", self.sparse_compression != "mean" and not nsa, "'mean' but for 'nsa'"),
            ("sparse_window", not self.sparse_window and (nsa or window), "at least 1"),
            ("sparse_sinks", self.sparse_sinks and nsa, "0"),
            ("sparse_num_blocks", self.sparse_num_blocks < 3 and nsa, "at least 3"),
            ("sparse_share", self.sparse_share > 1 and window, "1"),
            (
                "attention_sink_logits",
                self.attention_sink_logits and nsa and "sparse_attention" in self.mixers,
                "False",
            ),
        ):
            if wrong:
                raise ValueError(
                    f"{name} must be {accepted} for sparse_scorer {self.sparse_scorer!r}, got {getattr(self, name)!r}"
                )

    def _check_linear(self) -> None:
        if self.linear_rule not in RULES:
            raise ValueError(f"linear_rule must be one of {', '.join(map(repr, RULES))}, got {self.linear_rule!r}")
        heads = self.linear_num_heads or self.num_heads
        if heads % (self.linear_num_key_heads or heads):
            raise ValueError(
                f"linear_num_key_heads must divide the {heads} heads of 'linear_attention', "
                f"got {self.linear_num_key_heads}"
            )
        if self.linear_num_edits is not None and self.linear_rule != "delta_product":
            raise ValueError(
                f"linear_num_edits must be None unless linear_rule is 'delta_product', got {self.linear_num_edits}"
            )
        if self.linear_negative_eigenvalues and not RULES[self.linear_rule].erases:
            erasing = ", ".join(repr(name) for name, rule in RULES.items() if rule.erases)
            raise ValueError(
                f"linear_negative_eigenvalues needs a linear_rule that erases, {erasing}; got {self.linear_rule!r}"
            )

    def _check_router(self) -> None:
        for name, accepted in (
            ("router_score", ("softmax", "sigmoid")),
            ("router_order", ("before", "after")),
            ("router_group_score", ("max", "top2_sum")),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {getattr(self, name)!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be in 1..{self.num_experts} (num_experts), got {self.top_k}")
        if self.router_groups < 1 or self.num_experts % self.router_groups:
            raise ValueError(f"router_groups must divide num_experts = {self.num_experts}, got {self.router_groups}")
        if not 1 <= self.router_top_groups <= self.router_groups:
            raise ValueError(
                f"router_top_groups must be in 1..{self.router_groups} (router_groups), got {self.router_top_groups}"
            )
        reachable = self.router_top_groups * (self.num_experts // self.router_groups)
        if self.top_k > reachable:
            raise ValueError(f"top_k must fit in the {reachable} experts of router_top_groups, got {self.top_k}")
        if self.router_group_score == "top2_sum" and 1 < self.router_groups == self.num_experts:
            raise ValueError(
                f"router_group_score 'top2_sum' needs two experts a group, got router_groups = {self.router_groups} "
                f"of num_experts = {self.num_experts}"
            )
        if self.shared_gate and not self.shared_hidden_dim:
            raise ValueError("shared_gate needs a shared expert: shared_hidden_dim is 0")

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """`mixers` repeated to one entry a layer."""
        return self.mixers * (self.num_layers // len(self.mixers))

    @property
    def layer_scorers(self) -> tuple[str | None, ...]:
        """What chooses the blocks in each layer; None: nothing, or an earlier one's are taken."""
        scorers, count = [], 0
        for mixer in self.layer_mixers:
            is_sparse = mixer == "sparse_attention"
            scorers.append(self.sparse_scorer if is_sparse and count % self.sparse_share == 0 else None)
            count += is_sparse
        return tuple(scorers)

    @property
    def layer_feed_forwards(self) -> tuple[str, ...]:
        """`feed_forwards` repeated to one entry a layer."""
        return self.feed_forwards * (self.num_layers // len(self.feed_forwards))

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON has them (tuples are lists)."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TransformerConfig":
        """The config of `to_dict`. Fields that are left out take their defaults.

        What a config.json has besides, for transformers, is passed over: model_type and architectures, and in
        a file that transformers wrote, with its version in it, all that is its own.

        Raises:
            ValueError: an unknown or a missing field, or a value out of range; it is named. Another model_type.
            TypeError: a value of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a config must be a JSON object of fields, got {type(values).__name__}")
        if values.get("model_type", "coterie") != "coterie":
            raise ValueError(f"model_type must be 'coterie', got {values['model_type']!r}")
        known = {field.name for field in fields(cls)}
        foreign = values.keys() - known if "transformers_version" in values else {"model_type", "architectures"}
        values = {name: value for name, value in values.items() if name not in foreign}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"a config has no field {name!r}{hint}")
        required = ("vocab_size", "dim", "num_layers", "num_heads")
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"a config needs {', '.join(required)}; missing: {', '.join(missing)}")
        return cls(**values)


def check_fields(config: Any) -> None:
    """Gives every field of a frozen dataclass the type it is declared with: JSON's lists become tuples, whole numbers
    become floats where asked.

    Raises:
        TypeError: a value of another type; the field is named.
        ValueError: a number that is not finite, or a whole one that 64 bits do not hold.
    """
    for name, kind in get_type_hints(type(config)).items():
        object.__setattr__(config, name, _checked(name, getattr(config, name), kind))


def _checked(name: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        entry = get_args(kind)[0]
        if isinstance(value, (list, tuple)):
            return tuple(_checked(f"an entry of {name}", one, entry) for one in value)
        raise TypeError(f"{name} must be a sequence of {entry.__name__}, got {value!r}")
    # bool is an int to Python, but num_layers=True is a mistake.
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and abs(value) >= 2**63:
        raise ValueError(f"{name} must be within ±2**63, got {value}")
    if whole and float in (kind, *get_args(kind)):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
