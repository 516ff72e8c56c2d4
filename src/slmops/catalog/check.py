"""Whether what was fetched is a model: by its own headers alone, before any runtime reads it.

Promises: no file is trusted for a size: headers, counts and offsets are bounded by the file that holds them, so that a
hostile file costs no memory. Nothing of the model is run and no library that would is loaded; `slmops.catalog.one_pass`
does that afterwards, in a process of its own.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from slmops.catalog.choose import is_pickle
from slmops.catalog.source import refusal as unsafe
from slmops.catalog.transfer import refuse_head
from slmops.errors import RefusedError

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16,
    "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "C64": 64,
    "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
LARGEST_JSON = 200_000_000
MOST = 1_000_000
"""Tensors or entries of a header: more than any model has."""
GROWTH = 20
"""How many times its size an archive may unpack to."""
SESSION = frozenset({
    "enable_mem_pattern", "enable_cpu_mem_arena", "log_id", "log_severity_level", "log_verbosity_level", "provider_options",
    "intra_op_num_threads", "inter_op_num_threads", "graph_optimization_level", "execution_mode",
})  # fmt: skip
"""Options of a session that neither write nor load anything."""
PROVIDERS = frozenset(
    {"cpu", "cuda", "DML", "dml", "WebGPU", "webgpu", "CoreML", "NvTensorRtRtx", "OpenVINO", "QNN", "rocm"}
)
RANKS = 16
"""Dimensions of a tensor: more than any model has."""
AGAIN = "do not use this repository, or tell its makers"

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name to element type and shape."""


def refuse_code(path: Path, model: str) -> None:
    """Refuse a configuration that only code of its repository can read. Needs transformers where there is such a hint.

    Raises:
        RefusedError: it is one, or is not JSON.
    """
    config = _object(path, model, "config.json")
    if "auto_map" not in config:
        return
    kind = str(config.get("model_type"))
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        known = False
    else:
        known = kind in CONFIG_MAPPING_NAMES
    if not known:
        named = config["auto_map"]
        values = named.values() if isinstance(named, dict) else [named]
        code = sorted({f"{str(value)[:60].partition('.')[0]}.py" for value in values})
        raise RefusedError(
            f"{model}: refused for its own code: {', '.join(code)}: transformers does not know model_type {kind!r} by itself",
            "take another model; --allow-code takes the files, and nothing of slmops runs them",
        )


def check(folder: Path, names: Sequence[str], model: str) -> dict[str, Any]:
    """Check the files of a model folder against their formats and each other.

    Returns:
        What was seen: `tensors`, `parameters` (elements of safetensors), `files`.

    Raises:
        RefusedError: with the name of the file and what is wrong with it.
    """
    parsed = {
        name: _object(folder / name, model, name) for name in names if name.endswith(".json") and _is_object(name)
    }
    for name in names:
        if name.endswith(".json") and not _is_object(name):
            _json(folder / name, model, name)
    per_file: dict[str, Tensors] = {}
    count = 0
    for name in names:
        path = folder / name
        with path.open("rb") as stream:
            refuse_head(name, path.stat().st_size, stream.read(16), model)
        if name.endswith(".safetensors"):
            per_file[name] = safetensors_header(path, f"{model}: {name}")
        elif name.endswith(".gguf"):
            count += gguf_header(path, f"{model}: {name}")
        elif name.endswith(".onnx"):
            _refuse_link(path, model, name)
        elif is_pickle(name):
            refuse_bomb(path, f"{model}: {name}")
    for name, index in parsed.items():
        if name.endswith("genai_config.json"):
            refuse_settings(index, f"{model}: refused for its own code: {name}")
        if name.endswith(".safetensors.index.json"):
            _check_index(index, per_file, name, model)
    shapes = [shape for tensors in per_file.values() for _kind, shape in tensors.values()]
    return {
        "files": len(names),
        "tensors": count + len(shapes),
        "parameters": sum(math.prod(shape) for shape in shapes),
    }


