"""transformers' configs as coterie's, and back: exactly, or not at all."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from coterie.interop.hf_families import FAMILIES, Family
from coterie.models.config import TransformerConfig
from coterie.modules.rotary import ROTARY_SCALINGS, parse_rotary_scaling
from coterie.ops.activations import parse_activation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# transformers' activations and coterie's gated ones.
ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "relu": "reglu"}


def family_of(model_type: str | None) -> Family:
    """The family of a transformers model type; ValueError names those there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"coterie has no table for the model type {model_type!r}; it has {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def is_mxfp4(hf_config: "PreTrainedConfig") -> bool:
    """Whether a checkpoint has its experts as `hf_mxfp4` reads them."""
    return family_of(hf_config.model_type).mxfp4 and _quantization(hf_config) == "mxfp4"


def config_from_hf(hf_config: "PreTrainedConfig") -> TransformerConfig:
    """coterie's config of a transformers config.

    Raises:
        ValueError: a model type without a table, or a feature that coterie does not have; it is named.
    """
    family = family_of(hf_config.model_type)
    for name, accepted in family.theirs.items():
        if (value := getattr(hf_config, name, None)) not in accepted:
            raise ValueError(f"coterie has no equivalent of {family.model_type}'s {name} = {value!r}")
    if not getattr(hf_config, "is_causal", True):  # of no family's fields, but transformers' masks ask for it
        raise ValueError(f"coterie has no equivalent of is_causal = {hf_config.is_causal!r}")
    if method := _quantization(hf_config):
        raise ValueError(
            f"the weights are quantized ({method}): coterie loads those of 16 bits and more; have transformers "
            "dequantize them as it loads them (for one, quantization_config=Mxfp4Config(dequantize=True))"
        )
    if (activation := hf_config.hidden_act) not in ACTIVATIONS:
        raise ValueError(f"coterie has no equivalent of the activation hidden_act = {activation!r}")

    ours = {**family.ours, "activation": ACTIVATIONS[activation]}
    for theirs, names in family.fields.items():
        value = getattr(hf_config, theirs, None)
        if theirs == "norm_topk_prob":  # None is False there
            value = bool(value)
        if theirs == "sliding_window" and "sliding_attention" not in hf_config.layer_types:
            continue
        if value is not None:
            ours |= dict.fromkeys(_several(names), value)
    if family.clamped:
        alpha, limit = float(hf_config.swiglu_alpha), float(hf_config.swiglu_limit)
        ours["activation"] = f"swiglu(alpha={alpha!r}, limit={limit!r}, up_offset=1.0)"
    if family.optional_qk_norm:
        ours["qk_norm"] = "head" if hf_config.use_qk_norm else None
    if family.latent:
        ours["head_dim"] = hf_config.qk_nope_head_dim + hf_config.qk_rope_head_dim
    if family.shared:
        ours["shared_hidden_dim"] = getattr(hf_config, family.shared) * hf_config.moe_intermediate_size
    if not ours.get("shared_hidden_dim"):
        ours["shared_gate"] = False
    ours |= _rotary(family, hf_config, ours["head_dim"] if ours.get("head_dim") else ours["dim"] // ours["num_heads"])
    if family.layer_types:
        ours["mixers"] = _shortest_pattern(_mixers(family, hf_config))
    ours["feed_forwards"] = _shortest_pattern(_feed_forwards(family, hf_config))
    if "mlp" in ours["feed_forwards"]:
        ours["hidden_dim"] = hf_config.intermediate_size
    if family.feed_forwards != "mlp" and "moe" not in ours["feed_forwards"]:
        raise ValueError(f"the {family.model_type} has no sparse layer: it is dense whatever its experts' settings")
    return TransformerConfig(**ours)


def config_to_hf(config: TransformerConfig, family: Family) -> dict[str, Any]:
    """The fields of a transformers config of that family which say the same as coterie's.

    Raises:
        ValueError: the family has no equivalent for a field; it is named.
    """
    if problems := differences(config, family):
        raise ValueError(f"transformers' {family.model_type} has no equivalent of this model's {'; '.join(problems)}")
    head_dim = config.head_dim or config.dim // config.num_heads
    theirs: dict[str, Any] = {"hidden_act": _their_activation(config.activation)}
    for name, names in family.fields.items():
        theirs[name] = getattr(config, _several(names)[0])
    theirs |= {name: accepted[0] for name, accepted in family.theirs.items()}
    if family.clamped:
        activation = parse_activation(config.activation)
        theirs |= {"swiglu_alpha": activation.alpha, "swiglu_limit": activation.limit}
    if "attention_window" in family.fields.values() and config.attention_window is None:
        del theirs["sliding_window"]  # its masks want one, whether a layer has it or not
    theirs |= {"num_key_value_heads": config.num_kv_heads or config.num_heads}
    if "head_dim" in theirs:
        theirs["head_dim"] = head_dim
    if "attention_multiplier" in theirs:
        theirs["attention_multiplier"] = config.attention_scale or head_dim**-0.5
    if family.latent:
        theirs["qk_nope_head_dim"] = head_dim - config.rotary_dim
        theirs["v_head_dim"] = config.value_dim or head_dim - config.rotary_dim
    if family.layer_types:
        names = {ours: theirs for theirs, ours in family.layer_types.items()}
        theirs["layer_types"] = [names[mixer] for mixer in config.layer_mixers]
    if family.linear_weights:
        heads = config.linear_num_heads or config.num_heads
        theirs["linear_num_value_heads"] = heads
        theirs["linear_num_key_heads"] = config.linear_num_key_heads or heads
        theirs["linear_key_head_dim"] = width = config.linear_head_dim or head_dim
        theirs["linear_value_head_dim"] = config.linear_value_dim or width
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_scaling is not None:
        rope["rope_type"], parameters = parse_rotary_scaling(config.rotary_scaling)
        kinds = {"original_max_position_embeddings": int, "truncate": bool}
        rope |= {name: kinds.get(name, float)(value) for name, value in parameters.items()}
    if family.partial_rotary:
        rotary_dim = config.rotary_dim or head_dim
        factor = rotary_dim / head_dim
        if int(head_dim * factor) < rotary_dim:  # so it is read, and int(44 * (30 / 44)) is 29
            factor = math.nextafter(factor, 1)
        rope["partial_rotary_factor"] = factor
    theirs["rope_parameters"] = rope
    if family.optional_qk_norm:
        theirs["use_qk_norm"] = config.qk_norm == "head"
    if family.shared:
        theirs[family.shared] = config.shared_hidden_dim // config.expert_hidden_dim
    dense = [index for index, kind in enumerate(config.layer_feed_forwards) if kind == "mlp"]
    if dense:
        theirs["intermediate_size"] = config.hidden_dim
    if family.feed_forwards == "step":
        theirs |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    elif family.feed_forwards == "first":
        theirs["first_k_dense_replace"] = len(dense)
    return theirs


def differences(config: TransformerConfig, family: Family) -> list[str]:
    """What of a config a family does not say, each as "field = value (there ...)"."""
    problems = []
    said = {name for names in family.fields.values() for name in _several(names)}
    said |= {"activation", "rope_theta", "rotary_scaling", "feed_forwards", "hidden_dim"}
    said |= {"rotary_dim"} if family.partial_rotary else set()
    said |= {"qk_norm"} if family.optional_qk_norm else set()
    said |= {"head_dim"} if family.latent else set()
    said |= {"shared_hidden_dim"} if family.shared else set()
    said |= {"mixers"} if family.layer_types else set()
    for one in fields(TransformerConfig):
        value = getattr(config, one.name)
        value = _shortest_pattern(value) if one.name == "mixers" else value
        wanted = family.ours.get(one.name, one.default)
        if one.name in said or wanted is MISSING or value == wanted or _says_nothing(config, one.name):
            continue
        problems.append(f"{one.name} = {value!r} (there it is {wanted!r})")
    for names in family.fields.values():
        names = _several(names)
        if len({getattr(config, name) for name in names}) > 1:
            problems.append(
                " and ".join(f"{name} = {getattr(config, name)!r}" for name in names) + " (there they agree)"
            )
    accepted = [ACTIVATIONS[name] for name in family.theirs.get("hidden_act", ACTIVATIONS)]
    if family.clamped:
        activation = parse_activation(config.activation)
        if (activation.function, activation.gated, activation.up_offset) != ("silu", True, 1) or not activation.limit:
            wanted = "'swiglu' with a limit and up_offset=1.0"
            problems.append(f"activation = {config.activation!r} (there it is {wanted})")
    elif config.activation not in accepted:
        problems.append(f"activation = {config.activation!r} (there it is one of {', '.join(accepted)})")
    if (config.rotary_scaling or "").startswith("ntk"):
        width = config.rotary_dim or config.head_dim or config.dim // config.num_heads
        factor = parse_rotary_scaling(config.rotary_scaling)[1]["factor"]
        theta = config.rope_theta * factor ** (width / max(width - 2, 1))
        problems.append(f"rotary_scaling = {config.rotary_scaling!r} (there it is None with rope_theta = {theta!r})")
    if family.optional_qk_norm and config.qk_norm not in (None, "head"):
        problems.append(f"qk_norm = {config.qk_norm!r} (there it is None or 'head')")
    if family.shared and config.shared_hidden_dim % max(config.expert_hidden_dim, 1):
        width = config.expert_hidden_dim
        problems.append(f"shared_hidden_dim = {config.shared_hidden_dim} (there it is a multiple of {width})")
    problems += _pattern_problems(config, family)
    return problems


def fitting(problems: Mapping[str, list[str]], whose: str) -> str:
    """The first name that has no problems; ValueError says which those of the closest are.

    Args:
        problems: by name of a family, what of a model it does not say.
        whose: "family of transformers", and the like.
    """
    closest = min(problems, key=lambda name: len(problems[name]))
    if problems[closest]:
        raise ValueError(
            f"no {whose} has an equivalent of this model; the closest, {closest}, has none of its "
            + "; ".join(problems[closest])
        )
    return closest


def _says_nothing(config: TransformerConfig, name: str) -> bool:
    """Whether a field has no effect, so that a family need not say it."""
    if name in ("router_groups", "router_top_groups", "router_group_score"):
        return config.router_groups == 1 or config.router_groups == config.router_top_groups
    if name.startswith("router_") or name in ("num_experts", "top_k", "expert_hidden_dim", "selection_bias"):
        return "moe" not in config.feed_forwards
    if name in ("kv_rank", "query_rank", "value_dim"):
        return "latent_attention" not in config.mixers
    if name.startswith("linear_"):
        return "linear_attention" not in config.mixers
    if name.startswith("sparse_"):
        return "sparse_attention" not in config.mixers
    if name == "expert_bias":
        return "moe" not in config.feed_forwards
    if name == "rotary_layers":
        pairs = zip(config.layer_rotary, config.layer_mixers, strict=True)
        return all(rotary or mixer == "linear_attention" for rotary, mixer in pairs)
    if name == "shared_gate":
        return not config.shared_hidden_dim
    head_dim = config.dim // config.num_heads
    if name == "head_dim":
        return config.head_dim == head_dim
    if name == "rotary_dim":
        return config.rotary_dim == (config.head_dim or head_dim)
    return name == "recompute"


def _pattern_problems(config: TransformerConfig, family: Family) -> list[str]:
    kinds = config.layer_feed_forwards
    wanted = None
    if family.feed_forwards in ("mlp", "moe") and set(kinds) != {family.feed_forwards}:
        wanted = f"all {family.feed_forwards!r}"
    elif family.feed_forwards != "mlp" and "moe" not in kinds:
        wanted = "'moe' at least once"
    elif family.feed_forwards == "first" and "mlp" in kinds[kinds.index("moe") :]:
        wanted = "'mlp' in the first layers only"
    problems = [f"feed_forwards = {config.feed_forwards} (there they are {wanted})"] if wanted else []
    known = set(family.layer_types.values())
    if known and not known.issuperset(config.mixers):
        problems.append(f"mixers = {config.mixers} (there they are of {', '.join(sorted(map(repr, known)))})")
    if "linear_attention" in known and config.linear_conv == 0:
        problems.append("linear_conv = 0 (there it is positive)")
    return problems


def _rotary(family: Family, hf_config: "PreTrainedConfig", head_dim: int) -> dict[str, Any]:
    rope = dict(hf_config.rope_parameters or {})
    rope = {name: value for name, value in rope.items() if value is not None or name == "truncate"}  # None: False
    kind, scaling = rope.pop("rope_type", "default"), None
    factor = rope.pop("partial_rotary_factor", None) or 1.0
    if kind != "default":
        if kind not in ROTARY_SCALINGS or kind == "ntk":  # no rope_type of theirs
            raise ValueError(f"coterie has no equivalent of the rotary embedding's scaling, rope_type = {kind!r}")
        if family.latent and (value := rope.get("mscale_all_dim")):  # which scales the scores, with any rope_type
            raise ValueError(f"coterie has no equivalent of {family.model_type}'s mscale_all_dim = {value!r}")
        if kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim") and "attention_factor" not in rope:
            raise ValueError("coterie has no equivalent of the rotary embedding's mscale beside mscale_all_dim")
        needed, optional = ROTARY_SCALINGS[kind]
        if "original_max_position_embeddings" in needed:  # as transformers has it where a config leaves it out
            rope.setdefault("original_max_position_embeddings", hf_config.max_position_embeddings)
        if missing := needed - rope.keys():
            raise ValueError(f"rope_parameters of rope_type {kind!r} lack {', '.join(sorted(missing))}")
        given = {name: rope[name] for name in sorted(needed | optional) if name in rope}
        given = {name: bool(value) if name == "truncate" else float(value) for name, value in given.items()}
        scaling = f"{kind}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
    if "rope_theta" not in rope:
        raise ValueError("the config has no rope_theta in its rope_parameters")
    theta = rope.pop("rope_theta")
    if factor != 1.0 and not family.partial_rotary:
        raise ValueError(f"{family.model_type} has no partial_rotary_factor, got {factor}")
    return {"rope_theta": theta, "rotary_scaling": scaling} | (
        {"rotary_dim": int(head_dim * factor)} if factor != 1.0 else {}
    )


def _quantization(hf_config: "PreTrainedConfig") -> str | None:
    """The method by which a checkpoint or a model in memory is quantized."""
    quantization = getattr(hf_config, "quantization_config", None)
    if isinstance(quantization, Mapping):
        return quantization.get("quant_method", "by no method that is named")
    return quantization and str(getattr(quantization.quant_method, "value", quantization.quant_method))


def _mixers(family: Family, hf_config: "PreTrainedConfig") -> tuple[str, ...]:
    """Our name of every layer's mixer."""
    kinds = tuple(hf_config.layer_types[: hf_config.num_hidden_layers])
    if unknown := sorted(set(kinds) - family.layer_types.keys()):
        raise ValueError(f"coterie has no equivalent of {family.model_type}'s layer_types = {unknown[0]!r}")
    return tuple(family.layer_types[kind] for kind in kinds)


def _feed_forwards(family: Family, hf_config: "PreTrainedConfig") -> tuple[str, ...]:
    """ "mlp" or "moe", for every layer."""
    layers = range(hf_config.num_hidden_layers)
    if family.feed_forwards == "step":
        step, dense = hf_config.decoder_sparse_step, hf_config.mlp_only_layers or ()
        return tuple("mlp" if i in dense or (i + 1) % step else "moe" for i in layers)
    if family.feed_forwards == "first":
        return tuple("mlp" if i < hf_config.first_k_dense_replace else "moe" for i in layers)
    return (family.feed_forwards,) * len(layers)


def _shortest_pattern(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest tuple which repeated gives `kinds`."""
    lengths = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next(kinds[:n] for n in lengths if kinds[:n] * (len(kinds) // n) == kinds)


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _their_activation(ours: str) -> str | None:
    return next((theirs for theirs, name in ACTIVATIONS.items() if name == ours), None)
