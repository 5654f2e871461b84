"""What a sparse model costs, what of it trains, how evenly it is used, a picture of it, and the card that says so."""

from coterie.report.cost import BreakEven, LayerCost, ModelCost, format_cost, model_cost, saved_for_backward
from coterie.report.coverage import Coverage, ParameterGroup, check_coverage, coverage, format_coverage
from coterie.report.model_card import model_card, write_model_card
from coterie.report.plots import report_figure, save_figure
from coterie.report.summary import format_positions, format_summary, summarize
from coterie.report.table import format_table, human_bytes, human_count
from coterie.report.telemetry import ExpertLoad, dead_experts, load_entropy, load_imbalance

__all__ = [
    "BreakEven",
    "Coverage",
    "ExpertLoad",
    "LayerCost",
    "ModelCost",
    "ParameterGroup",
    "check_coverage",
    "coverage",
    "dead_experts",
    "format_cost",
    "format_coverage",
    "format_positions",
    "format_summary",
    "format_table",
    "human_bytes",
    "human_count",
    "load_entropy",
    "load_imbalance",
    "model_card",
    "model_cost",
    "report_figure",
    "save_figure",
    "saved_for_backward",
    "summarize",
    "write_model_card",
]
