"""Low-rank adapters of a served model: which there are, in which form each engine takes them, and models that wear one.

A model's folder that `convert.onnx_adapters` or `convert.gguf_lora` wrote brings its own; others are given by name and place. A model
`desk` with the adapter `tone` is asked for as `desk+tone`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.engines import read_json
from slmops.engines.adapters import ADAPTERS, adapter_file
from slmops.errors import ModelError
from slmops.serve.engines import Kind

if TYPE_CHECKING:
    from slmops.serve.model import Ask, Model, Piece

JOIN = "+"
"""Between the names of a model and of its adapter."""
WANTED: dict[Kind, str] = {
    "onnx": "an .onnx_adapter file, as convert.onnx_adapters writes it",
    "llama_cpp": "the GGUF file of an adapter, as convert.gguf_lora writes it",
    "torch": "a folder in PEFT's form, or that of a model trained with an adapter",
}


def find_adapters(model: Path, kind: Kind, given: Mapping[str, Path]) -> dict[str, Path]:
    """Files (for torch: folders) of a model's adapters by name: those of its folder, and those that were given.

    Raises:
        ModelError: one is missing, not as it was written, or in a form that the engine does not take.
    """
    found: dict[str, Path] = {}
    if kind != "torch" and (model / ADAPTERS).is_file():
        names = read_json(model / ADAPTERS).get("adapters", {})
        found = {name: adapter_file(model, name) for name in sorted(names)}
    for name, path in given.items():
        if JOIN in name or not name:
            raise ModelError(f"no adapter can be called {name!r}", f"leave out the {JOIN}, and give it a name")
        found[name] = _form(path, kind)
    return found


def adapter_sizes(model: Path, kind: Kind, given: Mapping[str, Path]) -> list[int]:
    """Bytes of the files of a model's adapters, which are not read for that.

    Raises:
        ModelError: one of those that were given is in a form that the engine does not take.
    """
    own = read_json(model / ADAPTERS).get("adapters", {}) if kind != "torch" and (model / ADAPTERS).is_file() else {}
    places = {name: model / said["file"] for name, said in own.items()}
    places |= {name: _form(path, kind) for name, path in given.items()}
    files = [[place] if kind != "torch" else place.glob("adapter_model*") for place in places.values()]
    return [sum(file.stat().st_size for file in of_one if file.is_file()) for of_one in files]


def _form(path: Path, kind: Kind) -> Path:
    if kind == "torch":
        place = next((p for p in (path, path / "adapter") if (p / "adapter_config.json").is_file()), None)
    else:
        suffix = ".gguf" if kind == "llama_cpp" else ".onnx_adapter"
        place = path if path.is_file() and path.suffix == suffix else None
    if place is None:
        raise ModelError(f"{path} is no adapter for a model that {kind} runs", f"give {WANTED[kind]}")
    return place


class Adapted:
    """A model with one of its adapters: all that the model is, but what is asked is answered with the adapter.

    Stands where a `Model` does; loading and ending it is loading and ending the model.
    """

    def __init__(self, model: Model, adapter: str) -> None:
        self._model, self._adapter = model, adapter
        self.settings = replace(model.settings, name=f"{model.settings.name}{JOIN}{adapter}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def answer(self, ask: Ask, *more: Any, **options: Any) -> AsyncGenerator[Piece, None]:
        """See `Model`."""
        return self._model.answer(replace(ask, adapter=self._adapter), *more, **options)

    async def embed(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Model`."""
        return await self._model.embed(prompts, self._adapter)
