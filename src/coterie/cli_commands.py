"""What the commands do. Each takes its options and returns the exit code; errors are the caller's to print."""

import codecs
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from coterie.cli_options import TWINS, Export, Generate, Inspect, Train, Tune
from coterie.models import PRESETS, Transformer, TransformerConfig, generate
from coterie.models.pretrained import CONFIG_FILE, read_config
from coterie.modules import Attention, LinearAttention, MoE, SparseAttention
from coterie.ops.activations import parse_activation
from coterie.report.cost import ModelCost, format_cost, model_cost
from coterie.report.model_card import CARD_FILE, is_own_card, write_model_card
from coterie.report.plots import report_figure, save_figure
from coterie.report.summary import format_positions, format_summary, summarize
from coterie.report.table import format_table, human_count
from coterie.training import (
    Batches,
    ByteTokenizer,
    Comparison,
    Contender,
    TrainConfig,
    Trainer,
    compare,
    load_corpus,
    resolve_precision,
    write_atomically,
)
from coterie.training.compare import check_name
from coterie.training.memory import keep_freed_memory
from coterie.training.trainer import CHECKPOINT, RUN_FILES

if TYPE_CHECKING:
    from coterie_kernels.tune import Layer

RUN_FILE = "run.json"
REPORT_FILES = ("report.json", "report.png")

# How the sample after training begins, where the text is Python.
SAMPLE_PROMPT = "def "
SAMPLE_TOKENS = 240


# --- train ---


def run_train(options: Train) -> int:
    """Trains, then prints the table, writes report.json and report.png, and prints a sample."""
    keep_freed_memory()
    if options.resume and options.overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it: give one of them")
    out = Path(options.out or f"runs/{_short_name(options.preset or 'tiny')}")
    device = _device(options.device)
    plan = _resumed_plan(out, options) if options.resume else _new_plan(out, options)
    config = TrainConfig.from_dict(plan["training"])
    precision = resolve_precision(config.precision, device)
    corpora = _corpora(plan["data"], config.length)
    models = {}
    for name, model_config in plan["models"].items():
        torch.manual_seed(config.seed)
        models[name] = Transformer(TransformerConfig.from_dict(model_config)).to(device)
    if not options.resume:  # all that the new run needs is there: the old one may go
        _begin_run(out, plan)
    print(
        f"{' and '.join(plan['models'])}: {config.steps} steps of {config.batch_size} × {config.length} bytes, "
        f"{precision} on {device}, into {out}\n",
        flush=True,
    )

    try:
        comparison = _train(models, config, corpora, out, plan, options)
    except KeyboardInterrupt:
        saved = any((folder / CHECKPOINT).exists() for folder in (out, *(out / name for name in models)))
        how = f"; coterie train --resume --out {out} continues from the last checkpoint"
        raise KeyboardInterrupt("interrupted" + (how if saved else " before the first checkpoint")) from None

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    costs = {name: model_cost(model.config, config.length, dtype=dtype) for name, model in models.items()}
    figures = summarize(costs, comparison.to_dict())
    for table in filter(None, (format_summary(figures), format_positions(figures))):
        print(f"{table}\n")
    _write_cards(out, plan, comparison, costs)
    _write_report(out, plan, comparison, costs, figures)
    _print_sample(next(iter(models.values())), corpora["valid"], plan)
    return 0


def _new_plan(out: Path, options: Train) -> dict[str, Any]:
    """What will be trained, from the options."""
    if _holds_run(out) and not options.overwrite:
        raise FileExistsError(
            f"{out} holds a run already: give --resume to continue it, --overwrite to replace it, or another --out"
        )
    name = options.preset or "tiny"
    model_config = replace(_named_config(name), vocab_size=ByteTokenizer.vocab_size)  # text is read as bytes
    models = {_kind(model_config, options.compare): model_config}
    if options.compare:
        models[options.compare] = TWINS[options.compare](model_config)
    data = None if options.data is None else str(Path(options.data).resolve())
    return {
        "coterie": version("coterie"),
        "preset": _short_name(name),
        "compare": options.compare,
        "data": data,
        "training": _train_config(options, model_config).to_dict(),
        "models": {name: config.to_dict() for name, config in models.items()},
    }


