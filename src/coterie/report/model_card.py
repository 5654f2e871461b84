"""The model card: what a saved model is, what it costs and how to load it, as the README.md of its folder."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from coterie.models import TransformerConfig
from coterie.models.pretrained import write_atomically
from coterie.report.cost import ModelCost, format_cost, model_cost
from coterie.report.table import human_count

CARD_FILE = "README.md"
# The card's last line: a README.md that ends otherwise is someone's own.
MARK = "<!-- Written by coterie, anew with every save. Delete this line to keep what you write here. -->"

_CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags:
{tags}
---

# {title}

{description}

{facts}

What one token costs, layer by layer:

```text
{cost}
```

## Use

In the model's folder:

{use}

## Licence, data and limits

Not stated yet. Whoever publishes the model says here what it was trained on and what it is not for, and puts its
licence into the header above, as `license: ...`.

{mark}
"""

# By the library in whose format the folder is.
_USE = {
    "coterie": """\
```python
import coterie
import torch

model = coterie.Transformer.from_pretrained(".")
tokens = coterie.generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=8)
```

Or with transformers, after `pip install 'coterie[hf]'`:

```python
import coterie.interop
from transformers import AutoModelForCausalLM

coterie.interop.register_hf()
model = AutoModelForCausalLM.from_pretrained(".")
```""",
    "transformers": """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
```

Or as coterie's own, after `pip install 'coterie[hf]'`:

```python
from coterie.interop import from_hf

model = from_hf(".")
```""",
}


def model_card(
    config: TransformerConfig,
    *,
    dtype: torch.dtype = torch.float32,
    cost: ModelCost | None = None,
    facts: Mapping[str, object] | None = None,
    library: str = "coterie",
) -> str:
    """A model's card: Markdown under the YAML header that the Hugging Face Hub reads.

    Args:
        config: of the model.
        dtype: of its weights.
        cost: what `model_cost` counted; None: count it at config.max_length in `dtype`.
        facts: more rows of the first table, by name: what it was trained on, what it reached.
        library: in whose format the folder is: "coterie" | "transformers".
    """
    cost = cost or _cost(config, dtype)
    total = cost.total
    sparse = total.active_params < total.params
    tags = ["coterie", "causal-lm"] + ["mixture-of-experts"] * sparse
    size = f"{human_count(total.params)} parameters" + f", {human_count(total.active_params)} active" * sparse
    rows = {"parameters": f"{total.params:,}", "active for a token": f"{total.active_params:,}"}
    rows |= {"weights": str(dtype).removeprefix("torch."), **(facts or {})}
    table = ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())]
    return _CARD.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        title=f"A {'sparse' if sparse else 'dense'} transformer: {size}",
        description=_description(config),
        facts="\n".join(table),
        cost=format_cost(cost),
        mark=MARK,
        library=library,
        use=_USE[library],
    )


def write_model_card(
    folder: str | os.PathLike,
    config: TransformerConfig,
    *,
    dtype: torch.dtype = torch.float32,
    cost: ModelCost | None = None,
    facts: Mapping[str, object] | None = None,
    library: str = "coterie",
) -> bool:
    """Write `model_card` as the README.md of a folder that is there, unless it has one that coterie did not write.

    Returns:
        Whether it was written.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and not is_own_card(path):
        return False
    text = model_card(config, dtype=dtype, cost=cost, facts=facts, library=library)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return True


def is_own_card(path: str | os.PathLike) -> bool:
    """Whether a file is a card that coterie wrote and nobody has taken over."""
    path = Path(path)
    return path.is_file() and path.read_bytes().rstrip().endswith(MARK.encode())


@lru_cache(maxsize=16)
def _cost(config: TransformerConfig, dtype: torch.dtype) -> ModelCost:
    """Counted once for all checkpoints of a training."""
    return model_cost(config, dtype=dtype)


def _description(config: TransformerConfig) -> str:
    heads = f"{config.num_heads} heads"
    if config.num_kv_heads not in (None, config.num_heads):
        heads += f" over {config.num_kv_heads} of keys and values"
    text = (
        f"A decoder-only language model of {config.num_layers} layers of width {config.dim}, with a vocabulary of "
        f"{config.vocab_size} and sequences of up to {config.max_length} tokens. Attention has {heads}."
    )
    sparse = config.layer_feed_forwards.count("moe")
    if sparse:
        which = "Every" if sparse == config.num_layers else f"In {sparse} of the layers the"
        text += (
            f" {which} feed-forward is a mixture of {config.num_experts} experts of width {config.expert_hidden_dim}, "
            f"{config.top_k} of which act on a token"
        )
        text += f", beside one of width {config.shared_hidden_dim} for all." if config.shared_hidden_dim else "."
    if sparse < config.num_layers:
        which = "In the others it" if sparse else "Every feed-forward"
        text += f" {which} is an MLP of width {config.hidden_dim}."
    return text


def _cell(value: object) -> str:
    """A table's cell: one line, and no end of the cell in it."""
    return " ".join(str(value).split()).replace("|", "\\|")
