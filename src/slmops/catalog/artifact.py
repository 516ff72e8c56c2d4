"""A model in a registry: what the layers of its manifest are, as files.

Knows CNCF's ModelPack (https://github.com/modelpack/model-spec), KitOps' ModelKits, Docker Model Runner's layers, files that ORAS
pushed with their titles, and Ollama's images (`slmops.catalog.ollama`). Promises: the kind of a layer decides what it may be: data sets
are left out, code is taken only for who asks, and a container image is refused. Nothing of a layer but licence and configuration is
read before it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slmops.catalog import ollama
from slmops.catalog.hub import Archive, File, Listing, plain, refuse_offline
from slmops.catalog.registry import Blob, Client, Manifest, Place, place_of
from slmops.catalog.source import Source, flat, refuse_names
from slmops.errors import ModelError

LARGEST_CONFIG = 4 << 20
LARGEST_LICENCE, LARGEST_NEAR = 1 << 20, 8 << 20
PATH, TITLE, UNPACK = "org.cncf.model.filepath", "org.opencontainers.image.title", "io.deis.oras.content.unpack"
LICENSES = "org.opencontainers.image.licenses"
_IMAGE = re.compile(r"application/vnd\.(oci\.image\.layer\.v1\.tar|docker\.image\.rootfs\.diff\.tar)([+.](gzip|zstd))?")
_PACK = re.compile(r"application/vnd\.cncf\.model\.(weight\.config|weight|doc|code|dataset)\.v\d+\.(tar(?:\+\w+)?|\w+)")
_KIT = re.compile(r"application/vnd\.kitops\.modelkit\.(\w+)\.v\d+\.(tar(?:\+\w+)?)")
_DOCKER = re.compile(r"application/vnd\.docker\.ai\.(.+)")
_DATA = "a data set, which is not part of the model"
_CODE = "code, which is not needed: --allow-code"
_NAMED = (
    ("mmproj", "mmproj-model.gguf"), ("gguf", "model.gguf"), ("safetensors", "model.safetensors"), ("license", "LICENSE"),
    ("chat.template.jinja", "chat_template.jinja"),
)  # fmt: skip


class Registry:
    """One registry, for `oci:` and for names of Ollama's library. Methods may be called from several threads.

    Args:
        near: files that an earlier pull left: what is among them is not asked for to make a listing.
    """

    def __init__(self, timeout: float | None = None, near: Iterable[Path] = ()) -> None:
        self.client = Client(timeout)
        total = 0
        for path in near:
            with contextlib.suppress(OSError):
                total += path.stat().st_size
                if total > LARGEST_NEAR:
                    break
                self.client.keep(path.read_bytes())

    def listing(self, source: Source) -> Listing:
        """The files of the model that a tag names now.

        Raises:
            Again: another try may help.
            ModelError: no such model, no access, not a model, or an unsafe name in it.
        """
        refuse_offline(source)
        place, name = where(source), str(source)
        reference = source.revision or "latest"
        manifest = self.client.manifest(place, reference, name)
        if any(layer.media.startswith(ollama.PREFIX) for layer in manifest.layers):
            found = ollama.listing(self.client, place, manifest, source)
        else:
            found = self._listing(place, manifest, source)
        mirror = "another registry (SLMOPS_OLLAMA_REGISTRY)" if source.kind == "ollama" else "another registry"
        return replace(found, endpoint=place.shown, who="the registry", mirror=f"use {mirror}")

    def summed(self, listing: Listing, files: Sequence[File]) -> tuple[File, ...]:
        """The files as they are: a manifest states all checksums."""
        return tuple(files)

    def read(self, listing: Listing, file: File, start: int, stop: int) -> Generator[bytes, None, None]:
        """The bytes from `start` to before `stop` of a file, as they come.

        Raises:
            Again, ModelError: as `listing`.
        """
        return self.client.read(where(listing.source), listing, file, start, stop)

    def _listing(self, place: Place, manifest: Manifest, source: Source) -> Listing:
        name = str(source)
        layers = _layers(manifest, name)
        config = self._config(place, manifest, name)
        licence = manifest.notes.get(LICENSES) or _licence(config)
        refuse_names((file.name for file in layers.files), name)
        for title, _reason in layers.left:
            refuse_names((title,), name)
        for layer in layers.files:
            if not licence and layer.name == "LICENSE" and layer.size <= LARGEST_LICENCE:
                blob = Blob("licence", layer.size, layer.digest, {})
                licence = ollama.licence_name(self.client.small(place, blob, LARGEST_LICENCE, name))
        return Listing(
            source, manifest.digest, flat(layers.files), plain(licence or "") or None, about=_about(config),
            archives=layers.archives, left=tuple(layers.left),
        )  # fmt: skip

    def _config(self, place: Place, manifest: Manifest, name: str) -> Mapping[str, Any]:
        blob = manifest.config
        if blob is None or not blob.media.endswith("json") or not 2 < blob.size <= LARGEST_CONFIG:
            return {}
        try:
            value = json.loads(self.client.small(place, blob, LARGEST_CONFIG, name))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


def where(source: Source) -> Place:
    """The registry and repository of a source. SLMOPS_OLLAMA_REGISTRY takes the place of Ollama's own, HF_ENDPOINT of hf.co."""
    if source.kind == "ollama":
        host, repository = ollama.split(source.name)
        own = os.environ.get("SLMOPS_OLLAMA_REGISTRY") if host == ollama.HOST else ""
        own = os.environ.get("HF_ENDPOINT") if host == ollama.HUGGING_FACE else own
        if own:
            base = (own if "://" in own else f"https://{own}").rstrip("/")
            return Place(base, repository, base.partition("://")[2].rpartition("@")[2].partition("/")[0])
        return place_of(host, repository)
    scheme = "http://" if source.name.startswith("http://") else ""
    host, _, repository = source.name.removeprefix(scheme).partition("/")
    return place_of(scheme + host, repository)


