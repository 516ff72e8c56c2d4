"""Bring an existing model into the store: from a local folder, or from the Hugging Face hub.

Promises: only safetensors weights are taken (a pickle can run code when it is loaded), no code of the repository is
run, and what comes out has a config that parses and a tokenizer beside it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from slmops.core import method
from slmops.core.method import Context, Declaration, Facts
from slmops.errors import MissingExtraError, ModelError

DECLARATION = Declaration(name="catalog.fetch", version="1", makes="model", takes={"model?": "folder"})

PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*")


class Params(method.Params):
    """`model`: the folder's name, or `hf:ORG/NAME[@REVISION]`."""

    model: str


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Copy or download the model folder into `out`.

    Raises:
        ModelError: not there, no safetensors, no tokenizer, or the hub cannot be reached.
    """
    if "model" in inputs:
        source = inputs["model"]
        if not source.is_dir():
            raise ModelError(f"{source} is not a folder", "give the folder that holds config.json")
    else:
        source = _download(params.model, ctx.scratch / "hub")
    _check(source, params.model)
    taken = sorted({path for pattern in PATTERNS for path in source.glob(pattern) if path.is_file()})
    for path in taken:
        shutil.copyfile(path.resolve(), out / path.name)
    return {"model": params.model, "files": len(taken), "bytes": sum(path.stat().st_size for path in out.iterdir())}


def _check(source: Path, name: str) -> None:
    config = source / "config.json"
    if not config.is_file():
        raise ModelError(f"{name}: there is no config.json in it", "give a model in Hugging Face form")
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{name}: config.json is not JSON: {error}", "fetch the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{name}: config.json does not hold a JSON object", "fetch the model again")
    architectures = [str(item) for item in value.get("architectures") or ()]
    if not any("CausalLM" in item or "ConditionalGeneration" in item for item in architectures):
        raise ModelError(
            f"{name}: {architectures or 'no architecture'} does not write text", "give a causal language model"
        )
    if not list(source.glob("*.safetensors")):
        pickles = [path.name for path in source.glob("*.bin")]
        hint = (
            "convert it to safetensors first: a pickle can run code when it is loaded" if pickles else "fetch it whole"
        )
        raise ModelError(f"{name}: no safetensors weights in it", hint)
    if not (source / "tokenizer.json").is_file():
        raise ModelError(f"{name}: there is no tokenizer.json in it", "save the tokenizer beside the model")


def _download(name: str, folder: Path) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub") from None
    repository, _, revision = name.removeprefix("hf:").partition("@")
    try:
        path = snapshot_download(repository, revision=revision or None, allow_patterns=list(PATTERNS), local_dir=folder)
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name}: the hub has no such model, or it needs a login", "check the name; set HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{name}: the hub cannot be reached", "check the network, or give a local folder") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{name}: download failed: {error}", "run again: finished files are kept") from error
    return Path(path)
