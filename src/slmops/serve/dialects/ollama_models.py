"""Ollama's API: the models that there are, and definitions made of them.

A served model is one that the command line named; it cannot be deleted or replaced from here. Definitions can.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from slmops.engines import find_gguf, gguf_parts, read_json
from slmops.serve import gguf_facts, modelfile, parameters
from slmops.serve.adapters import JOIN
from slmops.serve.definitions import Definition, Definitions, UnknownError, full, short
from slmops.serve.dialects.ollama_options import lines, normal
from slmops.serve.dialects.ollama_shapes import (
    FOREVER,
    Copy,
    Create,
    Named,
    Show,
    line,
    parsed,
    refuse,
    stamp,
)
from slmops.serve.model import Model
from slmops.serve.parameters import Size
from slmops.serve.pool import Found, Pool
from slmops.serve.prompts import written
from slmops.serve.scheduler import RequestError
from slmops.serve.tools import format_of

FORMATS = {"onnx": "onnx", "llama_cpp": "gguf", "torch": "safetensors"}
LONGEST_S = 1e9
"""A model that stays for more than thirty years stays for ever."""
GET_MODELS = "get models with slmops pull, and name them to slmops serve"


@dataclass(frozen=True)
class Facts:
    """What is known of a folder without loading it.

    Attributes:
        size: bytes of its files.
        modified: of the newest, in seconds since 1970.
        digest: of names, sizes and times of its files. Not of their content, which may be gigabytes.
        family: the architecture.
        settings: numbers of it.
        parameters: how many it has, in how many bits.
    """

    size: int
    modified: float
    digest: str
    family: str
    settings: dict[str, Any]
    parameters: Size = field(default_factory=Size)


def facts(folder: Path) -> Facts:
    """Of a model's folder, or of a GGUF file."""
    gguf = folder if folder.is_file() else find_gguf(folder)
    inner = gguf_parts(folder) if folder.is_file() else sorted(folder.rglob("*"))
    top = folder.parent if folder.is_file() else folder
    files = [(file.relative_to(top).as_posix(), file.stat()) for file in inner if file.is_file()]
    marks = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    place = folder / "genai_config.json"
    model = read_json(place).get("model", {}) if place.is_file() else {}
    decoder = model.get("decoder", {})
    names = {
        "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
    }  # fmt: skip
    settings = {ours: decoder[theirs] for ours, theirs in names.items() if theirs in decoder}
    for ours, theirs in (("context_length", "context_length"), ("vocab_size", "vocab_size")):
        if theirs in model:
            settings[ours] = model[theirs]
    family = str(model.get("type", ""))
    if not model and gguf is not None:
        about = gguf_facts.read(gguf_parts(gguf)[0])
        family = str(about.get("general.architecture", ""))
        own = {key.removeprefix(f"{family}."): value for key, value in about.items()}
        settings = {ours: own[ours] for ours in (*names, "context_length") if ours in own}
    elif not model and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        family = str(config.get("model_type", ""))
        keys = {**names, "context_length": "max_position_embeddings", "vocab_size": "vocab_size"}
        settings = {ours: config[key] for ours, key in keys.items() if key in config}
    return Facts(
        sum(stat.st_size for _, stat in files), max((stat.st_mtime for _, stat in files), default=0.0),
        hashlib.sha256(json.dumps(marks).encode()).hexdigest(), family, settings,
    )  # fmt: skip


async def known_of(models: Iterable[Model]) -> dict[Path, Facts]:
    """What is known of the folders of some models, each looked at once, beside the answers that are being given."""
    folders = {model.settings.folder: model.engine for model in models}

    def look(folder: Path) -> Facts:
        found = facts(folder)
        return replace(found, parameters=parameters.known(folder, folders[folder], found.digest))

    return await asyncio.to_thread(lambda: {folder: look(folder) for folder in folders})


