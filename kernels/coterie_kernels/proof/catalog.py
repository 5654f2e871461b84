"""Every launcher, with examples that reach all there is to prove. A new kernel joins by one more entry in `CATALOG`."""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from coterie_kernels import combine, delta_rule, expert_mlp, grouped_matmul, routing, sort
from coterie_kernels.proof.example import DTYPES, Entry, Example, name_of, randn
from coterie_kernels.proof.sparse_attention import matrix_sparse_attention, small_sparse_attention
from coterie_kernels.tiles import TILES

_SWIGLU = expert_mlp.Activation("silu", True)
_GPT_OSS = expert_mlp.Activation("silu", True, 1.702, 7.0, 1.0)
_OTHER_ACTIVATIONS = {  # those whose gradients take most registers, and one without a gate
    "gpt_oss": _GPT_OSS,
    "geglu": expert_mlp.Activation("gelu", True),
    "relu2": expert_mlp.Activation("relu2", False),
}


def _ids(tokens: int, num_experts: int, top_k: int, how: str = "random") -> Tensor:
    """[T, K] expert ids: "random", "unused" (some slots are), "skewed", "one" (all to one expert)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    if how == "unused":
        return ids.masked_fill(torch.rand(tokens, top_k, generator=generator) < 0.4, num_experts)
    if how == "skewed":
        return (num_experts * torch.rand(tokens, top_k, generator=generator) ** 4).long()
    return torch.full_like(ids, num_experts // 2) if how == "one" else ids


def run_expert_mlp(
    tokens: int,
    dim: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    *,
    how: str = "random",
    bias: bool = False,
    recompute: bool = False,
    activation: expert_mlp.Activation = _SWIGLU,
    needs: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """The MLP's forward and backward, of random numbers."""
    width = 2 * hidden if activation.gated else hidden
    ids = _ids(tokens, num_experts, top_k, how)
    weights = randn(tokens, top_k, dtype=torch.float32, seed=1).abs()
    x, grad, addend = (randn(tokens, dim, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    up = randn(num_experts, width, dim, dtype=dtype, seed=5) / dim**0.5
    down = randn(num_experts, dim, hidden, dtype=dtype, seed=6) / hidden**0.5
    biases = (
        randn(num_experts, width, dtype=dtype, seed=7) if bias else None,
        randn(num_experts, dim, dtype=dtype, seed=8) if bias else None,
    )
    y, *kept = expert_mlp.forward(
        x, ids, weights, up, down, *biases, addend if bias else None, activation, not recompute
    )
    needs = [True] * 4 + [bias] * 2 if needs is None else needs
    return [y, *expert_mlp.backward(grad, x, weights, up, down, *biases, *kept, activation, needs)]


def _small_expert_mlp() -> Iterator[Example]:
    cases = {
        "odd": ((33, 37, 25, 5, 3), {"how": "unused", "bias": True}),
        "odd, recompute": ((33, 37, 25, 5, 3), {"how": "unused", "bias": True, "recompute": True}),
        "two chunks": ((20, 40, 96, 3, 2), {"how": "skewed"}),
        "four chunks, one empty": ((20, 40, 161, 3, 2), {"recompute": True, "activation": _GPT_OSS}),
        "wide": ((20, 40, 270, 3, 2), {"how": "skewed", "bias": True}),
        "wide, recompute": ((20, 40, 270, 3, 2), {"bias": True, "recompute": True}),
        "no gate": ((20, 16, 24, 4, 2), {"activation": _OTHER_ACTIVATIONS["relu2"]}),
        "one expert of many": ((30, 24, 16, 9, 2), {"how": "one"}),
        "tall tiles": ((200, 24, 16, 1, 1), {}),
        "only biases": ((20, 24, 16, 3, 2), {"bias": True, "needs": [False] * 4 + [True] * 2}),
    }
    for label, (sizes, settings) in cases.items():
        for dtype in DTYPES if label == "odd" else (torch.bfloat16, torch.float32):
            yield Example(f"{label}, {name_of(dtype)}", lambda a=sizes, d=dtype, s=settings: run_expert_mlp(*a, d, **s))


def _matrix_expert_mlp(target: str, dtype: torch.dtype) -> Iterator[Example]:
    """Heights come from N / E, classes from F; one D with biases and one without.

    float16 compiles nearly as bfloat16 does, and no float32 entry depends on F: a few of each have to be enough. So
    are the tallest tiles for other activations, and the lowest too for widths that 16 does not divide; those take more
    registers than the tables were made for.
    """
    heights = sorted(TILES[target]["float32 forward" if dtype == torch.float32 else "forward"])
    widths = {torch.float16: (64, 256), torch.float32: (96, 512)}.get(dtype, (32, 64, 96, 128, 192, 256, 384, 512))
    for hidden in widths:
        for rows in heights:
            if hidden <= 256 and rows > 64:
                continue  # no fused tile is taller
            yield from _mlp_examples(256, hidden, rows, dtype)
            yield from _mlp_examples(1024, hidden, rows, dtype, "bias", bias=True)
    if dtype == torch.bfloat16:
        for hidden in (128, 256, 512):
            tallest = heights[-1] if hidden > 256 else 64
            for name, activation in _OTHER_ACTIVATIONS.items():
                yield from _mlp_examples(
                    512, hidden, tallest, dtype, name, may_spill=True, bias=True, activation=activation
                )
            for rows in (heights[0], tallest):
                yield from _mlp_examples(250, hidden - 12, rows, dtype, "bias", may_spill=True, bias=True)


def _mlp_examples(
    dim: int, hidden: int, rows: int, dtype: torch.dtype, *told: str, may_spill: bool = False, **settings
) -> Iterator[Example]:
    """With H kept and without, for as many tokens as call for tiles of so many rows."""
    experts, top_k = 8, 4
    sizes = (4 * rows * experts // top_k, dim, hidden, experts, top_k, dtype)
    for recompute in (False, True):
        label = ", ".join((f"D {dim}, F {hidden}, {rows} rows", *told, *["recompute"] * recompute))
        yield Example(label, lambda r=recompute: run_expert_mlp(*sizes, recompute=r, **settings), may_spill)


def run_grouped_matmul(
    counts: Sequence[int], dim: int, outer: int, dtype: torch.dtype, *, gathered: bool, bias: bool
) -> list[Tensor | None]:
    """The product and its gradients; three rows belong to no expert."""
    num_rows = sum(counts) + 3
    tokens = num_rows // 2 + 1 if gathered else num_rows
    x, grad = randn(tokens, dim, dtype=dtype, seed=1), randn(num_rows, outer, dtype=dtype, seed=2)
    weight = randn(len(counts), outer, dim, dtype=dtype, seed=3)
    rows = torch.randint(tokens, (num_rows,), generator=torch.Generator().manual_seed(4)) if gathered else None
    biases = randn(len(counts), outer, dtype=dtype, seed=5) if bias else None
    counts = torch.tensor(counts)
    y = grouped_matmul.multiply_rows(x, weight, counts, rows=rows, bias=biases)
    grad_rows = grouped_matmul.multiply_rows(grad, weight, counts, transposed=True)
    grads = grouped_matmul.multiply_columns(grad, x, counts, rows=rows, bias=bias)
    return [y, combine.combine_ragged(grad_rows, rows, tokens) if gathered else grad_rows, *grads]


def _small_grouped_matmul() -> Iterator[Example]:
    for dtype in DTYPES:
        for gathered in (False, True):
            sizes = ([5, 0, 33, 1], 19, 21, dtype)
            label = f"{'gathered, ' * gathered}{name_of(dtype)}"
            yield Example(label, lambda a=sizes, g=gathered: run_grouped_matmul(*a, gathered=g, bias=g))
    several = ([5, 0, 33, 1], 70, 130, torch.float32)  # tiles along both sides
    yield Example("several tiles", lambda: run_grouped_matmul(*several, gathered=True, bias=True))


def _matrix_grouped_matmul(target: str, dtype: torch.dtype) -> Iterator[Example]:
    kernel = "float32 multiply_rows" if dtype == torch.float32 else "multiply_rows"
    for rows in sorted(TILES[target][kernel]):
        for dim, outer in ((256, 64), (512, 1024), (130, 70)):
            for more in (False, True):
                sizes = ([4 * rows] * 4, dim, outer, dtype)
                label = f"D {dim}, O {outer}, {rows} rows" + ", gathered, bias" * more
                yield Example(label, lambda a=sizes, m=more: run_grouped_matmul(*a, gathered=m, bias=m))


def run_sort(tokens: int, num_experts: int, top_k: int, how: str) -> list[Tensor]:
    places, counts = sort.sort_slots(_ids(tokens, num_experts, top_k, how), num_experts)
    return [places[:, : tokens * top_k], counts]


def _small_sort() -> Iterator[Example]:
    for sizes in ((40, 5, 2, "unused"), (700, 7, 3, "skewed"), (300, 60, 8, "random"), (9, 4, 1, "one")):
        yield Example(f"T {sizes[0]}, E {sizes[1]}, {sizes[3]}", lambda a=sizes: run_sort(*a))


def _matrix_sort(target: str, dtype: torch.dtype) -> Iterator[Example]:
    if dtype == torch.float32:  # there is no other
        for tokens in (8, 4096):
            for num_experts in (8, 60, 128, 256, 1024):
                sizes = (tokens, num_experts, 4, "random")
                yield Example(f"T {tokens}, E {num_experts}", lambda a=sizes: run_sort(*a))


def run_routing(
    tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, *, masked: bool, groups: int, settings: Sequence
) -> list[Tensor]:
    """settings: score, order, normalize, scale."""
    logits = randn(tokens, num_experts, dtype=dtype, seed=1)
    bias = randn(num_experts, dtype=torch.float32, seed=2) if masked else None
    mask = randn(tokens, dtype=torch.float32, seed=3) > -1 if masked else None
    group = (groups, max(groups // 2, 1), "top2_sum" if masked else "max")
    weights, ids = routing.route_topk(logits, bias, mask, top_k, *settings, *group)
    grad = randn(tokens, top_k, dtype=torch.float32, seed=4)
    return [weights, ids, routing.route_topk_backward(grad, logits, ids, *settings)]


_SETTINGS = (("softmax", "before", True, 1.0), ("sigmoid", "before", True, 2.5), ("softmax", "after", False, 1.0))


def _small_routing() -> Iterator[Example]:
    for settings in _SETTINGS:
        for masked in (False, True):
            more = {"masked": masked, "groups": 4 if masked else 1, "settings": settings}
            label = f"{settings[0]} {settings[1]}" + ", groups, mask" * masked
            yield Example(label, lambda s=more: run_routing(37, 20, 3, torch.float32, **s))


def _matrix_routing(target: str, dtype: torch.dtype) -> Iterator[Example]:
    for num_experts in (8, 64, 256, 1024):
        for top_k in (1, 8, 16):
            for settings in _SETTINGS:
                groups = 8 if settings[0] == "sigmoid" and num_experts > 16 else 1
                more = {"masked": groups > 1, "groups": groups, "settings": settings}
                sizes = (64, num_experts, min(top_k, num_experts), dtype)
                label = f"E {num_experts}, K {top_k}, {settings[0]} {settings[1]}"
                yield Example(label, lambda a=sizes, s=more: run_routing(*a, **s))


def run_delta_rule(
    ends: Sequence[int] | None,
    sequences: int,
    length: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    *,
    edit: str,
    decay: str,
) -> list[Tensor | None]:
    """Forward and backward; heads: of values and of keys; edit: "none", "beta", "erase"; decay: "none", "heads",
    "channels". ends: of packed sequences."""
    (heads, key_heads), (key_width, value_width) = heads, widths
    tokens = sequences * length if ends is None else ends[-1]
    q, k, erase = (randn(tokens, key_heads, key_width, dtype=dtype, seed=seed) / key_width**0.5 for seed in (1, 2, 3))
    v, grad = (randn(tokens, heads, value_width, dtype=dtype, seed=seed) for seed in (4, 5))
    channels = (key_width,) if decay == "channels" else ()
    g = None if decay == "none" else -randn(tokens, heads, *channels, dtype=torch.float32, seed=6).abs()
    beta = randn(tokens, heads, dtype=dtype, seed=7).sigmoid() if edit == "beta" else None
    edits = (g, erase if edit == "erase" else None, beta)
    states = len(ends) - 1 if ends is not None else sequences
    before, grad_after = (
        randn(states, heads, key_width, value_width, dtype=torch.float32, seed=seed) for seed in (8, 9)
    )
    ends = None if ends is None else torch.tensor(ends)
    scale = key_width**-0.5
    o, after, *kept = delta_rule.forward(q, k, v, *edits, before, ends, scale)
    grads = delta_rule.backward(grad, grad_after, q, k, v, *edits, before, ends, *kept, scale)
    return [o, after, *grads]


_EDITS, _DECAYS = ("none", "beta", "erase"), ("none", "heads", "channels")


def _small_delta_rule() -> Iterator[Example]:
    packed = [0, 7, 7, 40, 41, 60]
    for edit, decay in product(_EDITS, _DECAYS):
        more = {"edit": edit, "decay": decay}
        for label, ends, sizes in (
            ("packed", packed, (0, 0, (2, 1), (9, 5), torch.bfloat16)),
            ("several tiles", None, (1, 37, (1, 1), (33, 35), torch.float32)),
        ):
            name = f"{label}, {edit}, decay {decay}"
            yield Example(name, lambda e=ends, a=sizes, m=more: run_delta_rule(e, *a, **m))
    more = {"edit": "beta", "decay": "heads"}
    yield Example("no token", lambda: run_delta_rule(None, 2, 0, (2, 1), (9, 5), torch.bfloat16, **more))
    yield Example("float16", lambda: run_delta_rule(None, 1, 70, (1, 1), (20, 20), torch.float16, **more))
    for edit, decay in (("erase", "heads"), ("none", "channels")):
        more = {"edit": edit, "decay": decay}
        sizes = (None, 1, 4 * 8 * 16 + 5, (1, 1), (9, 5), torch.float32)
        yield Example(f"segments, {edit}, decay {decay}", lambda a=sizes, m=more: run_delta_rule(*a, **m))


def _matrix_delta_rule(target: str, dtype: torch.dtype) -> Iterator[Example]:
    """Classes come from P. At the usual ones every mode; elsewhere, and in other dtypes, what needs most registers.

    From P = 128 on, float32 and decays by channel have no tile that spills nowhere: theirs spill least. Tiles are
    chosen without segments, with which a few spill up to 48 bytes.
    """
    every = list(product(_EDITS, _DECAYS))
    most = [("beta", "heads"), ("erase", "channels")]
    for width in (64,) if dtype == torch.float16 else (16, 32, 64, 128, 256):
        for edit, decay in every if dtype == torch.bfloat16 and width in (64, 128) else most:
            packed = edit == "erase"
            ends, key_heads = ([0, 100, 128], 1) if packed else (None, 2)
            sizes = (ends, 1, 128, (2, key_heads), (width, width), dtype)
            more = {"edit": edit, "decay": decay}
            label = f"P = V = {width}, {edit}, decay {decay}" + ", packed" * packed
            may_spill = width >= 128 and (dtype == torch.float32 or decay == "channels")
            yield Example(label, lambda a=sizes, m=more: run_delta_rule(*a, **m), may_spill)
        for edit, decay in (("none", "heads"), ("beta", "heads")):
            sizes = (None, 1, 2048, (1, 1), (width, width), dtype)
            more = {"edit": edit, "decay": decay}
            label = f"P = V = {width}, {edit}, decay {decay}, segments"
            yield Example(label, lambda a=sizes, m=more: run_delta_rule(*a, **m), may_spill=True)


CATALOG = (
    Entry("sort", _small_sort, _matrix_sort),
    Entry("routing", _small_routing, _matrix_routing),
    Entry("grouped_matmul", _small_grouped_matmul, _matrix_grouped_matmul, ("_multiply_rows", "_multiply_columns")),
    Entry(
        "expert_mlp",
        _small_expert_mlp,
        _matrix_expert_mlp,
        ("forward_kernel", "backward_kernel", "multiply_mlp_columns", "_multiply_rows"),
    ),
    Entry(
        "delta_rule",
        _small_delta_rule,
        _matrix_delta_rule,
        ("forward_kernel", "backward_kernel", "gradients_kernel", "channel_gradients_kernel"),
    ),
    Entry(
        "sparse_attention",
        small_sparse_attention,
        matrix_sparse_attention,
        ("forward_kernel", "query_gradients_kernel", "key_gradients_kernel"),
    ),
)
