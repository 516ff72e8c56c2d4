"""Running models: one adapter per runtime, all behind `slmops.core.engine.Engine`.

`open_engine` looks at a model folder and loads it with the runtime that it was made for. Nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from slmops.core.engine import Engine, KvCache
from slmops.core.runtimes import Named
from slmops.errors import ModelError

Runtime = Literal["auto", Named]
RUNTIMES: tuple[Runtime, ...] = ("auto", *get_args(Named))
NO_KV_CACHE = {
    "onnx_genai": "ONNX Runtime GenAI holds keys and values on the CPU as the graph has them, in float32: it has no quantised cache there",
    "torch": "slmops runs torch for reference, with keys and values in full precision",
    "mlx": "slmops runs MLX with keys and values in the model's precision",
    "openvino": "slmops runs OpenVINO with keys and values as it holds them by default",
    "litert": "keys and values of a model for LiteRT are float32, as its graph has them",
    "executorch": "keys and values of a program for ExecuTorch are float32, as it was written",
}

AT_ONCE: dict[str, int | None] = {"torch": None, "onnx_genai": 32, "llama_cpp": 256, "mlx": None, "openvino": None}
"""Runtimes whose engines decode several answers together, with the most that the runtime takes; see `slmops.core.engine.AtOnce`."""


def detect(folder: Path) -> Named:
    """Which runtime a model folder is for. Weights for MLX say so in the head of their file, as mlx-lm writes it.

    Raises:
        ModelError: the folder is missing or is not a model.
    """
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}", "check the path; a model is a folder, not a file")
    if (folder / "genai_config.json").is_file():
        return "onnx_genai"
    if (folder / "model.gguf").is_file():
        return "llama_cpp"
    if (folder / "openvino_model.xml").is_file():
        return "openvino"
    if (folder / "model.tflite").is_file():
        return "litert"
    if (folder / "model.pte").is_file():
        return "executorch"
    if (folder / "config.json").is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files and find_gguf(folder):
            return "llama_cpp"
        if not files:
            raise ModelError(f"{folder} has a config.json but no .safetensors file", "save the weights as safetensors")
        return "mlx" if _written_for(files[0]) == "mlx" else "torch"
    if find_gguf(folder):
        return "llama_cpp"
    several = sorted(path.name for path in folder.glob("*.gguf"))
    if several:
        raise ModelError(
            f"{folder} holds several models: {', '.join(several[:5])}", "leave one in it, or call that one model.gguf"
        )
    names = ("genai_config.json", "model.gguf", "openvino_model.xml", "model.tflite", "model.pte")
    inner = sorted(path.parent for name in names for path in folder.glob(f"*/{name}"))
    hint = "point to a Hugging Face model folder or to one that `slmops` converted"
    raise ModelError(
        f"{folder} is not a model: it has neither {' nor '.join(names)} nor config.json",
        f"did you mean {inner[0]}?" if inner else hint,
    )


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder: `model.gguf`, else the only one, or the first of one that is in parts."""
    if (folder / "model.gguf").is_file():
        return folder / "model.gguf"
    found = sorted(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))
    return found[0] if len({_whole(path) for path in found}) == 1 else None


def gguf_parts(file: Path) -> list[Path]:
    """The files that a GGUF file, or a part of one, is in, the first part first."""
    if _whole(file) == file.name:
        return [file]
    return sorted(path for path in file.parent.glob("*.gguf") if _whole(path) == _whole(file))


def _whole(file: Path) -> str:
    """What a GGUF file is called without the number of its part."""
    return re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"\1", file.name)


def _written_for(file: Path) -> str:
    """The `format` in the head of a safetensors file, "" where it says nothing, or is no such file."""
    try:
        with file.open("rb") as stream:
            head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return str(head.get("__metadata__", {}).get("format", ""))
    except (OSError, ValueError, OverflowError, MemoryError, AttributeError):
        return ""


