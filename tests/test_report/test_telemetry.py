import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coterie.ops import Routing, route_topk
from coterie.report import ExpertLoad, dead_experts, load_entropy, load_imbalance
from coterie.training.evaluation import expert_shares, mean_load_entropy


def test_entropy_is_one_when_even_and_zero_when_one_expert_has_all():
    counts = torch.tensor([[7, 7, 7, 7], [0, 28, 0, 0], [14, 14, 0, 0]])
    assert load_entropy(counts).tolist() == pytest.approx([1.0, 0.0, 0.5])


def test_entropy_of_an_uneven_load_by_hand():
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert load_entropy(torch.tensor([3, 1])).item() == pytest.approx(expected)
    assert load_entropy(torch.tensor([0.75, 0.25])).item() == pytest.approx(expected)


def test_no_load_has_no_entropy_and_a_single_expert_is_even():
    assert load_entropy(torch.zeros(4, dtype=torch.int64)).isnan()
    assert load_entropy(torch.tensor([5])).item() == 1.0


def test_what_training_logs_is_the_mean_over_layers():
    counts = torch.tensor([[7, 7, 7, 7], [0, 28, 0, 0], [3, 1, 0, 9]])
    logged = mean_load_entropy([expert_shares(layer) for layer in counts])
    assert logged.item() == pytest.approx(load_entropy(counts).mean().item(), rel=1e-6)


def test_dead_experts_and_those_that_hardly_any_token_reached():
    counts = torch.tensor([[0, 1, 50, 49], [25, 25, 25, 25]])
    assert dead_experts(counts).tolist() == [1, 0]
    assert dead_experts(counts, threshold=0.1).tolist() == [2, 0]


def test_imbalance_is_the_busiest_over_the_fair_share():
    assert load_imbalance(torch.tensor([[1, 1], [0, 8], [3, 1]])).tolist() == [1.0, 2.0, 1.5]


@pytest.mark.parametrize("measure", [load_entropy, dead_experts, load_imbalance])
def test_counts_need_an_expert(measure):
    with pytest.raises(ValueError, match=r"counts: got shape \[3, 0\]"):
        measure(torch.zeros(3, 0))


def routings(seed, mask=None):
    generator = torch.Generator().manual_seed(seed)
    return [route_topk(torch.randn(20, 6, generator=generator), 2, token_mask=mask) for _ in range(3)]


def test_load_adds_up_over_steps_like_a_plain_loop_and_skips_padding():
    mask = torch.arange(20) < 13
    load, expected = ExpertLoad(), torch.zeros(3, 6, dtype=torch.int64)
    for step in range(4):
        step_routings = routings(step, mask)
        load.update(step_routings)
        for layer, routing in enumerate(step_routings):
            for slots in routing.expert_ids[mask].tolist():
                for expert in slots:
                    expected[layer, expert] += 1
    assert torch.equal(load.counts, expected)
    assert load.counts.sum().item() == 4 * 3 * 13 * 2
    assert load.shares == (expected.double() / (4 * 13 * 2)).tolist()
    load.reset()
    with pytest.raises(RuntimeError, match="no load yet"):
        _ = load.counts


def test_updates_leave_the_routings_and_earlier_counts_alone():
    load = ExpertLoad()
    load.update(routings(0))
    before = load.counts.clone()
    first = load.counts
    load.update(routings(1))
    assert torch.equal(load.counts - before, torch.stack([r.counts() for r in routings(1)]))
    assert torch.equal(first, before)


def test_counting_never_waits_for_the_device():
    # A fake tensor has no values: whatever asked for one, as a host synchronisation does, would raise.
    with FakeTensorMode():
        ids = torch.zeros(20, 2, dtype=torch.int64)
        routing = Routing(ids, torch.ones(20, 2), torch.zeros(20, 6), 6)
        load = ExpertLoad()
        for _ in range(2):
            load.update([routing, routing])
        measured = load_entropy(load.counts), dead_experts(load.counts), load_imbalance(load.counts)
    assert [tuple(value.shape) for value in measured] == [(2,), (2,), (2,)]


def test_routings_must_be_of_one_model():
    load = ExpertLoad()
    with pytest.raises(ValueError, match="routings: got none"):
        load.update([])
    load.update(routings(0))
    with pytest.raises(ValueError, match=r"got \[layers, E\] = \[2, 6\], before it was \[3, 6\]"):
        load.update(routings(0)[:2])
    with pytest.raises(ValueError, match=r"layers of \[5, 6\] experts"):
        load.update([routings(0)[0], route_topk(torch.randn(20, 5), 2)])
