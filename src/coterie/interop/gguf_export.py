"""coterie models as GGUF files, which llama.cpp runs.

Which architecture of llama.cpp a model is, if any, stands in `gguf_architectures`. Here are the file, written one
tensor at a time, and its verification: every tensor is read back, and llama.cpp runs it if it is there.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from coterie.interop import gguf_run
from coterie.interop._byte_vocabulary import byte_tokens
from coterie.interop._exported import (
    VerificationError,
    checked_file,
    logits_of,
    optional,
    position_errors,
    sample_ids,
    staging,
)
from coterie.interop.gguf_architectures import ARCHITECTURES, Architecture, family_for_gguf
from coterie.models.config import TransformerConfig
from coterie.models.transformer import Transformer
from coterie.modules.lora import adapter_names

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
DTYPES = ("f32", "f16", "bf16", "q8_0")
_DTYPE_OF = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# How far llama.cpp's logits may be from the model's, relative, at the median position: it rounds activations to the
# weights' dtype, and a rounding may send a token to another expert, which all that follow in its sequence see.
_TOLERANCES = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}
_ROUNDED = {"f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.bfloat16}
_PROMPTS, _LENGTH, _NEW_TOKENS = 8, 8, 32


# Our names, without layers.<i>, as gguf's MODEL_TENSOR; two: halves of our rows.
_TENSORS = {
    "embedding": "TOKEN_EMBD",
    "norm": "OUTPUT_NORM",
    "head": "OUTPUT",
    "mixer_norm": "ATTN_NORM",
    "mixer.q_proj": "ATTN_Q",
    "mixer.k_proj": "ATTN_K",
    "mixer.v_proj": "ATTN_V",
    "mixer.o_proj": "ATTN_OUT",
    "mixer.q_norm": "ATTN_Q_NORM",
    "mixer.k_norm": "ATTN_K_NORM",
    "feed_forward.gate_up_proj": ("FFN_GATE", "FFN_UP"),
    "feed_forward.down_proj": "FFN_DOWN",
    "feed_forward.router": "FFN_GATE_INP",
    "feed_forward.router.selection_bias": "FFN_EXP_PROBS_B",
    "feed_forward.experts.gate_up_proj": ("FFN_GATE_EXP", "FFN_UP_EXP"),
    "feed_forward.experts.down_proj": "FFN_DOWN_EXP",
    "feed_forward.shared_expert.gate_up_proj": ("FFN_GATE_SHEXP", "FFN_UP_SHEXP"),
    "feed_forward.shared_expert.down_proj": "FFN_DOWN_SHEXP",
    "feed_forward.shared_gate": "FFN_GATE_INP_SHEXP",
}


def to_gguf(
    model: Transformer,
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    name: str | None = None,
    byte_vocabulary: bool = False,
) -> str:
    """Write `model` to the file `path` for llama.cpp, read it back, run it, and only then give it its name.

    Vectors and routers stay in float32, as llama.cpp wants them; with "q8_0", matrices whose rows are no multiple of
    32 long are written in float16.

    Args:
        model: a coterie model.
        path: the file; one that is there is replaced.
        dtype: of the matrices, "f32", "f16", "bf16" or "q8_0"; None: the model's.
        name: of the model, in the file's metadata.
        byte_vocabulary: the tokens are the 256 bytes, 0 between documents, as in `coterie train`; llama.cpp then reads
            and writes text. Otherwise the file has no vocabulary and is to be fed token ids.

    Returns:
        What was verified: every tensor read back, and llama.cpp's logits and tokens if llama-cpp-python is installed.

    Raises:
        ImportError: gguf is not installed (pip install 'coterie[export]').
        ValueError: no architecture of llama.cpp does all that the model does, or dtype is none of these.
        VerificationError: the file differs from the model; nothing is left at `path`, or what was there before.
    """
    optional("gguf")
    path = checked_file(path)
    dtype = _checked_dtype(model, dtype)
    architecture = ARCHITECTURES[family_for_gguf(model.config)]
    if adapters := adapter_names(model):
        raise ValueError(f"the file has no place for adapters ({', '.join(adapters)}): merge_lora, then remove_lora")
    if byte_vocabulary and model.config.vocab_size != 256:
        raise ValueError(
            f"byte_vocabulary needs a vocabulary of the 256 bytes, the model's is {model.config.vocab_size}"
        )
    with staging(path) as folder:
        file = folder / "model.gguf"
        _write(model, architecture, file, dtype, name or path.stem, byte_vocabulary)
        count = _check_tensors(model, architecture, file, dtype)
        verified = f"all {count} tensors read back equal"
        if _has_llama():
            verified += f"; {run_gguf(model, file, dtype=dtype)}"
        else:
            verified += "; not run, for llama-cpp-python is not installed (pip install llama-cpp-python)"
        os.replace(file, path)
    return f"verified: {verified}"


def run_gguf(model: Transformer, file: str | os.PathLike, *, dtype: str, python: str = sys.executable) -> str:
    """Have llama.cpp read prompts and continue one with the file; compare logits and greedy tokens with the model's.

    Args:
        dtype: the file's, which says how close the logits must be.
        python: an interpreter that has llama-cpp-python.

    Returns:
        What was compared, with the figures.

    Raises:
        VerificationError: the logits differ, or llama.cpp refuses the file.
    """
    prompts = sample_ids(model, _PROMPTS, _LENGTH)
    with staging(Path(file)) as folder:
        np.save(folder / "prompts.npy", prompts.numpy())
        arguments = [folder / "prompts.npy", str(_NEW_TOKENS), folder / "result.npz"]
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        command = [python, gguf_run.__file__, file, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if run.returncode:
            said = [line for line in run.stderr.splitlines() if re.search("error|assert", line, re.IGNORECASE)]
            why = said[0].strip() if said else f"exit code {run.returncode}"
            raise VerificationError(f"llama.cpp does not run the file: {why}")
        with np.load(folder / "result.npz") as result:
            got, tokens = (torch.from_numpy(result[key]) for key in ("logits", "tokens"))
    wanted = logits_of(model, prompts, torch.float32)
    error = _error(got, wanted)
    limit = _TOLERANCES[dtype]
    if dtype in _ROUNDED and error > limit:  # then the same arithmetic in torch is the measure
        rounded = logits_of(model, prompts, _ROUNDED[dtype])
        limit = max(limit, 4 * _error(rounded, wanted))
    sequence = torch.cat((prompts[-1], tokens))[None, :-1]
    same = int((logits_of(model, sequence, torch.float32)[0, _LENGTH - 1 :].argmax(-1) == tokens).sum())
    figures = f"llama.cpp: {same} of {_NEW_TOKENS} greedy tokens equal, logits equal to {error:.0e}"
    if not error <= limit:
        raise VerificationError(f"{figures}, which must be {limit:.0e} at most: it computes something else")
    return figures


def _has_llama() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def _error(got: Tensor, wanted: Tensor) -> float:
    return position_errors(got, wanted).median().item()


def _checked_dtype(model: Transformer, dtype: str | None) -> str:
    if dtype is None:
        own = model.embedding.weight.dtype
        if own not in _DTYPE_OF:
            raise ValueError(f"dtype must be given, one of {', '.join(DTYPES)}: GGUF has none for {own}")
        return _DTYPE_OF[own]
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


# --- the file


def _write(
    model: Transformer, architecture: Architecture, file: Path, dtype: str, name: str, byte_vocabulary: bool
) -> None:
    """One tensor at a time in memory, besides the model."""
    gguf = optional("gguf")
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
    try:
        writer.add_name(name)
        _add_metadata(writer, model.config, architecture, dtype)
        if byte_vocabulary:
            _add_byte_vocabulary(writer)
        else:
            writer.add_tokenizer_model("none")
        for key, tensor in _gguf_tensors(model, architecture):
            kind = _kind(key, tensor, dtype)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            nbytes = tensor.numel() // block * size
            writer.add_tensor_info(key, tuple(tensor.shape), np.dtype(np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, tensor in _gguf_tensors(model, architecture):
            writer.write_tensor_data(_encoded(key, tensor, dtype))
    finally:
        writer.close()


def _check_tensors(model: Transformer, architecture: Architecture, file: Path, dtype: str) -> int:
    """How many tensors the file has, each compared with the model's."""
    read = {tensor.name: tensor for tensor in optional("gguf").GGUFReader(file).tensors}
    for key, tensor in _gguf_tensors(model, architecture):
        wanted = _encoded(key, tensor, dtype)
        got = read.pop(key).data if key in read else None
        if got is None or got.shape != wanted.shape or got.tobytes() != wanted.tobytes():
            raise VerificationError(f"{key} is not read back as it was written")
    if read:
        raise VerificationError(f"{', '.join(read)} is read back, but was not written")
    return sum(1 for _ in _gguf_tensors(model, architecture))


