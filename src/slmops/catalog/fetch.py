"""Bring an existing model into the store: from a local folder, or from the Hugging Face hub.

Promises: only safetensors weights are taken (a pickle can run code when it is loaded), no code of the repository is
run, and what comes out has a config that parses and a tokenizer beside it.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from slmops.catalog.hub import Hub
from slmops.catalog.pull import adopt, gather, listed
from slmops.catalog.source import hub as parse_hub
from slmops.catalog.transfer import Pace
from slmops.core import forms, method, pruning, runtimes
from slmops.core.method import Context, Declaration, Facts
from slmops.core.spec import Prune
from slmops.errors import ConversionError, ModelError

DECLARATION = Declaration(name="catalog.fetch", version="1", makes="model", takes={"model?": "folder"})

PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "LICENSE*")


class Params(method.Params):
    """`model`: the folder's name, or `hf:ORG/NAME[@REVISION]`; `runtime`: what it is converted for later, if anything; `gguf`: whether
    it will be GGUF too; `formats`: what other formats it will be in; `prune`: what is taken out of it before; `ternary`: whether its
    layers are trained ternary."""

    model: str
    runtime: Literal["onnx_genai"] | None = None
    gguf: bool = False
    formats: tuple[str, ...] = ()
    prune: Prune | None = None
    ternary: bool = False


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Copy or download the model folder into `out`.

    Raises:
        ModelError: not there, no safetensors, no tokenizer, or the hub cannot be reached.
        ConversionError: the runtime cannot take it.
    """
    if "model" in inputs:
        source = inputs["model"]
        if not source.is_dir():
            raise ModelError(f"{source} is not a folder", "give the folder that holds config.json")
    else:
        source = _download(params.model, ctx)
    config = _check(source, params.model)
    refusal = pruning.refusal(config, params.prune) if params.prune else None
    if params.prune and not refusal:
        config = pruning.pruned(config, params.prune)
    refusal = refusal or (runtimes.onnx_genai(config) if params.runtime else None)
    for name in (*(["gguf"] if params.gguf else []), *params.formats):
        refusal = refusal or forms.FORMATS[name].refuse(config)
    refusal = refusal or (runtimes.ternary(runtimes.ternary_widths(config)) if params.ternary else None)
    if refusal:
        raise ConversionError(f"{params.model}: {refusal.message}", refusal.hint)
    taken = sorted({path for pattern in PATTERNS for path in source.glob(pattern) if path.is_file()})
    for path in taken:
        shutil.copyfile(path.resolve(), out / path.name)
    return {"model": params.model, "files": len(taken), "bytes": sum(path.stat().st_size for path in out.iterdir())}


def _check(source: Path, name: str) -> dict[str, Any]:
    """Its configuration."""
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
    _check_weights([path.name for path in source.iterdir()], name)
    parts = _parts(source / "model.safetensors.index.json", name)
    missing = sorted(part for part in parts if not (source / part).is_file())
    if missing:
        raise ModelError(f"{name}: {', '.join(missing[:3])} of its weights missing", "fetch the model again")
    if not (source / "tokenizer.json").is_file():
        raise ModelError(f"{name}: there is no tokenizer.json in it", "save the tokenizer beside the model")
    return value


def _check_weights(names: Sequence[str], name: str) -> None:
    if any(file.endswith(".safetensors") for file in names):
        return
    pickles = any(file.endswith((".bin", ".pt", ".pth")) for file in names)
    hint = "convert it to safetensors first: a pickle can run code when it is loaded" if pickles else "fetch it whole"
    raise ModelError(f"{name}: no safetensors weights in it", hint)


def _parts(index: Path, name: str) -> set[str]:
    """The files that the index of split weights names; none where there is no index."""
    if not index.is_file():
        return set()
    try:
        return {str(part) for part in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{name}: {index.name} does not name its files", "fetch the model again") from None


def _download(name: str, ctx: Context) -> Path:
    """The model's files from one commit, in the step's scratch folder: a download that was cut goes on there."""
    origin, pace, source = Hub(), Pace(), parse_hub(name)
    listing = listed(origin, source, pace)
    names = [file.name for file in listing.files if "/" not in file.name]
    _check_weights(names, name)
    wanted = [
        file for file in listing.files if file.name in names and any(fnmatch.fnmatch(file.name, p) for p in PATTERNS)
    ]
    ctx.progress.start(f"downloading {name}", sum(file.size for file in wanted), "bytes")
    one_at_a_time = threading.Lock()

    def moved(count: int, file: str) -> None:
        with one_at_a_time:
            ctx.progress.advance(count, file)

    adopt(source, ctx.scratch / "hub" / "blobs")
    tree = gather(origin, listing, wanted, ctx.scratch / "hub", pace, moved)
    ctx.progress.stop()
    return tree
