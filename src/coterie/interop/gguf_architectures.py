"""Which coterie models llama.cpp computes.

It knows architectures, not configs: what its graph of one does is fixed, or a key of the file's metadata. So a model is
written as the architecture of the transformers family that says all it does, and only if that graph does it too;
everything else is refused by name.
"""

from dataclasses import dataclass, field
from typing import Any

from coterie.interop.hf_config import differences, fitting
from coterie.interop.hf_families import FAMILIES
from coterie.models.config import TransformerConfig


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's graph of one architecture does, where it is not what coterie's config may say.

    Attributes:
        name: gguf's, of its MODEL_ARCH.
        interleaved: its rotary embedding turns neighbouring channels, so rows of queries and keys are reordered.
        wanted: fields of ours that its graph fixes.
        feed_forward_norm: gguf's name of the norm before the feed-forward.
        needs_head: a tied head is written all the same.
        needs_shared: it always has a shared expert.
        plain_head_dim: heads side by side are as wide as the model.
        all_sparse: it has no dense layers.
        grouped_queries: it takes fewer key/value heads than query heads.
        expert_width: "ffn" where the length of feed_forward is an expert's, "expert" where that has its own key.
    """

    name: str
    interleaved: bool = False
    wanted: dict[str, Any] = field(default_factory=dict)
    feed_forward_norm: str = "FFN_NORM"
    needs_head: bool = False
    needs_shared: bool = False
    plain_head_dim: bool = False
    all_sparse: bool = False
    grouped_queries: bool = True
    expert_width: str = "expert"


# By the name of a family in `hf_families`.
ARCHITECTURES = {
    "llama": Architecture("LLAMA", interleaved=True),
    "qwen3": Architecture("QWEN3", wanted={"qkv_bias": False, "output_bias": False}),
    "mixtral": Architecture("LLAMA", interleaved=True, expert_width="ffn"),
    "olmoe": Architecture(
        "OLMOE",
        wanted={"router_normalize": False, "qkv_bias": False, "output_bias": False},
        needs_head=True,
        grouped_queries=False,
        expert_width="ffn",
    ),
    "qwen2_moe": Architecture(
        "QWEN2MOE",
        wanted={"router_normalize": False},
        needs_head=True,
        needs_shared=True,
        plain_head_dim=True,
        all_sparse=True,
    ),
    "qwen3_moe": Architecture(
        "QWEN3MOE", wanted={"router_normalize": True, "qkv_bias": False, "output_bias": False}, all_sparse=True
    ),
    "glm4_moe": Architecture("GLM4_MOE", feed_forward_norm="ATTN_POST_NORM", needs_shared=True),
    "granitemoe": Architecture("GRANITE_MOE", interleaved=True, expert_width="ffn"),
}


def family_for_gguf(config: TransformerConfig) -> str:
    """The first family that says all a config does and whose architecture in llama.cpp does it.

    Raises:
        ValueError: there is none; what the closest has not is named.
    """
    return fitting({name: _problems(config, name) for name in ARCHITECTURES}, "architecture of llama.cpp")


def _problems(config: TransformerConfig, family: str) -> list[str]:
    architecture = ARCHITECTURES[family]
    problems = differences(config, FAMILIES[family])
    named = " ".join(problems)
    for name, wanted in architecture.wanted.items():
        if (value := getattr(config, name)) != wanted and f"{name} =" not in named:
            problems.append(f"{name} = {value!r} (there it is {wanted!r})")
    if config.activation != "swiglu":
        problems.append(f"activation = {config.activation!r} (there it is 'swiglu')")
    if config.rotary_scaling is not None and "rotary_scaling =" not in named:
        problems.append(f"rotary_scaling = {config.rotary_scaling!r} (there it is None)")
    if architecture.needs_shared and not config.shared_hidden_dim:
        problems.append("shared_hidden_dim = 0 (there it is positive)")
    if architecture.plain_head_dim and config.num_heads * (config.head_dim or 0) not in (0, config.dim):
        problems.append(f"head_dim = {config.head_dim} (there it is dim / num_heads)")
    if not architecture.grouped_queries and config.num_kv_heads not in (None, config.num_heads):
        problems.append(f"num_kv_heads = {config.num_kv_heads} (there it is num_heads)")
    if architecture.all_sparse and "mlp" in config.feed_forwards and "feed_forwards =" not in named:
        problems.append(f"feed_forwards = {config.feed_forwards} (there they are all 'moe')")
    return problems
