"""coterie models as ONNX files, with the experts as sparse as they are here.

torch's exporter translates all but two ops. `expert_mlp` becomes a loop over the experts that have tokens: each gathers
its rows and adds its output to theirs, and one without tokens is not computed. The router's stable sort becomes TopK,
which ONNX defines to be stable.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.interop._exported import (
    VerificationError,
    checked_file,
    logits_of,
    optional,
    position_errors,
    sample_ids,
    staging,
)
from coterie.models.transformer import Transformer
from coterie.ops.activations import Activation, parse_activation

# The first that has Gelu.
OPSET = 20
# Of weights, from which on they are a file of their own: an ONNX file cannot be larger than 2 GB.
_LARGE = 1 << 30
_DOMAIN = "coterie"
_TOLERANCE = 1e-4
# [B, L] of the export, and of the runs that verify it: other sizes, one token alone among them.
_TRACED = (2, 6)
_VERIFIED = ((1, 1), (1, 2), (2, 6), (3, 17), (1, 64))


def to_onnx(model: Transformer, path: str | os.PathLike) -> str:
    """Write `model` to the file `path`, run it with onnxruntime, and only then give it its name.

    The file has one input, input_ids [batch, length] int64, and one output, logits [batch, length, vocab] float32, of
    any batch and length. It has neither a cache nor padding. Weights are float32 whatever the model's are; above a
    gigabyte they stand in a file of their own, PATH.data, beside it.

    Args:
        model: a coterie model.
        path: the file; one that is there is replaced.

    Returns:
        What was verified: the largest error of the logits over sequences of several lengths.

    Raises:
        ValueError: the model has linear attention, windows, blocks or sink logits.
        ImportError: onnx, onnxscript or onnxruntime is not installed (pip install 'coterie[export]').
        VerificationError: onnxruntime computes something else; nothing is left at `path`, or what was there before.
    """
    config = model.config
    if "linear_attention" in config.mixers:
        raise ValueError(
            f"ONNX has no equivalent of this model's mixers = {config.mixers}: it has no loop like delta_rule's"
        )
    if {"window_attention", "sparse_attention"} & {*config.mixers} or config.attention_sink_logits:
        raise ValueError(
            f"export to ONNX has no windows, blocks and sink logits yet, got mixers = {config.mixers}, "
            f"attention_sink_logits = {config.attention_sink_logits}"
        )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        optional(package)
    path = checked_file(path)
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        model = copy.deepcopy(model).to("cpu", torch.float32)
    with staging(path) as folder:
        _export(model, folder / path.name)
        verified = _run(model, folder / path.name)
        weights = path.with_name(f"{path.name}.data")
        if (folder / weights.name).exists():
            os.replace(folder / weights.name, weights)
        else:
            weights.unlink(missing_ok=True)  # of an earlier export
        os.replace(folder / path.name, path)
    return f"verified: {verified}"


def _run(model: Transformer, file: Path) -> str:
    session = optional("onnxruntime").InferenceSession(file)
    typical = worst = 0.0
    for batch_size, length in _VERIFIED:
        input_ids = sample_ids(model, batch_size, length)
        got = torch.from_numpy(session.run(["logits"], {"input_ids": input_ids.numpy()})[0])
        errors = position_errors(got, logits_of(model, input_ids, torch.float32))
        # The median decides: however rarely, a rounding may send a token to another expert.
        typical, worst = max(typical, errors.median().item()), max(worst, errors.max().item())
    lengths = ", ".join(str(length) for _, length in _VERIFIED)
    figures = f"onnxruntime: logits equal to {worst:.0e} at lengths {lengths}"
    if not typical <= _TOLERANCE:
        raise VerificationError(f"{figures}, which must be {_TOLERANCE:.0e} at most: it computes something else")
    return figures


# --- the program


class _Logits(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).logits


@torch.no_grad()
def _export(model: Transformer, file: Path) -> None:
    from onnxscript import ir

    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.export.export(
            _Logits(model),
            (sample_ids(model, *_TRACED),),
            dynamic_shapes={"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}},
            strict=False,
        )
        program = program.run_decompositions({torch.ops.coterie.expert_mlp.default: _expert_mlp_node})
        exported = torch.onnx.export(
            program,
            input_names=["input_ids"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            custom_translation_table={torch.ops.aten.sort.stable: _sort},
            verbose=False,
        )
    if model.moe_layers():
        text = _expert_mlp_text(parse_activation(model.config.activation))
        function = ir.serde.deserialize_function(optional("onnx").parser.parse_function(text))
        exported.model.functions[function.identifier()] = function
        ir.passes.common.InlinePass()(exported.model)
        exported.model.opset_imports.pop(_DOMAIN, None)
    ir.passes.common.ClearMetadataAndDocStringPass()(exported.model)  # where this machine keeps its files
    exported.save(file, external_data=sum(p.nbytes for p in model.parameters()) >= _LARGE)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No warnings from the loggers of that name: torch's exporter misses packages that no model here needs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sort(values: Any, stable: bool | None = True, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable in ONNX: TopK puts the lower index first where values are equal."""
    from onnxscript import opset20 as op

    return op.TopK(values, op.Constant(value_ints=[values.shape[dim]]), axis=dim, largest=int(descending), sorted=1)


