"""DistributedDataParallel: every parameter has a gradient on every rank, and it is that of the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import coterie
from _check import relative_error
from coterie.ops import indexer_loss


def _loss(model, ids):
    output = model(ids)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return loss + sum(indexer_loss(selection) for selection in output.selections if selection.scores is not None)


def _model(scorer):
    torch.manual_seed(0)
    return coterie.Transformer(
        coterie.TransformerConfig(
            vocab_size=64,
            dim=32,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            mixers=("linear_attention", "sparse_attention", "sparse_attention", "attention"),
            feed_forwards=("mlp", "moe"),
            hidden_dim=48,
            num_experts=3,
            top_k=2,
            expert_hidden_dim=16,
            sparse_scorer=scorer,
            sparse_window=4,
            sparse_block_size=4,
            sparse_num_blocks=3,
            sparse_share=2 if scorer == "moba" else 1,
            sparse_compression="learned" if scorer == "nsa" else "mean",
            max_length=64,
        ),
        dtype=torch.float64,
    )


def _rank(rank, scorer, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        ids = torch.randint(64, (4, 40), generator=torch.Generator().manual_seed(1))
        model, whole = _model(scorer), _model(scorer)
        parallel = torch.nn.parallel.DistributedDataParallel(model)  # is needed until backward is through
        _loss(parallel, ids[2 * rank : 2 * rank + 2]).backward()
        _loss(whole, ids).backward()
        for (name, got), wanted in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert relative_error(got.grad, wanted.grad) < 1e-6, name  # routers compute in float32
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["window", "moba", "nsa", "indexer"])
def test_gradients_of_two_ranks_are_those_of_the_batch(scorer, tmp_path):
    torch.multiprocessing.spawn(_rank, args=(scorer, tmp_path), nprocs=2)
