"""A coterie model as a folder that transformers has loaded and computed the same logits from."""

import json
import os
from pathlib import Path

import torch

from coterie.interop._byte_vocabulary import END_OF_TEXT, byte_tokens
from coterie.interop._exported import VerificationError, logits_of, optional, position_errors, sample_ids, staging
from coterie.interop.hf_checkpoint import INDEX_FILE, to_hf
from coterie.models.pretrained import CONFIG_FILE
from coterie.models.transformer import Transformer

_TOLERANCE = 1e-4


def export_hf(model: Transformer, path: str | os.PathLike, *, byte_vocabulary: bool = False) -> str:
    """`to_hf`, loaded by transformers and compared before the folder `path` is touched.

    Args:
        model: a coterie model.
        path: the folder; one that holds a checkpoint of transformers gets the new one in its place.
        byte_vocabulary: the tokens are the 256 bytes, 0 between documents, as in `coterie train`; the folder then has
            a tokenizer too.

    Returns:
        What was verified.

    Raises:
        ImportError: transformers 5 is not installed (pip install 'coterie[hf]').
        ValueError: no family of transformers says all the model does, or `path` holds a coterie model.
        VerificationError: transformers computes something else; `path` is as it was.
    """
    optional("transformers", "hf")
    path = Path(path)
    _check_folder(path)
    with staging(path) as folder:
        new = folder / "new"
        to_hf(model, new)
        if byte_vocabulary:
            _write_tokenizer(new)
        verified = _load(model, new, byte_vocabulary)
        if path.exists():
            _replace_files(new, path)
        else:
            os.rename(new, path)
    return f"verified: {verified}"


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"path must be a folder, got {path}")
    config = path / CONFIG_FILE
    try:
        ours = config.exists() and json.loads(config.read_text("utf-8")).get("model_type", "coterie") == "coterie"
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is no model's, and would be overwritten: give another folder") from error
    if ours:
        raise ValueError(f"{path} holds a coterie model, which would be overwritten: give another folder")


def _replace_files(new: Path, path: Path) -> None:
    """Every new file in its place, the config last; weights of an earlier export go."""
    stale = {file.name for file in (*path.glob("model*.safetensors"), path / INDEX_FILE)}
    for file in sorted(new.iterdir(), key=lambda file: file.name == CONFIG_FILE):
        os.replace(file, path / file.name)
        stale.discard(file.name)
    for name in stale:
        (path / name).unlink(missing_ok=True)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    vocabulary = {token: byte for byte, token in enumerate(byte_tokens())}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    GenerationConfig(eos_token_id=0, bos_token_id=0, pad_token_id=0).save_pretrained(folder)


def _load(model: Transformer, folder: Path, byte_vocabulary: bool) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if bar:
            logging.enable_progress_bar()
    input_ids = sample_ids(model, 2, 24)
    with torch.no_grad():
        got = theirs(input_ids).logits
    errors = position_errors(got, logits_of(model, input_ids, torch.float32))
    figures = f"transformers loads it as {type(theirs).__name__}; logits equal to {errors.max():.0e}"
    if not errors.median() <= _TOLERANCE:  # the median, for a rounding may send a token to another expert
        raise VerificationError(f"{figures}, which must be {_TOLERANCE:.0e} at most: it computes something else")
    if byte_vocabulary:
        text = "naïve 😀\n\tdef main():  pass" + "".join(map(chr, range(1, 128)))
        ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
        if bytes(ids) != text.encode():
            raise VerificationError("the tokenizer's ids are not the bytes of a text")
        figures += "; the tokenizer's ids are the bytes"
    return figures