def _gguf_tensors(model: Transformer, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """(gguf's name, tensor) of everything in the file."""
    gguf = optional("gguf")
    config = model.config
    tensors = model.state_dict()
    if architecture.needs_head and model.head is None:
        tensors["head.weight"] = tensors["embedding.weight"]
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads or config.num_heads}
    for name, tensor in tensors.items():
        layer, part = (int(match[1]), match[2]) if (match := _LAYER.fullmatch(name)) else (None, name)
        stem, _, kind = part.rpartition(".")
        if part in _TENSORS:  # not a module's weight or bias
            stem, kind = part, "bias" if part.endswith("bias") else "weight"
        if architecture.interleaved and (projection := stem.rpartition(".")[2]) in heads:
            tensor = _interleaved(tensor, heads[projection])
        if stem == "feed_forward.shared_gate":
            tensor = tensor[0]
        names = architecture.feed_forward_norm if stem == "feed_forward_norm" else _TENSORS[stem]
        names = (names,) if isinstance(names, str) else names
        for gguf_name, rows in zip(
            names, tensor.chunk(len(names), dim=-2) if len(names) > 1 else (tensor,), strict=True
        ):
            yield f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[gguf_name]].format(bid=layer)}.{kind}", rows


def _interleaved(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of each head, or entries of its bias, from first half, second half to one of each in turns."""
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _kind(key: str, tensor: Tensor, dtype: str) -> Any:
    """gguf's type of a tensor."""
    gguf = optional("gguf")
    if tensor.dim() == 1 or "ffn_gate_inp" in key:
        dtype = "f32"
    if dtype == "q8_0" and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
        dtype = "f16"
    return gguf.GGMLQuantizationType[dtype.upper()]


def _encoded(key: str, tensor: Tensor, dtype: str) -> np.ndarray:
    gguf = optional("gguf")
    kind = _kind(key, tensor, dtype)
    values = tensor.detach().float().cpu().contiguous()
    if kind == gguf.GGMLQuantizationType.F16 and values.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"dtype {dtype!r} cannot hold {key}, which has values over 65504: take 'bf16' or 'f32'")
    return gguf.quants.quantize(values.numpy(), kind)


