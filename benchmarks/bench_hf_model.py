"""A transformers mixture of experts as it is, with coterie's experts inside, and as coterie's own Transformer.

The same weights in all: a training step, the prefill of a prompt and generation. What the rest of the model costs is
the limit of what faster experts can gain: the model with its experts left out shows it. Before each timed run stands
one on other inputs, for oneDNN caches its programs, and the cache should be the contender's own.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from tyro.conf import arg

import _bench
import _tell
from _bench import Case, Contender, Result
from coterie.interop import from_hf, register_hf
from coterie.models import generate
from coterie.modules import pack_for_inference
from coterie.ops._packed import packable_dtypes
from coterie.report import format_table, human_bytes

TRAINING, PREFILL, DECODE = "training step", "prefill", "generation"
HF_KINDS = ("grouped_mm", "batched_mm", "eager")
BASELINE = "HF grouped_mm"
DROP_IN, OWN, LIMIT = "HF, our experts", "our Transformer", "HF without experts (a limit)"
PACKED_DROP_IN, PACKED_OWN = f"{DROP_IN}, packed", f"{OWN}, packed"
# Over the fastest of transformers' own.
BARS = {DROP_IN: {TRAINING: 2.2, PREFILL: 1.6, DECODE: 1.3}, OWN: {TRAINING: 3.0, PREFILL: 2.0, DECODE: 2.0}}
BARS |= {PACKED_DROP_IN: {PREFILL: 1.6, DECODE: 1.3}, PACKED_OWN: {PREFILL: 2.0, DECODE: 2.0}}
# Against the same weights in float32. In bfloat16 a router's near tie is now and then another expert.
_TOLERANCES = {"bfloat16": 0.1, "float32": 1e-4}


@dataclass
class Options(_bench.Options):
    """Compare a transformers qwen3_moe with its own experts, with coterie's, and as coterie's Transformer.

    A training step is forward, loss and backward of a batch; generation is greedy, of one sequence. With no options: 12
    layers of width 768, 32 experts of 384, 4 a token, vocabulary 32,000, in bfloat16, in about five minutes on two
    cores.
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations."""
    layers: Annotated[int, arg(metavar="INT")] = 12
    """Layers of the model."""
    batch: Annotated[int, arg(metavar="INT")] = 2
    """Sequences of a training step."""
    length: Annotated[int, arg(metavar="INT")] = 512
    """Tokens of a sequence, in training and prefill."""
    tokens: Annotated[int, arg(metavar="INT")] = 32
    """Tokens to generate."""
    passes: Annotated[
        tuple[Literal["training step", "prefill", "generation"], ...], arg(help_behavior_hint="(default: all)")
    ] = ()
    """What to time."""
    vocab_size: Annotated[int, arg(metavar="INT")] = 32000
    """Tokens of the vocabulary."""
    dim: Annotated[int, arg(metavar="INT")] = 768
    """D, the model's width; an expert's is 384."""

    def check(self) -> None:
        super().check()
        for name in ("layers", "batch", "length", "tokens", "vocab_size", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 0 also when a bar is missed, 1 for a wrong result, 2 for options."""
    options = _bench.start(Options, argv, prog="python benchmarks/bench_hf_model.py")
    facts = _tell.machine(options.device)
    print(_tell.format_machine(facts), end="\n\n")
    models = _Models(options)
    results: list[Result] = []
    try:
        with tqdm(options.passes or (TRAINING, PREFILL, DECODE), unit="case", disable=None) as bar:
            for what in bar:
                case = models.case(what)
                result = _bench.measure(
                    case, options, say=lambda text, what=what: bar.set_description(f"{what}: {text}")
                )
                results.append(result)
                best = result.fastest([f"HF {kind}" for kind in HF_KINDS])
                columns = {"× HF's best": lambda name, result=result, best=best: str(result.ratio(name, best) or "–")}
                tqdm.write(_tell.format_result(result, columns))
                content = {"benchmark": "hf_model", "machine": facts, "cases": [each.to_dict() for each in results]}
                _tell.write_json(options.out / "hf_model.json", {**content, "bars": bars(results)})
    except _bench.WrongResult as error:
        print(f"bench_hf_model: wrong result: {error}", file=sys.stderr)
        return 1
    rows = [
        [each["what"], each["pass"], f"{each['value']:.2f}", f"{each['bar']:.2f}", "met" if each["met"] else "MISSED"]
        for each in bars(results)
    ]
    print(format_table(["over HF's best", "", "×", "bar", ""], rows))
    equal, asked = models.equal_tokens()
    print(f"\ngreedy tokens of our Transformer equal to those of {BASELINE}, in float32: {equal} of {asked}")
    print(f"\n{options.out / 'hf_model.json'}")
    print(
        _tell.write_chart(
            options.out / "hf_model.png",
            lambda: _tell.bar_chart(
                results,
                column=lambda result: result.labels["pass"],
                row=lambda result: result.labels["dtype"],
                series=lambda result: "speed",
                title="A qwen3_moe: speed over transformers' grouped_mm",
                subtitle=f"medians and quartiles of interleaved rounds; {facts['cpu']}, {facts['threads']} threads, "
                f"torch {facts['torch']}, transformers {facts['transformers']}",
            ),
        )
    )
    return 0


