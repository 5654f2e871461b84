"""The Hub, played by folders: what is uploaded, what is asked for, and that both are the plain model's files."""

import inspect
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import coterie
from coterie.interop import HubTransformer
from coterie.report import model_card

hub = pytest.importorskip("huggingface_hub")

CONFIG = coterie.TransformerConfig(
    vocab_size=64, dim=16, num_layers=2, num_heads=2, num_experts=4, top_k=2, expert_hidden_dim=8, max_length=32
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HubTransformer(CONFIG)


def checked(real, played):
    """The played function, called only as the real one can be."""

    def call(*args, **kwargs):
        inspect.signature(real).bind(*args, **kwargs)
        return played(*args, **kwargs)

    return call


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder for every repository, and what was asked for."""
    server = SimpleNamespace(folder=tmp_path / "server", asked=[])

    class Api:
        def __init__(self, token=None):
            server.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            (server.folder / repo_id).mkdir(parents=True, exist_ok=True)
            server.asked.append(("create", repo_id, private))
            return hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def file_exists(self, repo_id, name, *, revision):
            return (server.folder / repo_id / name).exists()

        def hf_hub_download(self, repo_id, name, *, revision, local_dir):
            shutil.copy(server.folder / repo_id / name, local_dir)

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, revision, commit_message, create_pr):
            for name in allow_patterns:
                shutil.copy(folder_path / name, server.folder / repo_id)
            server.asked.append(("upload", revision, commit_message, create_pr))
            return "the commit"

    def snapshot_download(repo_id, *, allow_patterns, **settings):
        assert allow_patterns == ["config.json", "model.safetensors"]
        server.asked.append(settings)
        return str(server.folder / repo_id)

    for name in ("create_repo", "file_exists", "hf_hub_download", "upload_folder"):
        monkeypatch.setattr(Api, name, checked(getattr(hub.HfApi, name), getattr(Api, name)))
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", checked(hub.snapshot_download, snapshot_download))
    return server


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_folder_is_the_plain_models_and_has_a_card(model, tmp_path):
    model.save_pretrained(tmp_path, facts={"trained on": "nothing"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (tmp_path / "README.md").read_text("utf-8") == model_card(CONFIG, facts={"trained on": "nothing"})
    again = HubTransformer.from_pretrained(tmp_path)
    assert type(again) is HubTransformer
    assert again.config == CONFIG
    assert same(again, model)
    assert same(coterie.Transformer.from_pretrained(tmp_path), model)
    half = HubTransformer.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert torch.equal(half.embedding.weight, model.embedding.weight.bfloat16())


def test_a_repository_is_uploaded_and_downloaded(model, server):
    assert model.push_to_hub("someone/model", private=True, token="t", create_pr=True) == "the commit"
    assert server.token == "t"
    again = HubTransformer.from_pretrained("someone/model", revision="v1", local_files_only=True)
    assert same(again, model)
    created, uploaded, downloaded = server.asked
    assert created == ("create", "someone/model", True)
    assert uploaded == ("upload", None, "Upload a coterie model", True)
    assert (downloaded["revision"], downloaded["local_files_only"], downloaded["token"]) == ("v1", True, None)


def test_a_repositorys_own_card_stays_and_ours_is_renewed(model, server):
    card = server.folder / "someone" / "model" / "README.md"
    model.push_to_hub("someone/model", facts={"steps": 1})
    model.push_to_hub("someone/model", facts={"steps": 2})
    assert "| steps | 2 |" in card.read_text("utf-8")
    card.write_text("mine")
    model.push_to_hub("someone/model")
    assert card.read_text() == "mine"


def test_what_is_no_repository_is_not_looked_for(server, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        HubTransformer.from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        HubTransformer.from_pretrained("./missing")
    with pytest.raises(ValueError, match=r"revision is of a repository, and .* is a folder; got 'main'"):
        HubTransformer.from_pretrained(tmp_path, revision="main")
    assert server.asked == []


def test_a_damaged_download_is_refused(model, server):
    model.push_to_hub("someone/model")
    (server.folder / "someone" / "model" / "model.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="pickled"):
        HubTransformer.from_pretrained("someone/model")


def test_without_huggingface_hub_folders_work_and_the_hub_says_what_it_needs(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model.save_pretrained(tmp_path)
    assert same(HubTransformer.from_pretrained(tmp_path), model)
    for call in (lambda: HubTransformer.from_pretrained("someone/model"), lambda: model.push_to_hub("someone/model")):
        with pytest.raises(ImportError, match="the Hub needs huggingface_hub: pip install"):
            call()