def _kind(config: TransformerConfig, compare: str | None) -> str:
    """The model's name beside its twin: what the two differ in."""
    if compare == "attention":
        mixers = {*config.mixers}
        return "hybrid" if len(mixers) > 1 else mixers.pop().removesuffix("_attention")
    return "moe" if "moe" in config.feed_forwards else "dense"


def _corpora(data: str | None, length: int) -> dict[str, np.ndarray]:
    """The texts to train and to evaluate on, each long enough for a sequence."""
    corpora = {split: load_corpus(data, split) for split in ("train", "valid")}
    for split, corpus in corpora.items():
        if len(corpus) <= length:
            whose = f"--data {data}" if data else "the embedded corpus"
            raise ValueError(f"--length {length} must be less than the {len(corpus)} {split} bytes of {whose}")
    return corpora


def _train_config(options: Train, model_config: TransformerConfig) -> TrainConfig:
    given = _given(options)
    config = TrainConfig(**{"length": min(TrainConfig.length, model_config.max_length), "warmup_steps": 0, **given})
    if "warmup_steps" not in given:
        given["warmup_steps"] = min(TrainConfig.warmup_steps, config.steps // 5)
    return TrainConfig(**{**config.to_dict(), **given})


def _given(options: Train) -> dict[str, Any]:
    """The training options that were given."""
    names = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(Train)}
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _resumed_plan(out: Path, options: Train) -> dict[str, Any]:
    """What the folder's run was to train. Options that are given again must say the same, or may change (evaluation
    and checkpoints); the trainer checks the training's."""
    plan = _read_plan(out)
    wanted = {
        "preset": options.preset and _short_name(options.preset),
        "compare": options.compare,
        "data": options.data and str(Path(options.data).resolve()),
    }
    for name, value in wanted.items():
        if value is not None and value != plan[name]:
            raise ValueError(f"--{name} is {value}, but the run in {out} has {plan[name]}; another --out starts anew")
    plan["training"] = {**TrainConfig.from_dict(plan["training"]).to_dict(), **_given(options)}
    return plan


def _read_plan(out: Path) -> dict[str, Any]:
    try:
        plan = json.loads((out / RUN_FILE).read_text("utf-8"))
        _check_plan(plan)
    except FileNotFoundError:
        raise FileNotFoundError(f"{out} holds no run to resume: {RUN_FILE} is missing") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{out / RUN_FILE} is not a run's file: {error}") from None
    return plan


def _check_plan(plan: Any) -> None:
    kinds = {"preset": str, "compare": str | None, "data": str | None, "training": Mapping, "models": Mapping}
    if missing := sorted(kinds.keys() - (plan.keys() if isinstance(plan, Mapping) else ())):
        raise ValueError(f"{', '.join(missing)} missing")
    for name, kind in kinds.items():
        if not isinstance(plan[name], kind):
            raise TypeError(f"{name} must be {'an object' if kind is Mapping else 'a string'}, got {plan[name]!r}")
    if not plan["models"]:
        raise ValueError("models must be one or more, got none")
    for name, config in plan["models"].items():
        check_name(name)
        TransformerConfig.from_dict(config)
    TrainConfig.from_dict(plan["training"])


def _run_folders(out: Path) -> list[Path]:
    """The folder, and those of the contenders in it."""
    try:
        return [out, *(out / name for name in _read_plan(out)["models"])]
    except (ValueError, OSError):
        return [out]


def _holds_run(out: Path) -> bool:
    """Whether a training began there; a plan says so even if it cannot be read."""
    return any((out / file).exists() for file in (RUN_FILE, *RUN_FILES))


def _begin_run(out: Path, plan: dict[str, Any]) -> None:
    """Removes what a run before has written, and nothing else, for the folder is the user's; then writes the plan."""
    for folder in _run_folders(out):
        for file in (*RUN_FILES, *REPORT_FILES):
            (folder / file).unlink(missing_ok=True)
        if is_own_card(folder / CARD_FILE):
            (folder / CARD_FILE).unlink()
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / RUN_FILE, plan)