def bars(results: Sequence[Result]) -> list[dict]:
    """What was to be reached over the fastest of transformers' own, and what was."""
    found = []
    for result in results:
        best = result.fastest([f"HF {kind}" for kind in HF_KINDS])
        what = result.labels["pass"]
        for name, bar in ((name, bars[what]) for name, bars in BARS.items() if what in bars):
            if best and (ratio := result.ratio(name, best)):
                found.append(
                    {"what": name, "pass": what, "value": ratio.median, "bar": bar, "met": ratio.median >= bar}
                )
    return found


class _Models:
    """One transformers model, whose experts are switched from call to call, and coterie's with the same weights."""

    def __init__(self, options: Options) -> None:
        from transformers import AutoModelForCausalLM, Qwen3MoeConfig, logging

        logging.set_verbosity_error()
        register_hf()
        self.options = options
        config = Qwen3MoeConfig(
            vocab_size=options.vocab_size,
            hidden_size=options.dim,
            num_hidden_layers=options.layers,
            num_attention_heads=12,
            num_key_value_heads=4,
            head_dim=64,
            num_experts=32,
            moe_intermediate_size=384,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            max_position_embeddings=max(2048, options.length),
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(options.seed)
        self.dtype = getattr(torch, options.dtype)
        self.theirs = AutoModelForCausalLM.from_config(config).to(options.device, self.dtype)
        with (
            torch.no_grad()
        ):  # routers that choose, as trained ones do: at their initial 0.02 all choices are near ties
            for name, parameter in self.theirs.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    parameter.normal_(std=0.2)
        self.ours = from_hf(self.theirs, device=options.device)

    def case(self, what: str) -> Case:
        options = self.options
        shape = {TRAINING: (options.batch, options.length), PREFILL: (1, options.length), DECODE: (1, 16)}[what]

        def make_inputs(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(options.vocab_size, shape, generator=generator).to(options.device)

        theirs, ours = {
            TRAINING: (self._train(_their_logits), self._train(_our_logits)),
            PREFILL: (self._prefill(_their_last), self._prefill(_our_last)),
            DECODE: (self._decode_theirs, self._decode_ours),
        }[what]
        # batched_mm copies the weights of every routed row, and keeps them for backward.
        config = self.theirs.config
        gathered = shape[0] * shape[1] * config.num_experts_per_tok * 3 * options.dim * config.moe_intermediate_size
        gathered *= self.dtype.itemsize * (2 * options.layers if what == TRAINING else 1)
        skips = {}
        if gathered > options.limit_gib * 2**30:
            skips["batched_mm"] = f"would gather {human_bytes(gathered)} of weights, one copy per routed row"
        contenders = [
            self._contender(
                what, f"HF {kind}", self._with_experts(kind, theirs), optional=True, skip=skips.get(kind, "")
            )
            for kind in HF_KINDS
        ]
        contenders += [
            self._contender(what, DROP_IN, self._with_experts("coterie", theirs)),
            self._contender(what, OWN, lambda ids: ours(self.ours, ids)),
            Contender(LIMIT, self._without_experts(theirs), lambda ids: {}, {}),
        ]
        if what != TRAINING:
            skip = "" if self.dtype in packable_dtypes() else f"{options.dtype} is not packed on this machine"
            contenders += [
                self._contender(what, PACKED_DROP_IN, lambda ids: theirs(self.theirs_packed, ids), skip=skip),
                self._contender(what, PACKED_OWN, lambda ids: ours(self.ours_packed, ids), skip=skip),
            ]
        labels = {"pass": what, "B": shape[0], "L": shape[1], "dtype": options.dtype, "layers": options.layers}
        return Case(labels, BASELINE, contenders, make_inputs, warm_up=True)

    @cached_property
    def theirs_packed(self) -> nn.Module:
        model = copy.deepcopy(self.theirs)
        model.set_experts_implementation("coterie")
        return pack_for_inference(model)

    @cached_property
    def ours_packed(self) -> nn.Module:
        return pack_for_inference(copy.deepcopy(self.ours))

    def equal_tokens(self) -> tuple[int, int]:
        """How many greedy tokens are equal, and of how many; in float32, where rounding does not choose."""
        theirs, ours = copy.deepcopy(self.theirs).float(), copy.deepcopy(self.ours).float()
        ids = torch.randint(self.options.vocab_size, (1, 16), device=self.options.device)
        pair = [self._decode_theirs(theirs, ids)["tokens"], self._decode_ours(ours, ids)["tokens"]]
        return int((pair[0] == pair[1])[0, 16:].sum()), self.options.tokens

    def _contender(self, what: str, name: str, run: Callable, **more) -> Contender:
        tolerance = _TOLERANCES[self.options.dtype]
        expected = {TRAINING: self._expected_training, PREFILL: self._expected_last, DECODE: _nothing}[what]
        names = ("logits", "grad embedding", "grad experts")
        return Contender(name, run, expected, dict.fromkeys(names, tolerance), tuple(self.ours.parameters()), **more)

    def _with_experts(self, kind: str, run: Callable) -> Callable:
        def switched(ids: Tensor):
            self.theirs.set_experts_implementation(kind)
            return run(self.theirs, ids)

        return switched

    def _without_experts(self, run: Callable) -> Callable:
        def emptied(ids: Tensor):
            with _no_experts(self.theirs):
                return run(self.theirs, ids)

        return emptied

    def _train(self, logits_of: Callable) -> Callable:
        def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
            model.zero_grad()
            logits = logits_of(model, ids)
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
            embedding = model.embedding if model is self.ours else model.get_input_embeddings()
            grads = {"grad embedding": embedding.weight.grad, "grad experts": _last_down_proj(model).grad}
            model.zero_grad()
            return {"logits": logits.detach()[:, -1], **{name: g for name, g in grads.items() if g is not None}}

        return step

    def _prefill(self, last: Callable) -> Callable:
        def run(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"logits": last(model, ids)}

        return run

    def _decode_theirs(self, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
        settings = {"max_new_tokens": self.options.tokens, "do_sample": False, "pad_token_id": 0}
        return {"tokens": model.generate(ids, attention_mask=torch.ones_like(ids), **settings)}

    def _decode_ours(self, model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
        return {"tokens": generate(model, ids, self.options.tokens)}

    def _wide(self) -> nn.Module:
        wide = copy.deepcopy(self.theirs).float()
        wide.set_experts_implementation("eager")
        return wide

    def _expected_training(self, ids: Tensor) -> dict[str, Tensor]:
        return {name: value.double() for name, value in self._train(_their_logits)(self._wide(), ids).items()}

    def _expected_last(self, ids: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": _their_last(self._wide(), ids).double()}


def _nothing(ids: Tensor) -> dict[str, Tensor]:
    """Tokens are compared in float32, at the end."""
    return {}


def _their_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def _our_logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def _their_last(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]


def _our_last(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, cache=model.new_cache(len(ids), ids.shape[1]), num_logits=1).logits[:, -1]


def _last_down_proj(model: nn.Module) -> nn.Parameter:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("experts.down_proj")][-1]


@contextmanager
def _no_experts(model: nn.Module) -> Iterator[None]:
    """Every experts module gives zeros at no cost."""
    experts = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
    for module in experts:
        module.forward = lambda x, *_: torch.zeros_like(x)
    try:
        yield
    finally:
        for module in experts:
            del module.forward


if __name__ == "__main__":
    sys.exit(main())