def _expert_mlp_node(x, expert_ids, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, addend, activation, *_):
    """coterie::expert_mlp as a node that `_expert_mlp_text` is the meaning of; but for y its outputs are not used."""
    assert (gate_up_bias, down_bias, addend) == (None, None, None), "no Transformer has biases in its experts"
    inputs = (x, expert_ids, weights, gate_up_proj, down_proj)
    y = torch.onnx.ops.symbolic(f"{_DOMAIN}::expert_mlp", inputs, dtype=x.dtype, shape=x.shape, version=1)
    unused = x.new_empty(0)
    return y, unused, unused, unused


def _expert_mlp_text(activation: Activation) -> str:
    """The function in ONNX's own language. Slot t·K + k is the k-th expert of token t."""
    return f"""
<opset_import: ["" : {OPSET}], domain: "{_DOMAIN}">
expert_mlp (x, expert_ids, weights, gate_up_proj, down_proj) => (y)
{{
    minus_one = Constant <value_ints = [-1]> ()
    column = Constant <value_ints = [-1, 1]> ()
    slots = Reshape (expert_ids, minus_one)
    slot_weights = Reshape (weights, column)
    top_k = Shape <start = 1, end = 2> (expert_ids)
    used = Unique <sorted = 1> (slots)
    count = Size (used)
    true = Constant <value = bool {{1}}> ()
    zero = Constant <value = float {{0}}> ()
    shape = Shape (x)
    zeros = Expand (zero, shape)
    y = Loop (count, true, zeros) <body = one_expert (int64 step, bool going, float[T, D] sum)
        => (bool go_on, float[T, D] new_sum)
    {{
        go_on = Identity (going)
        expert = Gather (used, step)
        mine = Equal (slots, expert)
        places = NonZero (mine)
        slot = Reshape (places, minus_one)
        token = Div (slot, top_k)
        rows = Gather (x, token)
        first = Gather (gate_up_proj, expert)
        hidden = Gemm <transB = 1> (rows, first)
{_activation_text(activation)}
        second = Gather (down_proj, expert)
        output = Gemm <transB = 1> (active, second)
        weight = Gather (slot_weights, slot)
        weighted = Mul (output, weight)
        to = Reshape (token, column)
        new_sum = ScatterND <reduction = "add"> (sum, to, weighted)
    }}>
}}
"""


def _activation_text(activation: Activation) -> str:
    """hidden → active, as `coterie.ops.apply_activation`."""
    gated, limit = activation.gated, activation.limit
    lines = ["gate, up = Split <axis = -1, num_outputs = 2> (hidden)" if gated else "gate = Identity (hidden)"]

    def constant(name: str, value: float) -> None:
        lines.append(f"{name} = Constant <value = float {{{value!r}}}> ()")

    gate, up = "gate", "up"
    if limit is not None:
        constant("highest", limit)
        constant("lowest", -limit)
        lines += ["low_gate = Min (gate, highest)", "clipped_up = Clip (up, lowest, highest)"]
        gate, up = "low_gate", "clipped_up"
    if activation.up_offset:
        constant("offset", activation.up_offset)
        lines += [f"moved_up = Add ({up}, offset)"]
        up = "moved_up"
    if activation.function == "silu":
        constant("alpha", activation.alpha)
        lines += [f"steep = Mul ({gate}, alpha)", "share = Sigmoid (steep)", f"curved = Mul ({gate}, share)"]
    elif activation.function in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation.function == "gelu_tanh" else "none"
        lines += [f'curved = Gelu <approximate = "{approximate}"> ({gate})']
    elif activation.function == "relu":
        lines += [f"curved = Relu ({gate})"]
    else:  # relu2
        lines += [f"positive = Relu ({gate})", "curved = Mul (positive, positive)"]
    lines += [f"active = Mul (curved, {up})" if gated else "active = Identity (curved)"]
    return "\n".join(f"        {line}" for line in lines)