def _train(models, config: TrainConfig, corpora, out: Path, plan, options: Train) -> Comparison:
    # A progress bar is for someone who looks; in a log it would be a thousand lines.
    shared = {"resume": options.resume, "overwrite": options.overwrite}
    progress = sys.stderr.isatty()
    if len(models) > 1:
        return compare(models, config, corpora["train"], corpora["valid"], out, progress=progress, **shared)
    ((name, model),) = models.items()
    batches = Batches(corpora["train"], config.batch_size, config.length, seed=config.seed)
    trainer = Trainer(model, config, batches, corpora["valid"], out, **shared)
    return Comparison({name: Contender(name, model, trainer.train(progress))}, config)


def _write_cards(out: Path, plan: dict[str, Any], comparison: Comparison, costs: dict[str, ModelCost]) -> None:
    """A README.md beside every model, which says what it is."""
    data = "the sources of Python's standard library" if plan["data"] is None else Path(plan["data"]).name
    for name, contender in comparison.contenders.items():
        facts = {
            "trained on": data,
            "trained by": f"coterie {plan['coterie']}: {human_count(contender.tokens[-1])} bytes",
            "bits per byte on unseen text": f"{contender.valid_bpb[-1]:.3f}",
        }
        folder = out / name if len(costs) > 1 else out
        write_model_card(folder, contender.model.config, cost=costs[name], facts=facts)


def _write_report(
    out: Path, plan: dict[str, Any], comparison: Comparison, costs: dict[str, ModelCost], figures: dict[str, Any]
) -> None:
    report = {
        **plan,
        "figures": figures,
        "equal_tokens": comparison.equal_tokens,
        "equal_seconds": comparison.equal_seconds,
        "costs": {name: cost.to_dict() for name, cost in costs.items()},
        "machine": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }
    _write_json(out / "report.json", report)
    totals = {name: cost.total for name, cost in costs.items()}
    size = "; ".join(
        f"{name} {human_count(total.params)} parameters"
        + (f", {human_count(total.active_params)} active" if total.active_params < total.params else "")
        for name, total in totals.items()
    )
    title = f"{plan['preset']}: a sparse model"
    if plan["compare"] == "attention":
        title += " beside its twin with full attention"
    elif plan["compare"]:
        title += " beside its dense twin"
    try:
        figure = report_figure(comparison.contenders, title=title, subtitle=size)
    except ModuleNotFoundError as error:
        print(f"{out / 'report.json'} is written; no picture: {error}\n")
        return
    save_figure(figure, out / "report.png")
    print(f"{out / 'report.png'} and report.json are written.\n")


def _print_sample(model: Transformer, text, plan: dict[str, Any]) -> None:
    """A short continuation: of `def` where the text is Python, else of the unseen text's beginning."""
    prompt = SAMPLE_PROMPT if plan["data"] is None else bytes(text[:48]).decode("utf-8", errors="ignore")
    print(f"A sample, after {prompt!r}:\n")
    _stream(model, prompt, SAMPLE_TOKENS, temperature=0.7, seed=plan["training"]["seed"])


# --- generate ---


def run_generate(options: Generate) -> int:
    """Prints the prompt and its continuation, character by character."""
    model = Transformer.from_pretrained(_model_folder(options.run), device=_device(None)).eval()
    _stream(
        model,
        options.prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=int.from_bytes(os.urandom(4)) if options.seed is None else options.seed,  # torch's own is a constant
    )
    return 0