def _add_metadata(writer: "GGUFWriter", config: TransformerConfig, architecture: Architecture, dtype: str) -> None:
    gguf = optional("gguf")
    head_dim = config.head_dim or config.dim // config.num_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads or config.num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim or head_dim)
    kinds = config.layer_feed_forwards
    if "moe" in kinds:
        _add_experts(writer, config, architecture)
        writer.add_leading_dense_block_count(kinds.index("moe"))
    only_experts = "mlp" not in kinds and architecture.expert_width == "ffn"
    writer.add_feed_forward_length(config.expert_hidden_dim if only_experts else config.hidden_dim)
    if architecture.name == "GRANITE_MOE":
        writer.add_attention_scale(config.attention_scale or head_dim**-0.5)
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(config.logit_divisor)
    kind = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_experts(writer: "GGUFWriter", config: TransformerConfig, architecture: Architecture) -> None:
    gguf = optional("gguf")
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.top_k)
    if architecture.expert_width == "expert":
        writer.add_expert_feed_forward_length(config.expert_hidden_dim)
    # What the graphs do not read they do; it is said all the same.
    writer.add_expert_weights_norm(config.router_normalize or config.router_order == "after")
    writer.add_expert_weights_scale(config.router_scale)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[config.router_score.upper()])
    if config.shared_hidden_dim:
        writer.add_expert_shared_count(config.shared_hidden_dim // config.expert_hidden_dim)
        writer.add_expert_shared_feed_forward_length(config.shared_hidden_dim)
    if config.router_groups > config.router_top_groups:
        writer.add_expert_group_count(config.router_groups)
        writer.add_expert_group_used_count(config.router_top_groups)


def _add_byte_vocabulary(writer: "GGUFWriter") -> None:
    gguf = optional("gguf")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(byte_tokens())
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 255)
    writer.add_token_merges(["aa aa"])  # llama.cpp wants one; this one never applies, for nothing makes an "aa"
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