@dataclass
class _Layers:
    files: list[File] = field(default_factory=list)
    archives: dict[str, Archive] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)


def _layers(manifest: Manifest, name: str) -> _Layers:
    found = _Layers()
    unnamed: dict[str, list[Blob]] = {}
    for number, layer in enumerate(manifest.layers, 1):
        role, packing, given = kind_of(layer)
        if role == "image":
            raise ModelError(
                f"{name}: a container image ({plain(layer.media)}), not a model's files",
                "name an artefact that holds a model",
            )
        if packing:
            given = given or f"{role}-{number}"
        title = (layer.notes.get(PATH) or layer.notes.get(TITLE) or given).removeprefix("./").rstrip("/")
        if not title:
            found.left.append(
                (f"sha256:{layer.digest[:12]}", f"a layer without a name, of kind {plain(layer.media) or 'unknown'}")
            )
            continue
        if title == given and not packing:
            unnamed.setdefault(given, []).append(layer)
            continue
        _add(found, layer, role, packing, title)
    for given, layers in unnamed.items():
        stem, dot, end = given.rpartition(".")
        for number, layer in enumerate(layers, 1):
            many = f"{stem}-{number:05}-of-{len(layers):05}{dot}{end}" if dot else f"{given}-{number}"
            _add(found, layer, kind_of(layer)[0], "", given if len(layers) == 1 or (number == 1 and not dot) else many)
    return found


def _add(found: _Layers, layer: Blob, role: str, packing: str, title: str) -> None:
    if packing:
        end = ".tar" + {"tar": "", "tar+gzip": ".gz", "tar+zstd": ".zst"}.get(packing, "")
        title = title if title.endswith((".tar", ".tgz", ".gz", ".zst")) else title + end
    if role == "dataset" or (role == "code" and not packing and not title.endswith(".py")):
        found.left.append((title, _DATA if role == "dataset" else _CODE))
        return
    if any(file.name == title and file.digest == layer.digest for file in found.files):
        return
    if packing:
        found.archives[title] = Archive(packing, role == "code")
    found.files.append(File(title, layer.size, "sha256", layer.digest))


def kind_of(layer: Blob) -> tuple[str, str, str]:
    """What a layer is (`weight`, `doc`, `code`, `dataset`, `file`, `image`), how it is packed, and what it is called if it has no name."""
    media = layer.media
    if match := _PACK.fullmatch(media):
        packing = match[2] if match[2].startswith("tar") else ""
        return match[1], packing, f"model.{match[2]}" if match[2] in ("gguf", "safetensors") else ""
    if match := _KIT.fullmatch(media):
        return {"model": "weight", "modelpart": "weight", "docs": "doc"}.get(match[1], match[1]), match[2], ""
    if match := _DOCKER.fullmatch(media):
        if match[1].endswith("tar"):
            return "file", "tar", ""
        return "file", "", next((called for part, called in _NAMED if part in match[1]), "")
    if match := _IMAGE.fullmatch(media):
        packing = f"tar+{match[3]}" if match[3] else "tar"
        if not layer.notes.get(TITLE):
            return "image", packing, ""
        folder = layer.notes.get(UNPACK) == "true" or match[3]  # ORAS calls plain files `tar`, and packs folders
        return "file", packing if folder else "", ""
    return "file", "tar+gzip" if layer.notes.get(UNPACK) == "true" else "", ""


def _licence(config: Mapping[str, Any]) -> str:
    """The licence of ModelPack's configuration or of a Kitfile."""
    said = _object(config.get("descriptor")).get("licenses")
    if isinstance(said, list) and said:
        return ", ".join(map(str, said))
    return str(_object(config.get("model")).get("license") or _object(config.get("package")).get("license") or "")


def _about(config: Mapping[str, Any]) -> str:
    """Architecture, size and rounding, as ModelPack's, Docker's and KitOps' configurations say them."""
    inner = {**_object(config.get("model")), **_object(config.get("config"))}
    keys = ("architecture", "paramSize", "parameters", "precision", "quantization", "format")
    return plain(", ".join(str(inner[key]) for key in keys if isinstance(inner.get(key), str) and inner[key]))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