class Shelf:
    """The routes about models. Used from one event loop."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def found(self, name: str) -> Found:
        """What a name stands for.

        Raises:
            UnknownError: nothing.
        """
        found = self._pool.resolve(name)
        if found is None:
            definition = self._pool.definitions.get(name) if self._pool.definitions else None
            if definition is not None:
                raise UnknownError(f"model '{name}' not found: it is made of {definition.base}, which is not served")
            raise UnknownError(f"model '{name[:200]}' not found", GET_MODELS)
        return found

    async def choose(self, name: str) -> Found:
        """What a name stands for, with the model that answers now.

        Raises:
            UnknownError: nothing.
        """
        self.found(name)
        found = await self._pool.choose(name)
        if found is None:
            raise UnknownError(f"model '{name[:200]}' not found", GET_MODELS)
        return found

    def _all(self) -> Iterator[tuple[str, Found]]:
        for name in self._pool.names:
            model = self._pool.find(name)
            if model is not None:
                yield tagged(name), Found(model)
        for found in self._pool.defined():
            if found.definition is not None:
                yield found.definition.name, found

    async def tags(self, request: Request) -> Response:
        """`/api/tags`: all models, the newest first."""
        rows = []
        listed = list(self._all())
        all_known = await known_of([found.model for _, found in listed])
        for name, found in listed:
            known = all_known[found.model.settings.folder]
            changed = self._changed(found, known)
            rows.append(
                {
                    "name": name, "model": name, "modified_at": stamp(changed), "size": known.size,
                    "digest": _digest(known, found.definition), "details": details(known, found.definition, found.model),
                }
            )  # fmt: skip
        rows.sort(key=lambda row: str(row["modified_at"]), reverse=True)
        return JSONResponse({"models": rows})

    def _changed(self, found: Found, known: Facts) -> float:
        return found.definition.modified if found.definition else known.modified

    async def ps(self, request: Request) -> Response:
        """`/api/ps`: models that are loaded. `size` is what their process holds in memory, where the system tells."""
        rows = []
        all_known = await known_of([model for model in self._pool if model.ready])
        for model in self._pool:
            known, name = all_known.get(model.settings.folder), tagged(model.settings.name)
            if model.ready and known is not None:
                ends = None if model.left is None or model.left > LONGEST_S else time.time() + model.left
                rows.append(
                    {
                        "name": name, "model": name, "size": _resident(model) or known.size, "digest": known.digest,
                        "details": details(known, None, model), "expires_at": FOREVER if ends is None else stamp(ends), "size_vram": 0,
                        "context_length": model.context_length,
                    }
                )  # fmt: skip
        return JSONResponse({"models": rows})

    async def show(self, request: Request) -> Response:
        """`/api/show`."""
        wanted = await parsed(request, Show)
        found = self.found(wanted.wanted)
        model, definition = found.model, found.definition or Definition("", found.model.settings.name)
        known = (await known_of([model]))[model.settings.folder]
        template = definition.template or model.tokenizer.template
        said = lines(definition.parameters)
        file = modelfile.Modelfile(
            definition.base, tuple(said), definition.template, definition.system, (), definition.licenses,
            definition.messages,
        )  # fmt: skip
        numbers = {f"{known.family}.{name}": value for name, value in known.settings.items()}
        if known.parameters.count is not None:
            numbers["general.parameter_count"] = known.parameters.count
        body: dict[str, Any] = {
            "modelfile": modelfile.write(file), "template": template, "details": details(known, found.definition, found.model),
            "model_info": {"general.architecture": known.family, **numbers}, "capabilities": capabilities(model),
            "modified_at": stamp(self._changed(found, known)),
        }  # fmt: skip
        if said:
            body["parameters"] = "\n".join(f"{name:<30} {value}" for name, value in said)
        if definition.system:
            body["system"] = definition.system
        if definition.licenses:
            body["license"] = "\n".join(definition.licenses)
        if definition.messages:
            body["messages"] = [{"role": role, "content": content} for role, content in definition.messages]
        return JSONResponse(body)

    async def create(self, request: Request) -> Response:
        """`/api/create`: a definition."""
        wanted = await parsed(request, Create)
        name = self._free(wanted.wanted)
        definition = await self._made(name, wanted)
        self._kept().put(definition)
        steps = [f"using {definition.base}", f"writing {name}", "success"]
        if not wanted.stream:
            return JSONResponse({"status": steps[-1]})
        return StreamingResponse(iter([line({"status": step}) for step in steps]), media_type="application/x-ndjson")

    async def _made(self, name: str, wanted: Create) -> Definition:
        for what in ("quantize", "quantization", "files", "path"):
            if getattr(wanted, what):
                hint = "slmops run makes and quantises models; serve the folder and give its name in from"
                raise RequestError(f"{what} is not served: definitions are made of served models", hint)
        file = modelfile.parse(wanted.modelfile) if wanted.modelfile else modelfile.Modelfile("")
        licenses = [wanted.license] if isinstance(wanted.license, str) else wanted.license
        base = wanted.base or file.base
        if not base:
            raise RequestError("from is required", "give the name of a served model")
        source = self._source(base)
        begin = source.definition or Definition(name, source.model.settings.name)
        given = self._parameters(file)
        messages = [(turn.role, turn.plain()["content"]) for turn in wanted.messages]
        made = replace(
            begin,
            name=name,
            parent=base,
            system=wanted.system or file.system or begin.system,
            template=wanted.template or file.template or begin.template,
            licenses=tuple(text for text in licenses if text) or file.licenses or begin.licenses,
            messages=tuple(messages) or file.messages or begin.messages,
            parameters={**begin.parameters, **normal(given), **normal(wanted.parameters)},
            base=self._adapted(begin.base, [*file.adapters, *wanted.adapters]),
            modified=time.time(),
        )
        texts = [made.system, made.template, *made.licenses, *(content for _, content in made.messages)]
        if any(modelfile.QUOTES in text for text in texts):
            raise RequestError('a text cannot hold """', "a Modelfile has no way to write it")
        normal(made.parameters)
        await self._try(made, source.model)
        return made

    def _source(self, base: str) -> Found:
        """What FROM names: a model or a definition, or the folder of a served model.

        Raises:
            UnknownError: nothing that is served.
        """
        if "/" in base and self._pool.resolve(base) is None:
            try:
                place = Path(base).expanduser().resolve()
            except (OSError, RuntimeError, ValueError):  # nobody's home, or no path at all
                return self.found(base)
            for model in self._pool:
                if model.settings.folder.resolve() == place:
                    return Found(model)
        return self.found(base)

    def _adapted(self, base: str, names: list[str]) -> str:
        """The name of a served model with an adapter; without one where none is asked for.

        Raises:
            RequestError: it is served without that one, or several are asked for.
        """
        if len(names) > 1:
            raise RequestError("an answer has one adapter", "give one")
        worn = f"{base}{JOIN}{names[0]}" if names else base
        if self._pool.find(worn) is None:
            raise RequestError(
                f"{base} is served without an adapter {names[0][:200]}", "serve it with one, by its name"
            )
        return worn

    def _parameters(self, file: modelfile.Modelfile) -> dict[str, Any]:
        given: dict[str, Any] = {}
        for name, value in file.parameters:
            if name == "stop":
                given.setdefault(name, []).append(value)
            else:
                given[name] = value
        return given

    async def _try(self, made: Definition, model: Model) -> None:
        """Refuse a definition in which no conversation can be written."""
        await written(Found(model, made), [{"role": "user", "content": "Hello."}])

    async def copy(self, request: Request) -> Response:
        """`/api/copy`: another name for a model."""
        wanted = await parsed(request, Copy)
        source, name = self.found(wanted.source), self._free(wanted.destination)
        begin = source.definition or Definition(name, source.model.settings.name, wanted.source)
        self._kept().put(replace(begin, name=name, modified=time.time()))
        return Response(status_code=200)

    async def delete(self, request: Request) -> Response:
        """`/api/delete`: forget a definition."""
        wanted = await parsed(request, Named)
        name = wanted.wanted
        if self._served(name):
            raise RequestError(f"the model '{name}' is served from a folder", "end slmops serve, and leave it out")
        if self._pool.definitions is None or not self._pool.definitions.delete(name):
            raise UnknownError(f"model '{name[:200]}' not found")
        return Response(status_code=200)

    async def pull(self, request: Request) -> Response:
        """`/api/pull`."""
        raise RequestError("this server gets no models", GET_MODELS)

    async def push(self, request: Request) -> Response:
        """`/api/push`."""
        raise RequestError("this server sends no models anywhere", "slmops bundle makes a folder of one to hand on")

    async def blob(self, request: Request) -> Response:
        """`/api/blobs/DIGEST`: files that are sent to make a model of. None is there, and none is taken."""
        if request.method == "HEAD":
            return Response(status_code=404)
        return refuse(400, f"this server takes no files ({GET_MODELS})")

    def _served(self, name: str) -> bool:
        plain = short(name).lower()
        return any(plain == short(served).lower() for served in self._pool.names)

    def _free(self, name: str) -> str:
        """A name with its tag that a definition can have."""
        tagged = full(name)
        if self._served(tagged):
            raise RequestError(f"the name '{name}' is that of a model served from a folder", "give another")
        return tagged

    def _kept(self) -> Definitions:
        if self._pool.definitions is None:
            raise RequestError("this server keeps no definitions", "start it with --definitions FOLDER")
        return self._pool.definitions


def tagged(name: str) -> str:
    """A name as lists show it."""
    return name if ":" in name else f"{name}:latest"


def details(known: Facts, definition: Definition | None, model: Model) -> dict[str, Any]:
    """What Ollama tells of a model's make. What is not known is ""."""
    families = [known.family] if known.family else []
    return {
        "parent_model": definition.parent if definition else "", "format": FORMATS[model.engine],
        "family": known.family, "families": families,
        "parameter_size": parameters.words(known.parameters.count), "quantization_level": known.parameters.bits,
    }  # fmt: skip


def capabilities(model: Model) -> list[str]:
    """What a model can be asked for."""
    found = ["completion", "embedding"]
    with contextlib.suppress(RequestError):
        format_of(model.tokenizer.template)
        found.append("tools")
    return found


def _digest(known: Facts, definition: Definition | None) -> str:
    if definition is None:
        return known.digest
    row = {**asdict(definition), "name": "", "modified": 0, "parent": "", "of": known.digest}
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def _resident(model: Model) -> int:
    """Bytes that the model's process has in memory; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{model.pid}/statm").read_text().split()[1])
        return pages * int(os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0
