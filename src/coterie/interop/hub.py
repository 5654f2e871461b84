"""A Transformer whose folder may be a repository of the Hugging Face Hub: coterie's own files, nothing pickled."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch

from coterie.models import Transformer
from coterie.models.pretrained import CONFIG_FILE, WEIGHTS_FILE
from coterie.report.model_card import CARD_FILE, write_model_card


class HubTransformer(Transformer):
    """`Transformer` with what huggingface_hub's PyTorchModelHubMixin offers, and a model card with every save.

    The files are those of `Transformer`: checksummed safetensors, written whole or not at all, and refused if they are
    of another model. transformers reads them too, see `CoterieForCausalLM`.
    """

    def save_pretrained(self, path: str | os.PathLike, *, facts: Mapping[str, object] | None = None) -> None:
        """Write config.json, model.safetensors and a README.md to the folder `path`.

        Args:
            path: the folder.
            facts: more rows of the card's table, see `coterie.report.model_card`. A README.md of yours stays.
        """
        super().save_pretrained(path)
        write_model_card(path, self.config, dtype=self.embedding.weight.dtype, facts=facts)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "HubTransformer":
        """The model in a folder, or in a repository of the Hub, whose files are downloaded once.

        Args:
            path: a folder, or a repository's name, "owner/name"; a folder of that name comes first.
            revision: branch, tag or commit of a repository.
            token, cache_dir, force_download, local_files_only: of a download, as in huggingface_hub.
            device, dtype: as in `Transformer.from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: as `Transformer.from_pretrained` does; a revision of a folder.
            ImportError: huggingface_hub is not installed (pip install 'coterie[hf]').
        """
        folder = path
        if os.path.isdir(path):
            if revision is not None:
                raise ValueError(f"revision is of a repository, and {path} is a folder; got {revision!r}")
        elif isinstance(path, str) and not path.startswith((".", "~", os.sep)):
            folder = _hub().snapshot_download(
                path,
                revision=revision,
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        return super().from_pretrained(folder, device=device, dtype=dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        commit_message: str = "Upload a coterie model",
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        facts: Mapping[str, object] | None = None,
    ) -> str:
        """Upload the model to a repository of the Hub, which is made if it is not there, in one commit.

        Args:
            repo_id: "owner/name".
            revision: the branch; None: main.
            commit_message, private, token, create_pr: as in huggingface_hub.
            facts: more rows of the card's table. A README.md of yours in the repository stays.

        Returns:
            The commit's address.

        Raises:
            ImportError: huggingface_hub is not installed (pip install 'coterie[hf]').
        """
        api = _hub().HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            if api.file_exists(repo_id, CARD_FILE, revision=revision):
                api.hf_hub_download(repo_id, CARD_FILE, revision=revision, local_dir=folder)
            self.save_pretrained(folder, facts=facts)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=Path(folder),
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE],
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hub needs huggingface_hub: pip install 'coterie[hf]'") from error
    return huggingface_hub
