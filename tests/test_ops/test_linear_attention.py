"""Linear attentions by name, against flash-linear-attention's references and transformers' own."""

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import coterie.ops

ours = sys.modules["coterie.ops.linear_attention"]  # the package's attribute of that name is the function
assert ours.linear_attention is coterie.ops.linear_attention
B, L, H, P, V = 2, 96, 4, 16, 12


def fla(mechanism):
    """A reference of flash-linear-attention by itself: the package needs a GPU to be imported."""
    spec = importlib.util.find_spec("fla")
    if spec is None:
        pytest.skip("fla-core is not installed")
    path = Path(next(iter(spec.submodule_search_locations)), "ops", *mechanism.split("."), "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_{mechanism}_naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(*, key_heads=H, per_channel=False, edits=1, beta_up_to=1.0):
    """q, k, v, g, beta, state, all requiring gradients."""
    shapes = (B, L, key_heads, P), (B, L * edits, key_heads, P), (B, L * edits, H, V)
    q, k, v = (torch.randn(shape) for shape in shapes)
    g = -torch.rand(B, L, H, P) if per_channel else -torch.rand(B, L, H)
    beta = beta_up_to * torch.rand(B, L * edits, H)
    state = torch.randn(B, H, P, V)
    return [t.requires_grad_() for t in (q, F.normalize(k, dim=-1), v, g, beta, state)]


def compare(ours, theirs, tensors, tolerance=2e-5):
    """Outputs and all gradients, of (o, state) or o."""
    got, wanted = ours(*tensors), theirs(*tensors)
    directions = [torch.randn_like(t) for t in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    used = [t for t in tensors if t.requires_grad]
    for a, b in zip(
        torch.autograd.grad(got, used, directions, allow_unused=True),
        torch.autograd.grad(wanted, used, directions, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= tolerance * b.norm()


def test_linear_attention():
    theirs = fla("linear_attn").naive_recurrent_linear_attn
    q, k, v, _, _, state = inputs()
    compare(
        lambda q, k, v, s: ours.linear_attention(q, k, v, initial_state=s, output_final_state=True),
        lambda q, k, v, s: theirs(q, k, v, initial_state=s, output_final_state=True),
        (q, k, v, state),
    )


def test_retention():
    theirs = fla("retention").naive_retention
    q, k, v, *_ = inputs()
    compare(
        lambda q, k, v: ours.retention(q, k, v)[:1],
        lambda q, k, v: (theirs(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2),),
        (q, k, v),
    )


def test_gated_linear_attention():
    theirs = fla("gla").naive_recurrent_gla
    q, k, v, g, _, state = inputs(per_channel=True)
    compare(
        lambda q, k, v, g, s: ours.gated_linear_attention(q, k, v, g, initial_state=s, output_final_state=True),
        lambda q, k, v, g, s: theirs(q, k, v, g, initial_state=s, output_final_state=True),
        (q, k, v, g, state),
    )


@pytest.mark.parametrize("beta_up_to", [1.0, 2.0])
def test_delta_rule(beta_up_to):
    theirs = fla("delta_rule").delta_rule_recurrence
    q, k, v, _, beta, state = inputs(beta_up_to=beta_up_to)

    def flipped(q, k, v, beta, state):
        o, last = theirs(*(t.transpose(1, 2) for t in (q, k, v, beta)), state)
        return o.transpose(1, 2), last

    compare(
        lambda q, k, v, b, s: ours.gated_delta_rule(q, k, v, None, b, initial_state=s, output_final_state=True),
        flipped,
        (q, k, v, beta, state),
    )


@pytest.mark.parametrize("beta_up_to", [1.0, 2.0])
def test_gated_delta_rule(beta_up_to):
    theirs = fla("gated_delta_rule").naive_recurrent_gated_delta_rule
    q, k, v, g, beta, state = inputs(beta_up_to=beta_up_to)
    compare(
        lambda q, k, v, g, b, s: ours.gated_delta_rule(q, k, v, g, b, initial_state=s, output_final_state=True),
        lambda q, k, v, g, b, s: theirs(q, k, v, b, g, initial_state=s, output_final_state=True),
        (q, k, v, g, beta, state),
    )


def test_kda():
    theirs = fla("kda").naive_recurrent_kda
    q, k, v, g, beta, state = inputs(per_channel=True)
    compare(
        lambda q, k, v, g, b, s: ours.gated_delta_rule(q, k, v, g, b, initial_state=s, output_final_state=True),
        lambda q, k, v, g, b, s: theirs(q, k, v, g, b, initial_state=s, output_final_state=True),
        (q, k, v, g, beta, state),
    )


@pytest.mark.parametrize("edits", [1, 2, 3])
def test_delta_product(edits):
    theirs = fla("gated_delta_product").naive_recurrent_gated_delta_product
    q, k, v, g, beta, _ = inputs(edits=edits, beta_up_to=2.0)
    compare(
        lambda q, k, v, g, b: ours.delta_product(q, k, v, g, b, num_edits=edits)[:1],
        lambda q, k, v, g, b: theirs(q, k, v, g, b, scale=P**-0.5, num_householder=edits, cu_seqlens=None)[:1],
        (q, k, v, g, beta),
    )


@pytest.mark.parametrize("kind", ["chunk", "recurrent"])
@pytest.mark.parametrize("key_heads", [H, 2])
def test_qwen3_next(kind, key_heads):
    """transformers' own, with its rounding: chunks of 64, keys normalised inside."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    # Without the wrapper that takes flash-linear-attention's kernels where they are installed.
    theirs = inspect.unwrap(getattr(qwen, f"torch_{kind}_gated_delta_rule"))
    q, k, v, g, beta, state = inputs(key_heads=key_heads)

    def normalised(q, k, v, g, b, s):
        q, k = qwen.l2norm(q), qwen.l2norm(k)
        return ours.gated_delta_rule(q, k, v, g, b, initial_state=s, output_final_state=True)

    compare(
        normalised,
        lambda q, k, v, g, b, s: theirs(
            q, k, v, g, b, initial_state=s, output_final_state=True, use_qk_l2norm_in_kernel=True
        ),
        (q, k, v, g, beta, state),
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_2(groups):
    pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan as theirs

    x, dt = torch.randn(B, L, H, V), torch.rand(B, L, H)
    a, d = -torch.rand(H) - 0.1, torch.randn(H)
    b, c = torch.randn(B, L, groups, P), torch.randn(B, L, groups, P)
    tensors = [t.requires_grad_() for t in (x, dt, a, b, c, d)]

    def scan(x, dt, a, b, c, d):
        y, state = theirs(x, dt, a, b, c, 32, D=d, return_final_states=True)
        return y, state.mT

    compare(lambda *t: ours.ssd(*t, output_final_state=True), scan, tensors)


def test_edits_of_a_token_are_in_turn():
    q, k, v, g, beta, _ = inputs(edits=2)
    with pytest.raises(ValueError, match="k must have L · num_edits = 96 · 3 tokens, got 192"):
        ours.delta_product(q, k, v, g, beta, num_edits=3)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[:, 50:] = False
    o, state = ours.delta_product(q, k, v, g, beta, num_edits=2, token_mask=mask, output_final_state=True)
    head = [q[:, :50], k[:, :100], v[:, :100], g[:, :50], beta[:, :100]]
    wanted, last = ours.delta_product(*head, num_edits=2, output_final_state=True)
    torch.testing.assert_close(o[:, :50], wanted)
    torch.testing.assert_close(state, last)
    assert (o[:, 50:] == 0).all()
