import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie.models import Transformer, load_lora, save_lora
from coterie.models.pretrained import read_tensors, write_tensors
from coterie.modules import add_lora, lora_parameters, merge_lora, remove_lora, set_adapter

TARGETS = ["experts", "q_proj", "down_proj"]


def learnt(model, rank=3, **settings):
    add_lora(model, rank, **{"targets": TARGETS, **settings})
    for factor in lora_parameters(model, settings.get("name", "default")):
        torch.nn.init.normal_(factor, std=0.2)
    return model


@pytest.fixture
def file(small_model, tmp_path):
    path = tmp_path / "adapters" / "maths.safetensors"
    save_lora(learnt(small_model, name="maths", shared="a", alpha=5.0, rslora=True), path)
    return path


def bare(model):
    twin = Transformer(model.config)
    twin.load_state_dict({name: t for name, t in model.state_dict().items() if ".lora." not in name})
    return twin


def test_round_trip_is_bit_equal(file, small_model):
    ids = torch.arange(20)[None]
    twin = bare(small_model)
    assert not torch.equal(twin(ids).logits, small_model(ids).logits)
    names = load_lora(twin, file)
    assert torch.equal(twin(ids).logits, small_model(ids).logits)
    assert {id(p) for p in twin.parameters() if p.requires_grad} == {id(p) for p in lora_parameters(twin, "maths")}
    assert twin.layers[0].mixer.q_proj.lora.adapters["maths"].settings.rslora
    assert load_file(file).keys() == {f"{name}.{letter}" for name in names for letter in "ab"}
    assert os.listdir(file.parent) == ["maths.safetensors"]
    factors = sum(p.numel() for p in lora_parameters(twin))
    assert factors * 4 < file.stat().st_size < factors * 4 + 12_000  # nothing else is in it


def test_several_under_other_names(file, small_model):
    ids = torch.arange(20).repeat(2, 1)
    load_lora(small_model, file, "again")
    set_adapter(small_model, ["maths", "again"], torch.tensor([0, 1]))
    first, second = small_model(ids).logits
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="already"):
        load_lora(small_model, file)
    with pytest.raises(
        ValueError, match=r"name must say which adapter to save, for the model has \['maths', 'again'\]"
    ):
        save_lora(small_model, file)
    remove_lora(small_model)
    with pytest.raises(ValueError, match="name must say which adapter to save, for the model has none"):
        save_lora(small_model, file)


def test_what_does_not_fit_is_named_and_changes_nothing(file, small_model):
    tensors, metadata = read_tensors(file)
    facts = json.loads(metadata["coterie_lora"])
    twin = bare(small_model)
    before = repr(twin)

    def refused(message, tensors=tensors, **changed):
        write_tensors(file, tensors, {"coterie_lora": json.dumps(facts | changed)})
        with pytest.raises(ValueError, match=message):
            load_lora(twin, file)
        assert repr(twin) == before
        assert all(parameter.requires_grad for parameter in twin.parameters())

    name = "layers.0.mixer.q_proj.weight.a"
    refused(
        r"does not fit the model: of another shape layers\.0\.mixer\.q_proj\.weight\.a \(\[1, 9, 9\], "
        r"the model makes it \[1, 3, 24\]\)",
        {**tensors, name: torch.zeros(1, 9, 9)},
    )
    refused(r"missing layers\.0\.mixer", {key: t for key, t in tensors.items() if key != name})
    refused("unexpected stranger", {**tensors, "stranger": torch.zeros(1)})
    refused(
        r"has no layers\.99\.mixer\.q_proj\.weight \(1 such in all\)",
        matrices=[*facts["matrices"], "layers.99.mixer.q_proj.weight"],
    )
    refused("of another shape", rank=4)
    refused("its version is 2, this coterie reads 1", version=2)
    refused("rank must be an integer of at least 1, got 0", rank=0)
    refused("unexpected keyword argument 'code'", code="os.system")
    refused("name or matrices are not strings", matrices=3)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="no adapter of coterie: its metadata have no 'coterie_lora'"):
        load_lora(twin, file)
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*nowhere"):
        load_lora(twin, file.parent / "nowhere")


def test_damage_is_noticed(file, small_model):
    content = file.read_bytes()
    for kept in (0, 9, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:kept])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            load_lora(bare(small_model), file)
    changed = bytearray(content)
    changed[-1] ^= 0x55
    file.write_bytes(changed)
    with pytest.raises(ValueError, match="corrupted"):
        load_lora(bare(small_model), file)


class _Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_refused_and_not_run(file, small_model, tmp_path):
    trap = tmp_path / "executed"
    file.write_bytes(pickle.dumps(_Trap(trap)))
    with pytest.raises(ValueError, match="is pickled"):
        load_lora(bare(small_model), file)
    assert not trap.exists()


def test_a_killed_save_leaves_the_old_file(file):
    """The process dies between the write and the rename."""
    script = (
        "import os, sys\n"
        "from coterie.models import save_lora\n"
        "from coterie.modules import MoE, add_lora\n"
        "moe = MoE(4, 3, 2, 1)\n"
        "add_lora(moe, 2)\n"
        "os.replace = lambda *_: os._exit(9)\n"
        "save_lora(moe, sys.argv[1])\n"
    )
    before = file.read_bytes()
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, check=False)
    assert done.returncode == 9, done.stderr
    assert file.read_bytes() == before


def test_a_model_is_not_saved_with_adapters_in_it(file, small_model, tmp_path):
    ids = torch.arange(20)[None]
    beside = small_model(ids).logits
    with pytest.raises(ValueError, match="the model has adapters: save them with save_lora"):
        small_model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    merge_lora(small_model)
    remove_lora(small_model)
    small_model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(Transformer.from_pretrained(tmp_path / "model")(ids).logits, beside)
