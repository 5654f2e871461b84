"""coterie's Transformer inside transformers: what goes in and comes out is the plain model's, tool by tool."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache, TrainingArguments  # noqa: E402
from transformers.cache_utils import DynamicSlidingWindowLayer  # noqa: E402

import coterie  # noqa: E402
from _check import relative_error  # noqa: E402
from coterie.interop import CoterieConfig, CoterieForCausalLM, register_hf  # noqa: E402
from coterie.ops import indexer_loss  # noqa: E402
from coterie.report import model_card  # noqa: E402
from coterie.training import Batches, load_corpus  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # v6 renames it
]

CONFIG = coterie.TransformerConfig(
    vocab_size=256,
    dim=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    feed_forwards=("mlp", "moe"),
    hidden_dim=40,
    num_experts=4,
    top_k=2,
    expert_hidden_dim=24,
    shared_hidden_dim=16,
    shared_gate=True,
    router_bias=True,
    expert_bias=True,
    selection_bias=True,
    qk_norm="head",
    rotary_layers=(True, False),
    max_length=64,
    init_std=0.1,
)

HYBRID = replace(CONFIG, mixers=("linear_attention", "linear_attention", "linear_attention", "attention"))
SPARSE = replace(
    CONFIG,
    mixers=("sparse_attention", "sparse_attention", "attention", "sparse_attention"),
    sparse_scorer="nsa",
    sparse_window=2,
    sparse_block_size=2,
    sparse_num_blocks=3,
)
HYBRIDS = {
    "hybrid": HYBRID,
    "no convolution": replace(HYBRID, linear_rule="kda", linear_conv=0),
    "conv of 1": replace(HYBRID, linear_conv=1),
    "nsa": SPARSE,
    "moba, shared": replace(SPARSE, sparse_scorer="moba", sparse_share=2),
    "indexer": replace(SPARSE, sparse_scorer="indexer"),
    "window": replace(SPARSE, sparse_scorer="window"),
}
MODELS = {"attention": CONFIG, **HYBRIDS}


@pytest.fixture(autouse=True)
def _registered():
    register_hf()
    register_hf()  # again is nothing


def make_pair(config=CONFIG, dtype=torch.float32, **kwargs):
    """(plain, wrapped) with the same weights, selection biases included."""
    torch.manual_seed(0)
    plain = coterie.Transformer(config, dtype=dtype)
    for moe in plain.moe_layers():
        if moe.router.selection_bias is not None:
            moe.router.selection_bias.normal_(std=0.1)
    wrapped = CoterieForCausalLM(CoterieConfig.from_transformer(config, **kwargs)).to(dtype)
    wrapped.model.load_state_dict(plain.state_dict())
    return plain, wrapped


def make_ids(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


def left_padding(*lengths):
    longest = max(lengths)
    return torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])


def same_state(wrapped, plain):
    state = wrapped.state_dict()
    assert [name.removeprefix("model.") for name in state] == list(plain.state_dict())
    return all(torch.equal(state[f"model.{name}"], t) for name, t in plain.state_dict().items())


# --- the config and the registration ---


def test_the_config_has_the_fields_of_ours_and_the_names_that_tools_read():
    config = CoterieConfig.from_transformer(CONFIG)
    assert {field.name for field in fields(coterie.TransformerConfig)} <= {field.name for field in fields(config)}
    assert config.to_transformer() == CONFIG
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 4, 4)
    assert (config.num_key_value_heads, config.num_experts_per_tok, config.max_position_embeddings) == (2, 2, 64)
    assert config.tie_word_embeddings is True
    assert CoterieConfig.from_dict(config.to_dict()).to_transformer() == CONFIG
    # A list from JSON, and a whole number where a float is declared.
    assert CoterieConfig(**{**CONFIG.to_dict(), "rope_theta": 1000}).feed_forwards == ("mlp", "moe")


def test_a_wrong_config_is_refused_by_name():
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.4"):
        CoterieConfig(**{**CONFIG.to_dict(), "top_k": 5})
    with pytest.raises(TypeError, match="vocab_size"):
        CoterieConfig(dim=32, num_layers=1, num_heads=2)


def test_the_auto_classes_know_it():
    config = AutoConfig.for_model("coterie", **CONFIG.to_dict())
    assert type(config) is CoterieConfig
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is CoterieForCausalLM
    torch.manual_seed(3)
    assert same_state(model, coterie.Transformer(CONFIG))  # drawn once, by our rule


def test_generation_does_not_read_the_experts_top_k():
    _, model = make_pair(eos_token_id=3)
    assert model.generation_config.top_k is None
    assert model.generation_config.max_length is None
    assert model.generation_config.eos_token_id == 3


# --- the forward ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_logits_and_gradients_are_the_plain_models(tied, padding):
    plain, wrapped = make_pair(replace(CONFIG, tie_embeddings=tied))
    ids = make_ids(3, 9)
    mask = None if padding is None else left_padding(9, 5, 2)
    mask = mask.flip(-1) if padding == "right" else mask
    wanted = plain(ids, token_mask=None if mask is None else mask.bool()).logits
    got = wrapped(ids, attention_mask=mask).logits
    assert torch.equal(got, wanted)
    for logits in (wanted, got):
        (logits.square() if mask is None else logits[mask.bool()].square()).mean().backward()
    grads = {name.removeprefix("model."): p.grad for name, p in wrapped.named_parameters()}
    assert grads.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(grads[name], parameter.grad), name


def test_a_mask_of_ones_is_no_mask():
    _, model = make_pair()
    ids = make_ids(2, 7)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


def test_bfloat16():
    plain, model = make_pair(dtype=torch.bfloat16)
    ids = make_ids(2, 9)
    assert model.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())  # the selection biases
    output = model(ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16
    assert torch.equal(output.logits, plain(ids).logits)
    assert torch.equal(output.loss, F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))


def test_the_loss_is_of_shifted_labels():
    plain, model = make_pair()
    ids = make_ids(2, 9)
    labels = ids.masked_fill(make_ids(2, 9) < 60, -100)
    wanted = F.cross_entropy(plain(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.equal(model(ids, labels=labels).loss, wanted)


def test_losses_of_micro_batches_add_up():
    _, model = make_pair(router_aux_loss_coef=0.5)
    ids = make_ids(4, 9)
    labels = ids.clone()
    labels[0, :6] = -100
    count = (labels[:, 1:] != -100).sum()
    parts = [model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=count) for i in (0, 2)]
    shares = [(labels[i : i + 2, 1:] != -100).sum() / count for i in (0, 2)]
    auxiliary = sum(share * part.aux_loss for share, part in zip(shares, parts, strict=True))
    whole = model.eval()(ids, labels=labels).loss  # cross entropy alone
    assert relative_error(sum(part.loss for part in parts), whole + 0.5 * auxiliary) < 1e-6


def test_the_routers_loss_is_in_the_training_loss_and_not_of_padding():
    plain, model = make_pair(router_aux_loss_coef=0.5)
    mask = left_padding(9, 4)
    ids = make_ids(2, 9)
    labels = ids.masked_fill(mask == 0, -100)
    trained = model(ids, attention_mask=mask, labels=labels)
    wanted = coterie.balance_loss(plain(ids, token_mask=mask.bool()).routings)
    assert torch.equal(trained.aux_loss, wanted)
    evaluated = model.eval()(ids, attention_mask=mask, labels=labels)
    assert torch.equal(trained.loss, evaluated.loss + 0.5 * wanted)
    other = ids.where(mask.bool(), 7)  # what padding contains
    assert torch.equal(model(other, attention_mask=mask, labels=labels).aux_loss, wanted)
    trained.loss.backward()
    assert model.model.layers[1].feed_forward.router.weight.grad.abs().sum() > 0


def test_what_an_indexer_learns_from_is_in_the_training_loss_and_not_of_padding():
    plain, model = make_pair(HYBRIDS["indexer"])
    mask = left_padding(15, 11)
    ids = make_ids(2, 15)
    labels = ids.masked_fill(mask == 0, -100)
    selections = plain(ids, token_mask=mask.bool()).selections
    wanted = sum(indexer_loss(selection, mask.bool()) for selection in selections)
    assert len(selections) == 3
    assert wanted > 0
    trained = model(ids, attention_mask=mask, labels=labels)
    evaluated = model.eval()(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(trained.loss, evaluated.loss + wanted)
    trained.loss.backward()
    assert model.model.layers[0].mixer.indexer.q_proj.weight.grad.abs().sum() > 0


def test_logits_to_keep():
    _, model = make_pair()
    ids = make_ids(2, 9)
    everything = model(ids).logits
    assert relative_error(model(ids, logits_to_keep=2).logits, everything[:, -2:]) < 1e-6
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, everything[:, [1, 4]])


def test_hidden_states_and_router_logits():
    plain, model = make_pair()
    ids = make_ids(2, 9)
    output = model(ids, output_hidden_states=True, output_router_logits=True, logits_to_keep=2)
    assert len(output.hidden_states) == CONFIG.num_layers + 1
    assert torch.equal(output.hidden_states[0], plain.embedding(ids))
    logits = F.linear(output.hidden_states[-1], plain.embedding.weight)
    assert torch.equal(logits, plain(ids).logits)
    assert torch.equal(output.logits, logits[:, -2:])
    for got, routing in zip(output.router_logits, plain(ids).routings, strict=True):
        assert torch.equal(got, routing.logits)
    assert model(ids).hidden_states is None


def test_a_tuple_if_it_is_asked_for():
    _, model = make_pair()
    ids = make_ids(1, 5)
    loss, logits = model(ids, labels=ids, return_dict=False)
    output = model(ids, labels=ids)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for enabled in (False, True):
        _, model = make_pair(router_aux_loss_coef=0.1)
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.model.gradient_checkpointing is model.is_activation_checkpointing is enabled
        ids = make_ids(2, 9)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    model.gradient_checkpointing_disable()
    assert not model.model.gradient_checkpointing


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": None}, ValueError, "input_ids must be given"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, ValueError, "inputs_embeds is not supported"),
        ({"output_attentions": True}, ValueError, "output_attentions is not supported"),
        ({"position_ids": torch.arange(5)}, ValueError, "position_ids is not supported"),
        ({"atention_mask": torch.ones(1, 5)}, TypeError, "no argument 'atention_mask'"),
        ({"attention_mask": torch.ones(1, 4)}, ValueError, r"attention_mask must be .* \(1, 5\), got \(1, 4\)"),
        ({"labels": make_ids(1, 5), "logits_to_keep": 1}, ValueError, "logits_to_keep must be 0"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(arguments, error, message):
    _, model = make_pair()
    with pytest.raises(error, match=message):
        model(**{"input_ids": make_ids(1, 5), **arguments})


def test_what_tokenizers_send_besides_is_passed_over():
    _, model = make_pair()
    ids = make_ids(1, 5)
    assert torch.equal(model(ids, token_type_ids=torch.zeros_like(ids), position_ids=None).logits, model(ids).logits)


def test_reentrant_checkpointing_and_caches_that_do_not_grow_are_refused():
    _, model = make_pair()
    with pytest.raises(ValueError, match="got use_reentrant=True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="got reentrant=False"):
        model.gradient_checkpointing_enable({"reentrant": False})
    with pytest.raises(ValueError, match="a DynamicCache, got StaticCache"):
        model(make_ids(1, 5), past_key_values=StaticCache(config=model.config, max_cache_len=8))


def test_linear_attention_alone_has_no_cache_there():
    plain, model = make_pair(replace(CONFIG, mixers=("linear_attention",), num_kv_heads=None, qk_norm=None))
    ids = make_ids(1, 5)
    with torch.no_grad():
        assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match="use_cache must be False where all mixers are 'linear_attention'"):
        model(ids, use_cache=True)
    wanted = coterie.generate(plain, ids, 8)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False), wanted)


@pytest.mark.parametrize("name", ["hybrid", "nsa"])
def test_a_hybrids_cache_carries_no_gradients(name):
    _, model = make_pair(HYBRIDS[name])
    with pytest.raises(ValueError, match="no gradients"):
        model(make_ids(1, 5), use_cache=True)


# --- generation ---


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 2, 4)])
def test_greedy_tokens_are_those_of_generate(config, use_cache, lengths):
    plain, model = make_pair(config)
    ids, mask = make_ids(len(lengths), 6), left_padding(*lengths)
    wanted = coterie.generate(plain, ids, 12, token_mask=mask.bool(), use_cache=use_cache)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=use_cache)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("config", [CONFIG, HYBRID, *[HYBRIDS[name] for name in ("nsa", "indexer")]])
def test_beams_are_the_same_with_and_without_a_cache(config):
    _, model = make_pair(config)
    ids, mask = make_ids(2, 6), left_padding(6, 3)
    settings = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    cached, anew = (model.generate(ids, attention_mask=mask, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached.sequences, anew.sequences)
    assert relative_error(cached.sequences_scores, anew.sequences_scores) < 1e-5
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert not torch.equal(cached.sequences[::2], greedy)  # the beams did reorder


def test_sampling():
    _, model = make_pair()
    ids = make_ids(2, 6)
    settings = {"max_new_tokens": 8, "do_sample": True}
    runs = []
    for cache in (True, False):
        torch.manual_seed(5)
        runs.append(model.generate(ids, use_cache=cache, top_k=50, **settings))
    assert torch.equal(*runs)
    likeliest = model.generate(ids, top_k=1, **settings)
    assert torch.equal(likeliest, model.generate(ids, max_new_tokens=8, do_sample=False))
    assert not torch.equal(runs[0], likeliest)


def test_assisted_generation_and_continuing_a_cache_are_greedy_too():
    plain, model = make_pair()
    assistant = CoterieForCausalLM(CoterieConfig.from_transformer(replace(CONFIG, num_layers=2)))
    ids = make_ids(1, 6)
    wanted = coterie.generate(plain, ids, 12)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    got = model.generate(ids, assistant_model=assistant, max_new_tokens=12, **settings)
    assert torch.equal(got.sequences, wanted)
    first = model.generate(ids, max_new_tokens=5, **settings)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=7, **settings)
    assert torch.equal(rest.sequences, wanted)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_a_forward_in_pieces_is_the_whole(config):
    _, model = make_pair(config)
    ids, mask = make_ids(2, 9), left_padding(9, 4)
    whole = model(ids, attention_mask=mask, use_cache=False)
    assert whole.past_key_values is None
    past, pieces = None, []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
        past = output.past_key_values
        pieces.append(output.logits)
    assert past.get_seq_length() == 9
    assert relative_error(torch.cat(pieces, 1)[mask.bool()], whole.logits[mask.bool()]) < 1e-5


@torch.no_grad()
def test_blocks_are_kept_in_any_cache_that_grows():
    _, model = make_pair(SPARSE)
    ids = make_ids(2, 9)
    wanted = model(ids, use_cache=False).logits
    bare = DynamicCache()  # made without a config
    logits = torch.cat([model(part, past_key_values=bare).logits for part in ids.split((5, 3, 1), 1)], 1)
    assert relative_error(logits, wanted) < 1e-5
    with pytest.raises(ValueError, match="cannot be taken back"):
        bare.crop(-2)
    bare.reset()
    assert relative_error(model(ids[:, :4], past_key_values=bare).logits, wanted[:, :4]) < 1e-5
    foreign = DynamicCache()
    for layer in range(4):
        foreign.update(*torch.randn(2, 2, 2, 3, 8), layer)
    with pytest.raises(ValueError, match="past_key_values' layer 0 has keys and no blocks"):
        model(ids, past_key_values=foreign)
    sliding = DynamicCache()
    sliding.layers.append(DynamicSlidingWindowLayer(4))
    with pytest.raises(ValueError, match="layer 0 must be a DynamicLayer, got DynamicSlidingWindowLayer"):
        model(ids, past_key_values=sliding)
    with pytest.raises(ValueError, match="guesses cannot be taken back"):
        model.generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=4, do_sample=False)


def test_blocks_of_inference_mode_are_of_use_outside():
    _, model = make_pair(SPARSE)
    ids, cache = make_ids(2, 9), DynamicCache()
    with torch.inference_mode():
        parts = [model(ids[:, :5], past_key_values=cache).logits]
    with torch.no_grad():
        parts += [model(part, past_key_values=cache).logits for part in ids[:, 5:].split(1, 1)]
        wanted = model(ids, use_cache=False).logits
    assert relative_error(torch.cat(parts, 1), wanted) < 1e-5


# --- files ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_either_saves_both_load_bit_for_bit(tied, dtype, tmp_path):
    plain, wrapped = make_pair(replace(CONFIG, tie_embeddings=tied), dtype)
    wrapped.save_pretrained(tmp_path / "wrapped")
    plain.save_pretrained(tmp_path / "plain")
    for folder in (tmp_path / "wrapped", tmp_path / "plain"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is CoterieForCausalLM
        assert same_state(loaded, plain)
        assert loaded.dtype == dtype
        assert all(buffer.dtype == torch.float32 for buffer in loaded.buffers())
        assert loaded.generation_config.top_k is loaded.generation_config.max_length is None
        ours = coterie.Transformer.from_pretrained(folder)
        assert ours.config == plain.config
        assert same_state(loaded, ours)
        half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in half.buffers()} == {torch.float32}


def test_its_own_settings_and_those_of_generation_are_saved(tmp_path):
    _, model = make_pair(router_aux_loss_coef=0.25)
    model.generation_config.eos_token_id = 3
    model.save_pretrained(tmp_path)
    loaded = CoterieForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.router_aux_loss_coef == 0.25
    assert loaded.generation_config.eos_token_id == 3


def test_every_save_has_a_card_and_leaves_yours(tmp_path):
    _, model = make_pair(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert card == model_card(CONFIG, dtype=torch.bfloat16)
    (tmp_path / "README.md").write_text("mine", "utf-8")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == "mine"


@pytest.mark.parametrize("there", [None, "mine"])
def test_the_card_goes_to_the_hub_unless_there_is_one(there, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    _, model = make_pair()
    sent = {}

    def load(repo_id, **_):
        if there is None:
            raise hub.errors.EntryNotFoundError("no card")
        return hub.ModelCard(there)

    class Api:
        def create_repo(self, repo_id, **_):
            return hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def create_commit(self, repo_id, operations, **_):
            sent.update({one.path_in_repo: Path(one.path_or_fileobj).read_text("latin-1") for one in operations})

    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", load)
    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    model.push_to_hub("someone/model")
    assert {"README.md", "config.json", "model.safetensors"} <= sent.keys()
    assert ("Written by coterie" in sent["README.md"]) == (there is None)
    assert ("mine" in sent["README.md"]) == (there is not None)


def test_what_a_checkpoint_lacks_is_drawn(tmp_path):
    _, wrapped = make_pair()
    wrapped.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lacking = [
        "model.layers.1.feed_forward.router.selection_bias",
        "model.layers.1.feed_forward.experts.down_proj",
        "model.layers.0.mixer_norm.weight",
        "model.layers.0.mixer.o_proj.weight",
    ]
    for name in lacking:
        tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    bias, down, norm, output = (state[name] for name in lacking)
    assert bias.eq(0).all()
    assert norm.eq(1).all()
    assert all(abs(drawn.std() / CONFIG.init_std - 1) < 0.1 for drawn in (down, output))
    for name in state.keys() - set(lacking):  # what was there has not been drawn again, in the same modules neither
        assert torch.equal(state[name], wrapped.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows(tied, tmp_path):
    _, model = make_pair(replace(CONFIG, tie_embeddings=tied))
    ids = make_ids(1, 5)
    before = model(ids).logits
    model.resize_token_embeddings(260)
    assert relative_error(model(ids).logits[..., :256], before) < 1e-6
    assert model(torch.tensor([[259]]), labels=torch.tensor([[259]])).logits.shape[-1] == 260
    model.save_pretrained(tmp_path)
    assert coterie.Transformer.from_pretrained(tmp_path).config.vocab_size == 260


# --- transformers' Trainer ---


class Windows(torch.utils.data.Dataset):
    """Bytes of the demo's text, 32 at a time."""

    def __init__(self, count=64):
        batches = Batches(load_corpus(None, "train"), 1, 32, seed=0)
        self.windows = [next(batches)[0][0] for _ in range(count)]

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def make_trainer(folder, model, max_steps=8, **settings):
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 4, "seed": 0}
    defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(folder), max_steps=max_steps, **defaults | settings)
    return transformers.Trainer(model, arguments, train_dataset=Windows())


def test_the_trainer_trains_saves_and_resumes(tmp_path, capsys):
    _, model = make_pair(router_aux_loss_coef=0.01)
    trainer = make_trainer(tmp_path / "whole", model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert trainer.evaluate(Windows(8))["eval_loss"] < losses[0]

    _, again = make_pair(router_aux_loss_coef=0.01)  # interrupted after the checkpoint of step 4
    resumed = make_trainer(tmp_path / "whole", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same_state(again, model.model)
    assert same_state(model, coterie.Transformer.from_pretrained(tmp_path / "whole" / "checkpoint-8"))


def test_the_trainer_accumulates_and_checkpoints_gradients(tmp_path, capsys):
    states = []
    for settings in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ):
        _, model = make_pair()
        make_trainer(tmp_path, model, 2, save_strategy="no", optim="sgd", **settings).train()
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    _, start = make_pair()
    moved = torch.cat([p.detach().flatten() for p in start.parameters()]) - states[0]
    assert relative_error(states[1] - states[0] + moved, moved) < 1e-4


# --- PEFT ---


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_and_merges(tmp_path, checkpointing, capsys):
    peft = pytest.importorskip("peft")
    _, model = make_pair()
    plain_logits = model(make_ids(1, 9)).logits.detach()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    assert any("q_proj" in name for name in trained)
    assert any("experts" in name for name in trained)
    assert torch.equal(adapted(make_ids(1, 9)).logits, plain_logits)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    trainer = make_trainer(tmp_path / "run", adapted, gradient_checkpointing=checkpointing, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < sum(losses[:2])
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name

    ids = make_ids(2, 9)
    wanted = adapted.eval()(ids).logits.detach()
    assert relative_error(wanted[:1], plain_logits) > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    _, base = make_pair()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, wanted)
    merged = loaded.merge_and_unload()
    assert relative_error(merged(ids).logits, wanted) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(coterie.Transformer.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)
