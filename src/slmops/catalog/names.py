"""What a user's word for a model means: by its form, and by the catalogue where the form says too little.

Promises: nothing is asked of any service, and nothing is guessed between several: a bare name of the catalogue is that model on the
hub, a bare name of Ollama's library is its one tag that the catalogue knows, and everything else is a question back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from slmops.catalog.models import Model, load
from slmops.catalog.source import AZURE_REGISTRY, Source, parse
from slmops.errors import ModelError


def resolve(text: str) -> tuple[Source, str]:
    """The source, and what the catalogue had to do with it, in words; "" where nothing.

    Raises:
        ModelError: it names nothing, or several models.
    """
    bare = not set(text) & set("/:@\\") and text not in (".", "..") and not text.startswith("~")
    if bare and not Path(text).exists():
        return _bare(text, load())
    source = parse(text)
    if source.kind == "azure":
        return _azure(source, load())
    if source.kind == "ollama" and source.name.startswith("library/"):
        tag = f"{source.name.removeprefix('library/')}:{source.revision}"
        model = next((model for model in load().values() if model.ollama == tag), None)
        if model is not None:
            return (
                source,
                f"{tag} of Ollama's library: {model.name} of the catalogue, as GGUF (hf:{model.hub} is the original)",
            )
    return source, ""


def _bare(text: str, models: Mapping[str, Model]) -> tuple[Source, str]:
    wanted = text.lower()
    model = models.get(wanted)
    if model is not None:
        also = f" (as GGUF: ollama:{model.ollama})" if model.ollama else ""
        return Source("hub", model.hub), f"{text} of the catalogue: hf:{model.hub}{also}"
    tags = sorted(
        model.ollama for model in models.values() if model.ollama and model.ollama.partition(":")[0] == wanted
    )
    if len(tags) == 1:
        source = parse(f"ollama:{tags[0]}")
        return source, f"{text} of Ollama's library: {source}, the one tag of it in the catalogue"
    if tags:
        raise ModelError(
            f"several of Ollama's library are {text}: {', '.join(tags)}",
            f"name one, or take what Ollama takes: ollama:{text}",
        )
    close = sorted(name for name in models if wanted in name)[:5]
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ModelError(
        f"{text} is neither a path nor a model of the catalogue",
        f"{hint}write hf:ORG/NAME, NAME:TAG or ollama:NAME, oci:REGISTRY/REPOSITORY:TAG or azure:NAME",
    )


def _azure(source: Source, models: Mapping[str, Model]) -> tuple[Source, str]:
    """A name of the catalogue, of the hub or of Ollama as Foundry's; names of Foundry in its own spelling."""
    registry, _, name = source.name.partition("/")
    for model in models.values():
        own = (model.name, model.hub.lower(), model.hub.lower().rpartition("/")[2], (model.azure or "").lower())
        if registry != AZURE_REGISTRY or name.lower() not in own:
            continue
        if model.azure is None:
            return source, f"{name} has no name in Azure AI Foundry that the catalogue knows: asking for it as it is"
        if model.azure == name:
            return source, ""
        found = dataclasses.replace(source, name=f"{registry}/{model.azure}")
        return found, f"{name} of the catalogue: {model.azure} in Azure AI Foundry"
    return source, ""
