"""ONNX files of coterie models, run by onnxruntime."""

import os
import shutil
import sys

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from _check import relative_error  # noqa: E402
from coterie.interop import onnx_export, to_onnx  # noqa: E402
from coterie.interop._exported import VerificationError  # noqa: E402
from coterie.models import Transformer, TransformerConfig  # noqa: E402
from coterie.ops import expert_mlp  # noqa: E402
from coterie.ops.activations import parse_activation  # noqa: E402

# One layer: torch's exporter takes seconds, most of them for the first.
SHAPE = {"vocab_size": 50, "dim": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.15}
SPARSE = {**SHAPE, "num_experts": 8, "top_k": 3, "expert_hidden_dim": 16}
MODELS = {
    "dense, biases, geglu": {
        **SHAPE,
        "feed_forwards": ("mlp",),
        "hidden_dim": 24,
        "activation": "geglu",
        "qk_norm": "all",
        "qkv_bias": True,
        "output_bias": True,
    },
    "groups, shared experts, partial rotary, in one layer alone": {
        **SPARSE,
        "num_layers": 2,
        "feed_forwards": ("mlp", "moe"),
        "hidden_dim": 24,
        "router_score": "sigmoid",
        "router_groups": 4,
        "router_top_groups": 2,
        "router_group_score": "top2_sum",
        "router_scale": 2.5,
        "selection_bias": True,
        "shared_hidden_dim": 16,
        "shared_gate": True,
        "rotary_dim": 4,
        "rotary_scaling": "yarn(factor=4.0, original_max_position_embeddings=16, truncate=False)",
        "rotary_layers": (False, True),
        "router_bias": True,
        "qk_norm": "head",
        "tie_embeddings": False,
    },
    "scores after the choice, multipliers": {
        **SPARSE,
        "router_order": "after",
        "attention_scale": 0.2,
        "embedding_scale": 3.0,
        "residual_scale": 0.3,
        "logit_divisor": 6.0,
    },
}


def make_model(name, dtype=torch.float32):
    model = Transformer(TransformerConfig(**MODELS[name]), dtype=dtype)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" in key or key.endswith("bias"):
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif "router" in key:
                tensor.normal_(std=0.3)
                tensor[5], tensor[6] = tensor[2], tensor[2]  # ties: the lower expert is taken
    return model


def run(path, input_ids):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"input_ids": input_ids.numpy()})[0])


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_any_batch_and_length(name, tmp_path):
    model = make_model(name)
    said = to_onnx(model, tmp_path / "model.onnx")
    assert said.startswith("verified: onnxruntime: logits equal to ")
    assert os.listdir(tmp_path) == ["model.onnx"]
    for shape in ((1, 1), (5, 1), (1, 2), (2, 6), (3, 33), (1, 130)):
        ids = torch.randint(50, shape)
        got = run(tmp_path / "model.onnx", ids)
        with torch.no_grad():
            assert relative_error(got, model(ids).logits) < 1e-5, shape
    written = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(written, full_check=True)
    # Standard operators alone, and nothing of the machine that wrote it.
    assert [(opset.domain, len(written.functions)) for opset in written.opset_import] == [("", 0)]
    assert b"site-packages" not in (tmp_path / "model.onnx").read_bytes()
    loops = [node for node in written.graph.node if node.op_type == "Loop"]
    assert len(loops) == len(model.moe_layers())


def test_large_weights_in_a_file_of_their_own_and_other_dtypes(tmp_path, monkeypatch):
    name = "scores after the choice, multipliers"
    model = make_model(name, torch.bfloat16)
    monkeypatch.setattr(onnx_export, "_LARGE", 0)
    to_onnx(model, tmp_path / "model.onnx")
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert (tmp_path / "model.onnx.data").stat().st_size >= weights > (tmp_path / "model.onnx").stat().st_size / 2
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        wanted = make_model(name, torch.bfloat16)
        wanted.load_state_dict(model.state_dict())
        assert relative_error(run(tmp_path / "model.onnx", ids), wanted.float()(ids).logits) < 1e-5
    assert model.embedding.weight.dtype == torch.bfloat16  # the model itself is as it was

    # One that is not verified leaves the earlier one, both files.
    before = {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}
    earlier = shutil.copytree(tmp_path, tmp_path.with_name("earlier"))
    monkeypatch.setattr(
        onnx_export, "_export", lambda model, file: shutil.copytree(earlier, file.parent, dirs_exist_ok=True)
    )
    with torch.no_grad():
        model.layers[0].mixer.v_proj.weight.mul_(1.01)
    with pytest.raises(VerificationError, match="it computes something else"):
        to_onnx(model, tmp_path / "model.onnx")
    assert {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)} == before


ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "silu", "gelu", "gelu_tanh", "relu", "relu2")


@pytest.mark.parametrize(
    "activation", [*ACTIVATIONS, "swiglu(alpha=1.702, limit=0.5, up_offset=1.0)", "reglu(limit=0.5)", "silu(alpha=2)"]
)
def test_the_experts_and_only_those_that_have_tokens(activation):
    parsed = parse_activation(activation)
    x, weights = torch.randn(7, 6), torch.rand(7, 2)
    first, second = torch.randn(5, 8 if parsed.gated else 4, 6), torch.randn(5, 6, 4)
    expert_ids = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    wanted = expert_mlp(x, expert_ids, weights, first, second, activation=activation, impl="reference")
    first[4] = second[4] = float("nan")  # the expert without tokens
    function = onnx.parser.parse_function(onnx_export._expert_mlp_text(parsed))
    inputs = {"x": x, "expert_ids": expert_ids, "weights": weights, "gate_up_proj": first, "down_proj": second}
    kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.int64: onnx.TensorProto.INT64}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("expert_mlp", list(inputs), ["y"], domain="coterie")],
        "experts",
        [onnx.helper.make_tensor_value_info(key, kinds[t.dtype], t.shape) for key, t in inputs.items()],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, x.shape)],
    )
    opsets = [onnx.helper.make_opsetid("", onnx_export.OPSET), onnx.helper.make_opsetid("coterie", 1)]
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    got = session.run(None, {key: np.asarray(t) for key, t in inputs.items()})[0]
    assert relative_error(torch.from_numpy(got), wanted) < 1e-6


def test_wrong_arguments_and_missing_packages_are_named(tmp_path, monkeypatch):
    model = make_model("scores after the choice, multipliers")
    with pytest.raises(IsADirectoryError, match="path must be a file"):
        to_onnx(model, tmp_path)
    hybrid = TransformerConfig(**{**vars(model.config), "mixers": ("linear_attention",), "num_kv_heads": None})
    with pytest.raises(ValueError, match=r"ONNX has no equivalent of this model's mixers = \('linear_attention',\)"):
        to_onnx(Transformer(hybrid), tmp_path / "model.onnx")
    biased = TransformerConfig(**SPARSE, expert_bias=True)
    with pytest.raises(ValueError, match=r"ONNX has no biases in experts yet, got expert_bias = True"):
        to_onnx(Transformer(biased), tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is needed: pip install 'coterie\[export\]'"):
        to_onnx(model, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []
