import pytest

from coterie.report import (
    format_positions,
    format_summary,
    format_table,
    human_bytes,
    human_count,
    model_cost,
    summarize,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (0.5, "0.50"),
        (999.4, "999"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (9994, "9.99 k"),
        (9996, "10.0 k"),
        (12_345, "12.3 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (1_234_567, "1.23 M"),
        (-2_500, "-2.50 k"),
        (3e20, "300000 P"),
    ],
)
def test_counts_have_three_figures(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (5 * 2**30, "5.00 GiB"), (1e6, "977 KiB")],
)
def test_bytes_have_binary_units(value, text):
    assert human_bytes(value) == text


def test_columns_are_aligned_numbers_to_the_right():
    text = format_table(["layer", "n"], [["a", "1"], ["bcdefgh", "20"]], rules=[1])
    assert text.splitlines() == ["layer     n", "───────────", "a         1", "───────────", "bcdefgh  20"]


def test_a_row_of_another_width_is_an_error():
    with pytest.raises(ValueError, match="has 1 columns, the header 2"):
        format_table(["a", "b"], [["1"]])


MEASURED = {
    "valid_bpb_equal_tokens": 2.25,
    "valid_bpb_equal_seconds": 2.5,
    "tokens_per_second": 5000.0,
    "load_entropy": 0.97,
    "dead_experts": 3,
}


def costs():
    from coterie.models import TransformerConfig, dense_twin

    config = TransformerConfig(
        vocab_size=256, dim=16, num_layers=2, num_heads=2, num_experts=4, top_k=1, expert_hidden_dim=8
    )
    return {"moe": model_cost(config, 8), "dense": model_cost(dense_twin(config), 8)}


def test_the_summary_compares_two_contenders_row_by_row():
    dense = {**MEASURED, "valid_bpb_equal_tokens": 2.375, "tokens_per_second": 8000.0, "load_entropy": None}
    cost = costs()
    figures = summarize(cost, {"moe": MEASURED, "dense": {**dense, "dead_experts": None}})
    assert figures["moe"]["params"] == cost["moe"].total.params
    assert figures["moe"]["saved_bytes_per_token"] == cost["moe"].total.saved_bytes
    table = {line[:32].strip(): line[32:].split("  ") for line in format_summary(figures).splitlines()}
    cells = {title: [cell.strip() for cell in row if cell.strip()] for title, row in table.items()}
    assert cells[""] == ["moe", "dense", "moe : dense"]
    assert cells["parameters"][2] == f"{cost['moe'].total.params / cost['dense'].total.params:.2f} ×"
    assert cells["training tokens per second"] == ["5.00 k", "8.00 k", "0.62 ×"]
    assert cells["bits per byte at equal tokens"] == ["2.250", "2.375", "−0.125"]
    assert cells["bits per byte at equal seconds"] == ["2.500", "2.500", "+0.000"]
    assert cells["load entropy (1 = even)"] == ["0.970", "–"]
    assert cells["dead experts"] == ["3", "–"]


def test_a_single_model_is_compared_with_nothing():
    text = format_summary(summarize({"moe": costs()["moe"]}, {"moe": MEASURED}))
    assert "equal" not in text
    assert "bits per byte on unseen text     2.250" in text


def test_positions_are_compared_bin_by_bin_where_the_context_is_long():
    long = {"position_edges": [0, 16, 512, 1024], "position_bpb": [4.0, 3.0, 2.5]}
    other = {**long, "position_bpb": [4.5, 3.0, 2.25]}
    assert format_positions({"hybrid": long, "attention": other}).splitlines()[0::2] == [
        "bits per byte at positions  hybrid  attention  hybrid : attention",
        "0–15                         4.000      4.500              −0.500",
        "512–1,023                    2.500      2.250              +0.250",
    ]
    assert format_positions({"moe": long}).splitlines()[-1].split() == ["512–1,023", "2.500"]
    missing = {"position_edges": None, "position_bpb": None}
    for figures in ({"moe": {**long, "position_edges": [0, 16, 512, 1023]}}, {"moe": long, "old": missing}):
        assert format_positions(figures) == ""


def test_costs_and_measurements_must_be_of_the_same_contenders():
    with pytest.raises(ValueError, match="must be the same contenders"):
        summarize(costs(), {"moe": MEASURED})