def refuse_settings(value: Any, name: str, inside: str = "") -> None:
    """Refuse settings of ONNX Runtime GenAI with which a session writes files or loads libraries: of a session's options only those of
    `SESSION` are taken, of providers none but the processor's and those that come with the runtime, without options of their own.

    Raises:
        RefusedError: with the setting.
    """
    if isinstance(value, list):
        for item in value:
            refuse_settings(item, name, inside)
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key in ("session_options", "run_options"):
            if not isinstance(inner, dict):
                raise RefusedError(f"{name} has {key} of another kind than an object", AGAIN)
            odd = sorted(set(inner) - SESSION)
            if odd:
                raise RefusedError(f"{name} sets {key}.{odd[0]!r:.60}", AGAIN)
            providers = inner.get("provider_options") or []
            for provider in providers if isinstance(providers, list) else [providers]:
                known = isinstance(provider, dict) and set(provider) <= PROVIDERS
                if not known or not all(_harmless(settings) for settings in provider.values()):
                    raise RefusedError(f"{name} asks for the provider {provider!r:.100}", AGAIN)
        elif "library" in key.lower() or key == "custom_ops":
            raise RefusedError(f"{name} asks for a library: {key!r:.60}", AGAIN)
        else:
            refuse_settings(inner, name, key)


def _harmless(settings: Any) -> bool:
    """Whether a provider's options name no file."""
    return not settings or (
        isinstance(settings, dict)
        and not any(
            mark in f"{key}{value}".lower()
            for key, value in settings.items()
            for mark in ("path", "/", "\\", "library", ".so", ".dll")
        )
    )


def _is_object(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "genai_config.json",
        "generation_config.json",
    ) or (base.endswith(".index.json"))


def _refuse_link(path: Path, model: str, name: str) -> None:
    """git keeps a symbolic link as a small file that holds where it leads."""
    if path.stat().st_size <= 1024:
        text = path.read_bytes()
        if text and b"\n" not in text and text.startswith((b"../", b"./", b"/")):
            raise RefusedError(
                f"{model}: refused for its file {name}: a symbolic link to {text.decode(errors='replace')!a}",
                AGAIN,
            )


def _json(path: Path, model: str, name: str) -> Any:
    _refuse_link(path, model, name)
    if path.stat().st_size > LARGEST_JSON:
        raise RefusedError(f"{model}: refused for its file {name}: {path.stat().st_size} bytes of JSON", AGAIN)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{model}: {name} is not JSON: {error}", AGAIN) from None


def _object(path: Path, model: str, name: str = "") -> dict[str, Any]:
    value = _json(path, model, name or path.name)
    if not isinstance(value, dict):
        raise RefusedError(f"{model}: {name or path.name} does not hold a JSON object", AGAIN)
    return value


