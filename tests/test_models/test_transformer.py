from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from coterie.models import Transformer, TransformerConfig
from coterie.ops import balance_loss, z_loss


def _ids(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def _loss(output, targets):
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    return cross_entropy + 0.01 * balance_loss(output.routings) + 0.001 * z_loss(output.routings)


def test_a_position_sees_no_later_one(small_model):
    ids = _ids(2, 12)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = small_model(ids).logits, small_model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-5)
    assert ((before - after)[:, 7:].abs().amax(-1) > 1e-3).all()


def test_no_gradient_from_an_earlier_position(small_model):
    embedded = []
    small_model.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    logits = small_model(_ids(1, 9)).logits
    (gradient,) = torch.autograd.grad(logits[:, 4].sum(), embedded)
    assert (gradient[:, 5:] == 0).all()
    assert (gradient[:, :5].abs().amax(-1) > 0).all()


def test_sequences_do_not_mix(small_model):
    ids = _ids(5, 10)
    order = torch.tensor([3, 0, 4, 1, 2])
    together = small_model(ids).logits
    torch.testing.assert_close(small_model(ids[order]).logits, together[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small_model(ids[2:3]).logits, together[2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["left", "right", "anywhere"])
def test_padding_is_as_if_it_were_not_there(small_model, place):
    """Neither what it contains nor where it stands can matter, for logits, gradients or routing."""
    tokens = _ids(1, 9)
    token_mask = torch.zeros(1, 14, dtype=torch.bool)
    kept = {"left": range(5, 14), "right": range(9), "anywhere": (1, 2, 5, 6, 7, 9, 10, 12, 13)}[place]
    token_mask[:, list(kept)] = True
    targets = _ids(1, 9, seed=2)
    wanted = small_model(tokens)
    right = torch.autograd.grad(_loss(wanted, targets), list(small_model.parameters()))
    for padding in (0, 49):
        ids = torch.full((1, 14), padding)
        ids[token_mask] = tokens[0]
        got = small_model(ids, token_mask=token_mask)
        logits = got.logits[token_mask]
        torch.testing.assert_close(logits, wanted.logits[0], rtol=1e-4, atol=1e-5)
        for a, b in zip(got.routings, wanted.routings, strict=True):
            assert torch.equal(a.counts(), b.counts())
        gradients = torch.autograd.grad(
            _loss(got._replace(logits=logits[None]), targets), list(small_model.parameters())
        )
        for a, b in zip(gradients, right, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


def test_content_of_padding_is_bitwise_nothing(small_model):
    token_mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    ids = _ids(3, 12)
    other = torch.where(token_mask, ids, (ids + 7) % 50)
    a, b = (small_model(x, token_mask=token_mask).logits[token_mask] for x in (ids, other))
    assert torch.equal(a, b)


def test_one_routing_a_moe_layer_in_order(small_model):
    ids = _ids(2, 8)
    seen = []
    for moe in small_model.moe_layers():
        moe.router.register_forward_hook(lambda *call: seen.append(call[-1]))
    routings = small_model(ids).routings
    assert len(routings) == 5
    assert all(a is b for a, b in zip(routings, seen, strict=True))
    assert [routing.counts().sum().item() for routing in routings] == [32] * 5


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_checkpointing_is_bit_equal(small_config, autocast, recompute):
    torch.manual_seed(0)
    model = Transformer(replace(small_config, recompute=recompute))
    ids, targets = _ids(3, 16), _ids(3, 16, seed=2)
    results, saved = [], []
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        storages = {}

        def pack(tensor, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = model(ids)
            loss = _loss(output._replace(logits=output.logits.float()), targets)
        saved.append(sum(storages.values()))
        loss.backward()
        routings = [(r.expert_ids, r.weights, r.counts()) for r in output.routings]
        results.append((loss, routings, [parameter.grad for parameter in model.parameters()]))
        model.zero_grad()
    (loss, routings, gradients), (loss2, routings2, gradients2) = results
    assert torch.equal(loss, loss2)
    assert all(torch.equal(x, y) for a, b in zip(routings, routings2, strict=True) for x, y in zip(a, b, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients2, strict=True))
    assert saved[1] < 0.5 * saved[0]


def test_meta_has_the_same_shapes_and_no_memory(small_config):
    real, meta = Transformer(small_config), Transformer(small_config, device="meta")
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in real.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in meta.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in Transformer(small_config).state_dict().values())


def test_runs_on_meta(small_config):
    output = Transformer(small_config, device="meta")(torch.zeros(2, 7, dtype=torch.int64, device="meta"))
    assert output.logits.shape == (2, 7, 50)
    assert [routing.expert_ids.shape for routing in output.routings] == [(14, 2)] * 5


def test_initial_weights_follow_the_rule():
    config = TransformerConfig(
        vocab_size=500,
        dim=128,
        num_layers=8,
        num_heads=4,
        feed_forwards=("mlp", "moe"),
        hidden_dim=128,
        num_experts=8,
        top_k=2,
        expert_hidden_dim=64,
        shared_hidden_dim=64,
        shared_gate=True,
        selection_bias=True,
        qk_norm="head",
        qkv_bias=True,
        output_bias=True,
        tie_embeddings=False,
        init_std=0.03,
    )
    torch.manual_seed(0)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            to_stream = "o_proj" in name or "down_proj" in name
            wanted = 0.03 / 4 if to_stream else 0.03  # sqrt(2 · 8) = 4
            # 5 standard errors of an estimate of a standard deviation from n draws
            assert abs(parameter.std().item() / wanted - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
            assert abs(parameter.mean().item()) < 5 * wanted / parameter.numel() ** 0.5, name
    assert all((buffer == 0).all() for buffer in model.buffers())
    assert len(list(model.buffers())) == 4


def test_same_seed_same_weights_and_a_dtype(small_config):
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(Transformer(small_config, dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
    assert {parameter.dtype for parameter in models[0].parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in models[0].buffers()} == {torch.float32}


def test_tied_and_untied_heads(small_config):
    tied = Transformer(small_config)
    assert tied.head is None
    untied = Transformer(replace(small_config, tie_embeddings=False))
    state = {**tied.state_dict(), "head.weight": tied.embedding.weight}
    untied.load_state_dict(state)
    ids = _ids(2, 5)
    assert torch.equal(tied(ids).logits, untied(ids).logits)
    untied.head.weight.data.mul_(2)
    torch.testing.assert_close(untied(ids).logits, 2 * tied(ids).logits)


def test_num_logits_gives_the_last(small_model):
    ids = _ids(2, 9)
    torch.testing.assert_close(small_model(ids, num_logits=2).logits, small_model(ids).logits[:, -2:])
    assert small_model(ids, num_logits=20).logits.shape == (2, 9, 50)


def test_learns_a_batch_by_heart(small_config):
    torch.manual_seed(0)
    model = Transformer(replace(small_config, init_std=0.05))
    ids = _ids(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = _loss(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 0.3


# Under "eager" Dynamo alone works: one whole graph, no recompile. "aot_eager" also traces the backward, for a minute.
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_whole_and_once_for_all_lengths(small_config, backend, checkpointing):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Transformer(replace(small_config, num_layers=2, mixers=small_config.mixers[1:3]))
    model.gradient_checkpointing = checkpointing
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (12, 7, 30):
        ids, targets = _ids(2, length), _ids(2, length, seed=2)
        torch._dynamo.mark_dynamic(ids, 1)
        results = []
        for forward in (model, compiled):
            model.zero_grad()
            loss = _loss(forward(ids), targets)
            loss.backward()
            results.append((loss, [parameter.grad for parameter in model.parameters()]))
        (wanted, right), (got, gradients) = results
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert all((a - b).norm() <= 1e-4 * b.norm() + 1e-7 for a, b in zip(gradients, right, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("ids", "token_mask", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), None, r"input_ids must be integers of shape \[B, L\]"),
        (torch.zeros(2, 5), None, "input_ids must be integers .*float32"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool), r"token_mask .*\(2, 4\)"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5), "token_mask must be bool .*float32"),
    ],
)
def test_wrong_inputs_are_named(small_model, ids, token_mask, message):
    with pytest.raises(ValueError, match=message):
        small_model(ids, token_mask=token_mask)