def _stream(model: Transformer, prompt: str, max_new_tokens: int, **sampling: Any) -> None:
    tokenizer = ByteTokenizer()
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"the model has a vocabulary of {model.config.vocab_size}, text can be made of bytes only "
            f"({tokenizer.vocab_size}); call coterie.generate with its own tokenizer"
        )
    # What follows a document's end is the beginning of a text: what an empty prompt asks for.
    ids = tokenizer.encode(prompt) if prompt else torch.tensor([tokenizer.separator])
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    unsaid = prompt  # printed with the first token, so that an error before it stands on a line of its own

    def show(tokens: torch.Tensor) -> None:
        nonlocal unsaid
        if (token := int(tokens[0])) != tokenizer.separator:
            print(unsaid + decoder.decode(bytes([token])), end="", flush=True)
            unsaid = ""

    ids = ids.unsqueeze(0).to(model.embedding.weight.device)
    generate(model, ids, max_new_tokens, stop=[tokenizer.separator], callback=show, **sampling)
    print(unsaid + decoder.decode(b"", final=True))


# --- export ---


def run_export(options: Export) -> int:
    """Writes the model for transformers, llama.cpp or onnxruntime, and prints what was verified."""
    if options.dtype is not None and options.format != "gguf":
        raise ValueError(f"--dtype is of --format gguf only, got --format {options.format}")
    from coterie.interop import to_gguf, to_onnx
    from coterie.interop.hf_export import export_hf

    folder = _model_folder(options.run)
    out = Path(options.out or folder / {"hf": "hf", "gguf": "model.gguf", "onnx": "model.onnx"}[options.format])
    if options.format != "hf" and out.name in (RUN_FILE, *RUN_FILES):
        raise ValueError(f"--out {out} has the name of a run's own file: give another")
    model = Transformer.from_pretrained(folder).eval()
    byte_vocabulary = model.config.vocab_size == ByteTokenizer.vocab_size
    if options.format == "hf":
        verified = export_hf(model, out, byte_vocabulary=byte_vocabulary)
    elif options.format == "gguf":
        name = Path(options.run).resolve().name
        verified = to_gguf(model, out, dtype=options.dtype, name=name, byte_vocabulary=byte_vocabulary)
    else:
        verified = to_onnx(model, out)
    print(f"{out} is written, from {folder}\n{verified}")
    return 0


# --- inspect ---


def run_inspect(options: Inspect) -> int:
    """Prints the cost table of a preset, or of every model of a run."""
    dtype = getattr(torch, options.dtype or "float32")
    configs = _configs(options.model)
    costs = {name: model_cost(config, options.length, dtype=dtype) for name, config in configs.items()}
    if options.json:
        print(
            json.dumps({name: {"config": configs[name].to_dict(), **costs[name].to_dict()} for name in costs}, indent=2)
        )
        return 0
    print("\n\n".join(f"{_headline(name, configs[name])}\n\n{format_cost(cost)}" for name, cost in costs.items()))
    return 0


def _headline(name: str, config: TransformerConfig) -> str:
    text = f"{name}: {config.num_layers} layers of width {config.dim}, vocabulary {config.vocab_size}"
    if "moe" in config.feed_forwards:
        text += f", {config.num_experts} experts of width {config.expert_hidden_dim}, {config.top_k} active"
    return text


# --- tune ---


def run_tune(options: Tune) -> int:
    """Measures tile sizes on the GPU, shows what they gain, and writes the table."""
    if not torch.cuda.is_available():
        raise ValueError("tiles are measured on a GPU, and there is none here")
    from coterie_kernels.tiles import write_tiles
    from coterie_kernels.tune import tune

    dtype = getattr(torch, options.dtype or "bfloat16")
    layers = [layer for config in _configs(options.model).values() for layer in _tuned_layers(config, dtype)]
    if not layers:
        raise ValueError(
            f"{options.model} has nothing to tune: no experts, no linear_attention, no sparse_attention, no windows"
        )
    table, choices = tune(layers, torch.device("cuda"), progress=partial(tqdm, unit="class", disable=None))
    rows = [
        [choice.kernel, str(choice.key), str(choice.before), str(choice.after), f"{choice.gain:.2f}×"]
        for choice in choices
    ]
    print(format_table(["kernel", "class", "sizes", "fastest", "gain"], rows))
    out = Path(options.out or "tiles.json")
    write_tiles(out, table)
    print(f"\n{out} is written: coterie_kernels.tiles.use_tiles({str(out)!r}) takes it")
    return 0


