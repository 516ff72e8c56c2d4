"""A model as Ollama's library keeps it: GGUF weights, and small layers that say how it is asked.

Promises: beside `model.gguf` stand template, system prompt, parameters, messages and licence as they are published, and a `Modelfile`
that says the same, which `ollama create -f Modelfile` takes. The template is Ollama's own (Go's text/template): llama.cpp, and slmops
through it, use the chat template within the GGUF file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slmops.catalog.hub import File, Listing, plain
from slmops.catalog.registry import Blob, Client, Manifest, Place
from slmops.catalog.source import Source
from slmops.errors import ModelError, RefusedError

HOST, HUGGING_FACE = "registry.ollama.ai", "hf.co"
PREFIX = "application/vnd.ollama.image."
LARGEST_TEXT, LARGEST_TEXTS, MOST_LAYERS = 4 << 20, 8 << 20, 100
NAMES = {"template": "template.txt", "system": "system.txt", "params": "params.json", "messages": "messages.json"}
_LARGE = {"model": "model.gguf", "projector": "mmproj-model.gguf", "adapter": "adapter/adapter.gguf"}
_KEY = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ROLES = ("system", "user", "assistant")
_LICENCES = (
    (r"Apache License\W+Version 2\.0", "Apache License 2.0"), (r"\bMIT License\b", "MIT License"),
    (r"LLAMA ([\d.]+) (?:VERSION|COMMUNITY)", r"Llama \1 Community License"), (r"Gemma Terms of Use", "Gemma Terms of Use"),
)  # fmt: skip


def split(name: str) -> tuple[str, str]:
    """Host and repository of a name: NAMESPACE/NAME, or HOST/NAMESPACE/NAME."""
    head, _, rest = name.partition("/")
    return (head, rest) if rest.count("/") else (HOST, name)


def listing(client: Client, place: Place, manifest: Manifest, source: Source) -> Listing:
    """The files of an image. Small layers are read now, since licence and `Modelfile` are made of them.

    Raises:
        ModelError: its weights are not GGUF, or a layer is of a kind that is not known.
    """
    name = str(source)
    _refuse_many(manifest, name)
    config = _json(client.small(place, manifest.config, LARGEST_TEXT, name)) if manifest.config else None
    config = config if isinstance(config, dict) else {}
    form = str(config.get("model_format") or "gguf")
    kinds: dict[str, list[Blob]] = {}
    left = []
    for layer in manifest.layers:
        kind = layer.media.removeprefix(PREFIX)
        if kind in ("tensor", "json") or form != "gguf":
            raise ModelError(
                f"{name}: its weights are {plain(form)} in Ollama's own layout, not GGUF", "name another tag of it"
            )
        if kind in (*_LARGE, *NAMES, "license"):
            kinds.setdefault(kind, []).append(layer)
        else:
            left.append((f"sha256:{layer.digest[:12]}", f"a layer of kind {plain(layer.media)}, which is not known"))
    if "model" not in kinds:
        raise ModelError(
            f"{name}: there are no weights in it",
            "a model that runs in Ollama's cloud alone has none; name another tag",
        )
    files = [
        File(called, layer.size, "sha256", layer.digest)
        for kind, plainly in _LARGE.items()
        for called, layer in _numbered(plainly, kinds.get(kind, ()))
    ]
    texts: dict[str, list[str]] = {}
    for kind in (*NAMES, "license"):
        for called, layer in _numbered(NAMES.get(kind, "LICENSE"), kinds.get(kind, ())):
            body = client.small(place, layer, LARGEST_TEXT, name)
            texts.setdefault(kind, []).append(body.decode("utf-8", "replace"))
            files.append(File(called, layer.size, "sha256", layer.digest))
    made = modelfile(name, files, texts).encode()
    files.append(File("Modelfile", len(made), "sha256", client.keep(made)))
    beside = frozenset(file.name for file in files if not file.name.startswith("model"))
    licence = ", ".join(dict.fromkeys(licence_name(text.encode()) for text in texts.get("license", ())))
    about = [
        str(config[key]) for key in ("model_family", "model_type", "file_type") if isinstance(config.get(key), str)
    ]
    return Listing(
        source, manifest.digest, tuple(files), plain(licence) or None, about=plain(", ".join(about)), beside=beside, left=tuple(left)
    )  # fmt: skip


def _refuse_many(manifest: Manifest, name: str) -> None:
    """Refuse what would fill the memory: small layers are read before anybody is asked."""
    kinds = [(layer.media.removeprefix(PREFIX), layer.size) for layer in manifest.layers]
    count = sum(kind != "tensor" and kind != "json" for kind, _size in kinds)  # refused by their kind
    if count > MOST_LAYERS:
        raise RefusedError(f"{name}: {count} layers, where a model has a few", "do not use this model")
    total = sum(size for kind, size in kinds if kind in NAMES or kind == "license")
    if total > LARGEST_TEXTS:
        raise RefusedError(f"{name}: {total} bytes of texts, where a few are usual", "do not use this model")


def _numbered(called: str, layers: Sequence[Blob]) -> list[tuple[str, Blob]]:
    """Names for layers of one kind: weights in parts as llama.cpp names them, others with numbers."""
    if len(layers) == 1:
        return [(called, layers[0])]
    stem, dot, end = called.rpartition(".")
    if called == _LARGE["model"]:
        return [(f"model-{k:05}-of-{len(layers):05}.gguf", layer) for k, layer in enumerate(layers, 1)]
    names = [called, *(f"{stem}-{k}.{end}" if dot else f"{called}-{k}" for k in range(2, len(layers) + 1))]
    return list(zip(names, layers, strict=False))


def modelfile(name: str, files: Sequence[File], texts: Mapping[str, Sequence[str]]) -> str:
    """What `ollama create` reads, with the files beside it. A text that cannot be quoted there is named instead."""
    names = {file.name for file in files}
    lines = [f"# {name}, as it was published", f"FROM ./{min(n for n in names if n.startswith('model'))}"]
    lines += [f"FROM ./{n}" for n in sorted(names) if n.startswith("mmproj")]
    lines += [f"ADAPTER ./{n}" for n in sorted(names) if n.startswith("adapter/")]
    for kind, word in (("template", "TEMPLATE"), ("system", "SYSTEM"), ("license", "LICENSE")):
        lines += [_line(word, text, NAMES.get(kind, "LICENSE")) for text in texts.get(kind, ())]
    for text in texts.get("params", ()):
        params = _json(text)
        for key, value in params.items() if isinstance(params, dict) else ():
            for item in value if isinstance(value, list) else [value]:
                sound = _KEY.fullmatch(key)
                lines.append(_line(f"PARAMETER {key}", item, NAMES["params"]) if sound else _see("PARAMETER", "params"))
    for text in texts.get("messages", ()):
        messages = _json(text)
        for message in messages if isinstance(messages, list) else ():
            if isinstance(message, dict):
                role, said = message.get("role"), str(message.get("content"))
                lines.append(
                    _line(f"MESSAGE {role}", said, NAMES["messages"]) if role in _ROLES else _see("MESSAGE", "messages")
                )
    return "\n".join(lines) + "\n"


def _see(word: str, kind: str) -> str:
    """Instead of an instruction whose own name is not one that Ollama knows: it could be any other instruction."""
    return f"# {word}: see {NAMES[kind]}"


def _line(word: str, value: Any, file: str) -> str:
    """One instruction. Texts stand in quotes as they are, since Ollama knows no escapes."""
    if not isinstance(value, str):
        return f"{word} {json.dumps(value)}"
    if not word.startswith("PARAMETER") or set(value) & set('"\n\r'):
        return f'{word} """{value}"""' if '"""' not in value and not value.endswith('"') else f"# {word}: see {file}"
    return f'{word} "{value}"'


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def licence_name(text: bytes) -> str:
    """The name of a licence by its text: one that is known, else its first line."""
    words = text.decode("utf-8", "replace")
    for pattern, called in _LICENCES:
        if match := re.search(pattern, " ".join(words[:3000].split()), re.IGNORECASE):
            return match.expand(called)
    return next((line.strip()[:100] for line in words.splitlines() if line.strip()), "")