def safetensors_header(path: Path, name: str) -> Tensors:
    """The tensors of a safetensors file, whose bytes they must cover exactly and one after the other.

    Raises:
        RefusedError: the header is not one of this file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        refuse_head(path.name, size, head, name.partition(": ")[0])
        length = int.from_bytes(head, "little")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"{name}: its header is not JSON: {error}", AGAIN) from None
    if not isinstance(header, dict):
        raise RefusedError(f"{name}: its header is not a JSON object", AGAIN)
    header.pop("__metadata__", None)
    found: Tensors = {}
    spans = []
    for tensor, said in header.items():
        try:
            kind, shape = str(said["dtype"]), said["shape"]
            if (
                not isinstance(shape, list)
                or len(shape) > RANKS
                or not all(type(n) is int and n < 1 << 63 for n in shape)
            ):
                raise ValueError
            shape = tuple(shape)
            start, stop = (int(n) for n in said["data_offsets"])
            bits = BITS[kind] * math.prod(shape)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise RefusedError(f"{name}: its header says nothing sound of {tensor!r:.80}", AGAIN) from None
        if min(shape, default=0) < 0 or start < 0 or bits != 8 * (stop - start):
            raise RefusedError(f"{name}: {tensor!r:.80} of shape {shape} is not {stop - start} bytes of {kind}", AGAIN)
        found[tensor] = (kind, shape)
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise RefusedError(f"{name}: its tensors overlap or leave a gap at byte {end}", AGAIN)
        end = stop
    if end != size - 8 - length:
        raise RefusedError(f"{name}: its tensors are {end} bytes, and it holds {size - 8 - length}", AGAIN)
    return found


def _check_index(index: dict[str, Any], per_file: dict[str, Tensors], name: str, model: str) -> None:
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(part, str) for part in where.values()):
        raise RefusedError(f"{model}: {name} does not name its files", AGAIN)
    home = name.rpartition("/")[0]
    for tensor, part in where.items():
        file = f"{home}/{part}" if home else part
        if file not in per_file and unsafe(part) is None and f"{home}/model.safetensors".lstrip("/") in per_file:
            continue  # left behind: loaders take the one file
        if file not in per_file:
            raise RefusedError(f"{model}: {name} names {part!r:.80}, which is not there", AGAIN)
        if tensor not in per_file[file]:
            raise RefusedError(f"{model}: {part} holds no {tensor!r:.80}, as {name} says", AGAIN)


class _Reader:
    """Little-endian numbers and strings of a stream that is never read past its end."""

    def __init__(self, stream: BinaryIO, size: int, name: str) -> None:
        self.stream, self.size, self.name = stream, size, name

    def number(self, form: str) -> int:
        data = self.stream.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise self.wrong("ends in its header")
        return int(struct.unpack(form, data)[0])

    def count(self, most: int, what: str) -> int:
        value = self.number("<Q")
        if value > most:
            raise self.wrong(f"says it has {value} {what}")
        return value

    def skip(self, count: int) -> None:
        if count > self.size - self.stream.tell():
            raise self.wrong("ends in its header")
        self.stream.seek(count, 1)

    def string(self) -> bytes:
        length = self.count(self.size - self.stream.tell(), "bytes of a string")
        if length <= 1 << 16:
            return self.stream.read(length)
        self.skip(length)
        return b""

    def wrong(self, what: str) -> RefusedError:
        return RefusedError(f"{self.name}: {what}", AGAIN)


_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _value(reader: _Reader, kind: int, depth: int = 0) -> None:
    if kind in _WIDTH:
        reader.skip(_WIDTH[kind])
    elif kind == 8:
        reader.string()
    elif kind == 9 and depth < 2:
        inner, count = reader.number("<I"), reader.count(reader.size, "entries of a list")
        if inner in _WIDTH:
            reader.skip(_WIDTH[inner] * count)
        else:
            for _ in range(count):
                _value(reader, inner, depth + 1)
    else:
        raise reader.wrong(f"has an entry of unknown kind {kind}")


def gguf_header(path: Path, name: str) -> int:
    """How many tensors a GGUF file has. Its header must end, and its tensors begin, within it.

    Raises:
        RefusedError: the header is not one of this file.
    """
    with path.open("rb") as stream:
        reader = _Reader(stream, path.stat().st_size, name)
        if stream.read(4) != b"GGUF" or reader.number("<I") not in (2, 3):
            raise reader.wrong("is not GGUF of version 2 or 3")
        tensors, entries = reader.count(MOST, "tensors"), reader.count(MOST, "entries")
        for _ in range(entries):
            reader.string()
            _value(reader, reader.number("<I"))
        last = -1
        for _ in range(tensors):
            reader.string()
            ranks = reader.number("<I")
            if ranks > 8:
                raise reader.wrong(f"has a tensor of {ranks} dimensions")
            reader.skip(8 * ranks + 4)
            last = max(last, reader.number("<Q"))
        if stream.tell() + last >= reader.size and tensors:
            raise reader.wrong("ends before its tensors do")
    return tensors


def refuse_bomb(path: Path, name: str) -> None:
    """Refuse an archive that unpacks to far more than it holds, or to names outside its folder.

    Raises:
        RefusedError: it is one.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, struct.error) as error:
        raise RefusedError(f"{name}: refused: its archive is damaged: {error}", AGAIN) from None
    total, size = sum(member.file_size for member in members), path.stat().st_size
    if total > GROWTH * size:
        raise RefusedError(f"{name}: refused as a zip bomb: {size} bytes that unpack to {total}", AGAIN)
    for member in members:
        if member.filename.startswith("/") or ".." in member.filename.split("/"):
            raise RefusedError(f"{name}: refused for the name {ascii(member.filename)!s:.80} in it", AGAIN)
