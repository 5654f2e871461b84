"""The commands' options, as tyro reads them: one dataclass each, whose docstrings are the help.

Imported by `coterie.cli` when a command is parsed, for tyro is only needed then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from coterie.interop.gguf_export import DTYPES as GGUF_DTYPES
from coterie.models import attention_twin, dense_twin
from coterie.training import TrainConfig
from coterie.training.config import PRECISIONS

_DEFAULTS = TrainConfig()
FORMATS = ("hf", "gguf", "onnx")
# The twin that a model is compared with, by the value of --compare.
TWINS = {"dense": dense_twin, "dense-params": partial(dense_twin, match="params"), "attention": attention_twin}


def _optional(kind: Callable[[str], Any], metavar: str, default: str, choices: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """An option that is None unless given: a resumed run keeps its own value, any other takes the default."""
    wanted = {int: "a whole number below 2**63", float: "a number"}.get(kind, f"one of {', '.join(choices)}")

    def parse(words: list[str]) -> Any:
        try:
            value = kind(words[0])
        except ValueError:
            value = None
        too_large = kind is int and value is not None and abs(value) >= 2**63  # nothing that counts in 64 bits takes it
        if value is None or too_large or (choices and value not in choices):
            raise ValueError(f"got {words[0]!r}, must be {wanted}")
        return value

    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}" if choices else metavar,
        instance_from_str=parse,
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )
    return spec, arg(help_behavior_hint=f"(default: {default})")


def _training(name: str, kind: Callable[[str], Any], metavar: str) -> tuple[Any, Any]:
    return _optional(kind, metavar, str(getattr(_DEFAULTS, name)))


_FLAG = arg(help_behavior_hint="")


@dataclass(frozen=True)
class Train:
    """Train a sparse model on text, alone or beside a twin, and report what it cost and what it reached."""

    preset: Annotated[str | None, *_optional(str, "NAME", "tiny")] = None
    """The model: tiny, nano, mini, tiny-hybrid, mini-hybrid, tiny-long, mini-long or full-long, or the path of a
    config.json; its vocabulary: the 256 bytes."""
    compare: Annotated[str | None, *_optional(str, "", "none", tuple(TWINS))] = None
    """Train a twin too, in turns on the same batches: with dense MLPs of as many
    FLOPs per token (dense) or parameters (dense-params), or with full attention
    in place of linear, window and sparse attention (attention)."""
    data: Annotated[str | None, *_optional(str, "PATH", "the sources of Python's standard library")] = None
    """A text file, or a folder of them; text is read as bytes."""
    out: Annotated[str | None, *_optional(str, "DIR", "runs/NAME of the preset")] = None
    """Folder for the run: model, checkpoint, log, report.png and report.json."""
    overwrite: Annotated[bool, _FLAG] = False
    """Replace the run that the folder holds."""
    resume: Annotated[bool, _FLAG] = False
    """Continue the run that the folder holds, bit for bit; its options need not be given again."""
    steps: Annotated[int | None, *_training("steps", int, "INT")] = None
    """Optimizer steps."""
    batch_size: Annotated[int | None, *_training("batch_size", int, "INT")] = None
    """Sequences per step."""
    length: Annotated[int | None, *_training("length", int, "INT")] = None
    """Tokens per sequence."""
    accumulation: Annotated[int | None, *_training("accumulation", int, "INT")] = None
    """Parts that a batch is computed in, to save memory."""
    lr: Annotated[float | None, *_training("lr", float, "FLOAT")] = None
    """Highest learning rate."""
    warmup_steps: Annotated[int | None, *_optional(int, "INT", f"{_DEFAULTS.warmup_steps}, at most a fifth of all")] = (
        None
    )
    """Steps until the learning rate is at its highest."""
    balance_weight: Annotated[float | None, *_training("balance_weight", float, "FLOAT")] = None
    """Weight of the balance loss."""
    z_weight: Annotated[float | None, *_training("z_weight", float, "FLOAT")] = None
    """Weight of the router's z-loss."""
    precision: Annotated[str | None, *_optional(str, "", _DEFAULTS.precision, PRECISIONS)] = None
    """Of the arithmetic; auto takes bf16 where the hardware multiplies it natively."""
    seed: Annotated[int | None, *_training("seed", int, "INT")] = None
    """Of weights and batches."""
    eval_every: Annotated[int | None, *_training("eval_every", int, "INT")] = None
    """Steps between evaluations."""
    eval_batches: Annotated[int | None, *_training("eval_batches", int, "INT")] = None
    """Batches per evaluation."""
    checkpoint_every: Annotated[int | None, *_training("checkpoint_every", int, "INT")] = None
    """Steps between checkpoints."""
    device: Annotated[str | None, *_optional(str, "DEVICE", "cuda if there is one, else cpu")] = None
    """Where to train."""


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model, printing each character as soon as it is whole."""

    run: Annotated[Positional[str], arg(metavar="RUN", help_behavior_hint="")]
    """Folder of a run, or of one contender in it."""
    prompt: Annotated[str, arg(metavar="TEXT")]
    """What to continue."""
    max_new_tokens: Annotated[int, *_optional(int, "INT", "200")] = 200
    """Tokens to generate, one per byte."""
    temperature: Annotated[float, arg(metavar="FLOAT")] = 0.8
    """0 always takes the likeliest token."""
    top_k: Annotated[int | None, *_optional(int, "INT", "all")] = None
    """Sample among this many likeliest tokens only."""
    top_p: Annotated[float | None, *_optional(float, "FLOAT", "1")] = None
    """Sample among the fewest tokens that reach this probability together."""
    seed: Annotated[int | None, *_optional(int, "INT", "another one every time")] = None
    """Of the random choice."""


@dataclass(frozen=True)
class Export:
    """Write a trained model for another program to run, run it there, and say how close it came."""

    run: Annotated[Positional[str], arg(metavar="RUN", help_behavior_hint="")]
    """Folder of a run, or of one contender in it."""
    format: Annotated[str, *_optional(str, "", "", FORMATS)[:1], arg(help_behavior_hint="(required)")]
    """hf: a folder for transformers; gguf: a file for llama.cpp; onnx: a file for onnxruntime and others."""
    out: Annotated[str | None, *_optional(str, "PATH", "hf, model.gguf or model.onnx in the model's folder")] = None
    """The folder or file; what an earlier export left there is replaced."""
    dtype: Annotated[str | None, *_optional(str, "", "the model's", GGUF_DTYPES)] = None
    """Of the matrices in a gguf file."""


@dataclass(frozen=True)
class Inspect:
    """Show what a model costs, layer by layer: parameters, FLOPs, bytes read, cached and kept for backward."""

    model: Annotated[Positional[str], arg(metavar="PRESET|RUN", help_behavior_hint="")]
    """tiny, nano, mini, tiny-hybrid, mini-hybrid, tiny-long, mini-long or full-long, the path of a config.json, or the
    folder of a run."""
    length: Annotated[int | None, *_optional(int, "INT", "the model's longest")] = None
    """Tokens per sequence."""
    dtype: Annotated[str | None, *_optional(str, "", "float32", ("float32", "bfloat16"))] = None
    """Of parameters and activations."""
    json: Annotated[bool, _FLAG] = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Tune:
    """Measure the Triton kernels' tile sizes for a model's experts, linear, sparse and window attention on this GPU,
    and write the fastest to a file."""

    model: Annotated[Positional[str], arg(metavar="PRESET|RUN", help_behavior_hint="")]
    """tiny, nano, mini, tiny-hybrid, mini-hybrid, tiny-long, mini-long or full-long, the path of a config.json, or the
    folder of a run."""
    dtype: Annotated[str | None, *_optional(str, "", "bfloat16", ("float16", "bfloat16", "float32"))] = None
    """Of parameters and activations."""
    out: Annotated[str | None, *_optional(str, "FILE", "tiles.json")] = None
    """What coterie_kernels.tiles.use_tiles reads."""