def open_engine(
    folder: Path, *, threads: int = 1, kind: Runtime = "auto", adapter: str | None = None, kv_cache: KvCache | None = None
) -> Engine:  # fmt: skip
    """Load a model.

    Args:
        folder: a model folder in the form of Hugging Face, ONNX Runtime GenAI, MLX, OpenVINO, LiteRT or ExecuTorch, with its tokenizer
            and chat template, or one with a GGUF file, which holds both.
        threads: CPU threads, at least 1.
        kind: the runtime; `auto` takes the one that the folder is for.
        adapter: answer with this one of the folder's adapters (`convert.onnx_adapters`, `convert.gguf_lora`).
        kv_cache: how keys and values are held, for llama.cpp; None: as the runtime does by default.

    Raises:
        ModelError: the folder is not a model of that kind, has no such adapter, cannot be loaded, or its runtime has no such cache.
        MissingExtraError: the runtime is not installed.
    """
    found = detect(folder)
    if kind not in ("auto", found):
        raise ModelError(f"{folder} is a model for {found}, not for {kind}", f"use runtime {found} or auto")
    if threads < 1:
        raise ModelError(f"threads must be at least 1, not {threads}", "leave threads out or give a positive number")
    if adapter is not None and found not in ("onnx_genai", "llama_cpp"):
        raise ModelError(
            f"{folder}: adapters are switched in ONNX Runtime GenAI and llama.cpp only",
            "a trained model's folder has its adapter merged in already: leave the adapter out",
        )
    if kv_cache is not None:
        refuse_cache(folder, found)
    if found == "torch":
        from slmops.engines.torch_engine import TorchEngine

        return TorchEngine(folder, threads=threads)
    if found == "llama_cpp":
        from slmops.engines.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(folder, threads=threads, adapter=adapter, kv_cache=kv_cache)
    if found == "mlx":
        from slmops.engines.mlx import MlxEngine

        return MlxEngine(folder, threads=threads)
    if found == "openvino":
        from slmops.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(folder, threads=threads)
    if found == "litert":
        from slmops.engines.litert import LiteRtEngine

        return LiteRtEngine(folder, threads=threads)
    if found == "executorch":
        from slmops.engines.executorch import ExecutorchEngine

        return ExecutorchEngine(folder, threads=threads)
    from slmops.engines.onnx_genai import GenaiEngine

    return GenaiEngine(folder, threads=threads, adapter=adapter)


def refuse_cache(folder: Path, runtime: str) -> None:
    """Refuse to choose the cache of keys and values in a runtime that has no choice.

    Raises:
        ModelError: with the reason.
    """
    if runtime in NO_KV_CACHE:
        hint = "leave the option out, or convert to GGUF (`convert: {also: [gguf-q8_0]}`)"
        raise ModelError(f"{folder}: {NO_KV_CACHE[runtime]}", hint)


def refuse_at_once(folder: Path, runtime: str, count: int) -> None:
    """Refuse `count` answers at once in a runtime whose engine gives one after the other, or does not take so many.

    Raises:
        ModelError: with the reason.
    """
    if count == 1:
        return
    if runtime not in AT_ONCE:
        raise ModelError(
            f"{folder}: slmops runs {runtime} with one answer at a time, it does not decode several together there",
            f"measure this model without batches; these decode several at once: {', '.join(AT_ONCE)}",
        )
    most = AT_ONCE[runtime]
    if most is not None and count > most:
        raise ModelError(
            f"{folder}: {runtime} takes at most {most} answers at once, not {count}", "give a smaller batch"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; a ModelError that names the file otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", "the model folder is incomplete") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", "the model folder is damaged; make it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object", "the model folder is damaged; make it again")
    return value


def no_room(index: int, length: int, context: int, answer: int = 0) -> ModelError:
    """The error for a prompt that leaves no room for an answer; with `answer`, for one of that many tokens, counted in `length`."""
    if answer:
        return ModelError(
            f"prompt {index} and its answer of {answer} tokens have {length} tokens, but the context of the model holds {context}",
            "ask for shorter prompts or answers",
        )
    return ModelError(
        f"prompt {index} has {length} tokens, but the context of the model holds {context}, answer included",
        "shorten the prompt, or train a model with a longer context",
    )


def check_room(prompts: Sequence[Sequence[int]], context: int) -> None:
    """Refuse prompts that are empty or leave no room for an answer, before any of them is answered.

    Raises:
        ModelError: there is one.
    """
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise no_room(index, len(prompt), context)


def clean(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without NUL characters, at which one runtime would end the text. All engines do this alike."""
    return [
        {**m, "content": m["content"].replace("\0", "")} if isinstance(m.get("content"), str) else dict(m)
        for m in messages
    ]