def _tuned_layers(config: TransformerConfig, dtype: torch.dtype) -> "list[Layer]":
    """What of a model runs by kernels with tiles, each once."""
    from coterie_kernels.expert_mlp import Activation
    from coterie_kernels.tune_attention import AttentionLayer
    from coterie_kernels.tune_delta_rule import DeltaRuleLayer
    from coterie_kernels.tune_experts import ExpertLayer

    found: list[Layer] = []
    for layer in Transformer(config, device="meta").layers:
        mixer = layer.mixer
        if isinstance(mixer, LinearAttention):
            decay = "heads" if getattr(mixer.decay, "channels", None) is None else "channels"
            widths = mixer.num_heads, mixer.num_key_heads, mixer.head_dim, mixer.value_dim
            erases = mixer.beta_proj is not None
            found.append(DeltaRuleLayer(*widths, "none" if mixer.decay is None else decay, erases, dtype))
        elif isinstance(mixer, Attention):
            heads = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.window
            more: dict[str, Any] = {"sink_logits": mixer.sink_logits is not None, "dtype": dtype}
            if isinstance(mixer, SparseAttention):
                more["sinks"] = mixer.sinks
                if mixer.scorer != "window":
                    more |= {"block_size": mixer.block_size, "num_blocks": mixer.num_blocks}
            if mixer.window is not None or more["sink_logits"]:  # else it is torch's
                found.append(AttentionLayer(*heads, **more))
        if isinstance(layer.feed_forward, MoE):
            activation = Activation(**vars(parse_activation(config.activation)))
            sizes = config.dim, config.expert_hidden_dim, config.num_experts, config.top_k
            found.append(ExpertLayer(*sizes, dtype, activation))
    return list(dict.fromkeys(found))


# --- names and folders ---


def _configs(model: str) -> dict[str, TransformerConfig]:
    """Of a preset, a config file, or every model of a run."""
    path = Path(model)
    if model in PRESETS or path.suffix == ".json":
        return {model: _named_config(model)}
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a preset ({', '.join(PRESETS)}) nor the folder of a run")
    return {str(folder): read_config(folder) for folder in _model_folders(path).values()}


def _named_config(name: str) -> TransformerConfig:
    """A preset's config, or that of a JSON file."""
    if name in PRESETS:
        return PRESETS[name]
    if not name.endswith(".json"):
        raise ValueError(f"--preset {name}: must be {', '.join(PRESETS)}, or the path of a config.json")
    try:
        return TransformerConfig.from_dict(json.loads(Path(name).read_text("utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {name}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} is not a model's config: {error}") from None


def _device(name: str | None) -> torch.device:
    """The device of that name, once a number came back from there; None: the GPU if there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # nothing comes back from meta
        return probe.device
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has no error of its own for it
        raise ValueError(f"--device {name} is of no use here: {str(error).splitlines()[0]}") from None


def _short_name(preset: str) -> str:
    """The preset's name, or its file's without folder and ending."""
    return Path(preset).stem


def _model_folder(run: str) -> Path:
    """The folder of a run's model, of the first if it has several."""
    return next(iter(_model_folders(Path(run)).values()))


def _model_folders(run: Path) -> dict[str, Path]:
    """The folders of a run's models, by name: itself, or one for each contender."""
    if not run.is_dir():
        raise FileNotFoundError(f"no folder of a run at {run}")
    if (run / CONFIG_FILE).exists():
        return {run.name: run}
    try:
        names = list(_read_plan(run)["models"])
    except FileNotFoundError:
        names = sorted(path.parent.name for path in run.glob(f"*/{CONFIG_FILE}"))
    folders = {name: run / name for name in names if (run / name / CONFIG_FILE).exists()}
    if not folders:
        raise FileNotFoundError(f"{run} holds no model yet: no {CONFIG_FILE} in it or in a folder of it")
    return folders


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2) + os.linesep
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
