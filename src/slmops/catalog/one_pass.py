"""Let a fetched model read one text, in a process of its own that is offline and has no token.

Promises: its tokenizer gives a text back, its weights have the names and shapes that its configuration makes, and its
output is numbers. A crash of a runtime is a refusal and not the end of the caller. No code of the model is run, and no
pickle is loaded. What cannot be tried here (a missing runtime, too little memory) is said, and is no error.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slmops.errors import ModelError

TEXTS = ("The 3 kettles cost 42 pounds.", "Grüße aus 東京, naïve café")
PLENTY = 1800
"""Seconds that the pass may take."""
_MARK = "slmops-one-pass:"


class _Skip(Exception):
    """It cannot be tried here, for this reason."""


def ask(folder: Path, names: Sequence[str], form: str, model: str, size: int) -> dict[str, Any]:
    """Try a model.

    Args:
        size: bytes of its files.

    Returns:
        `{"runtime", "vocabulary", …}`, or `{"skipped": reason}`.

    Raises:
        ModelError: it does not load, or what comes out is not sound.
    """
    if form == "pickle":
        return {"skipped": "a pickle is not loaded here"}
    free = _free()
    if free is not None and size * 1.3 > free:
        return {"skipped": f"{size / 1e9:.1f} GB of weights do not fit the {free / 1e9:.1f} GB of memory that are free"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "HUGGING_FACE_HUB_TOKEN"}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        with tempfile.TemporaryDirectory() as empty:  # runtimes look for libraries where they are started
            done = subprocess.run(
                [sys.executable, "-P", "-m", "slmops.catalog.one_pass", str(folder.absolute()), form],
                input=json.dumps(list(names)), cwd=empty, env={**kept, **quiet, "HF_TOKEN_PATH": os.devnull},
                capture_output=True, text=True, timeout=PLENTY, check=False,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"skipped": f"one pass took longer than {PLENTY // 60} minutes"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        raise ModelError(f"{model}: it does not load: {why}", _ANYWAY)
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix(_MARK))
    if "error" in answer:
        raise ModelError(f"{model}: {answer['error']}", _ANYWAY)
    return answer


_ANYWAY = "what was fetched is kept: --no-check takes it without this pass"


def _free() -> int | None:
    """Bytes of memory that are free, where the system says."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None


# ------------------------------------------------------------------------------------------------- in its own process


def _torch(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise _Skip("an adapter or a part of a model: there is no config.json in it")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise _Skip(f"{error.name} is not installed (pip install 'slmops[train]')") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, min(4, os.cpu_count() or 1)))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text = config.get_text_config()
    vocabulary = int(text.vocab_size)
    tokens = _torch_tokens(folder, names, vocabulary)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization" in raw and "quantization_config" not in raw:
        raise _Skip("weights for MLX are not run in torch")
    made = transformers.AutoModelForCausalLM
    if type(config) not in made._model_mapping:
        made = transformers.AutoModelForImageTextToText
    if type(config) not in made._model_mapping:
        raise _Skip(f"{config.model_type} does not write text")
    quantised = getattr(config, "quantization_config", None) is not None
    if not quantised:
        _refuse_shapes(folder, names, made, config)
    try:
        model, loading = made.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype="auto", output_loading_info=True
        )
    except ImportError as error:
        raise _Skip(f"its weights are quantised: {str(error).strip().splitlines()[0]}") from None
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing: {', '.join(missing[:3])}")
    with torch.inference_mode():
        out = model.eval()(torch.tensor([tokens[: max(1, int(getattr(text, "max_position_embeddings", 0) or 64) - 1)]]))
    if not torch.isfinite(out.logits).all():
        raise ValueError("what it puts out are not numbers")
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"runtime": "transformers", "vocabulary": vocabulary, "parameters": count, "tokens": len(tokens)}


def _refuse_shapes(folder: Path, names: Sequence[str], made: Any, config: Any) -> None:
    """Compare the headers with the same model without memory; names that loading translates are left to loading."""
    import torch

    from slmops.catalog.check import safetensors_header

    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in made.from_config(config).state_dict().items()}
    for file in names:
        if file.endswith(".safetensors"):
            for name, (_kind, shape) in safetensors_header(folder / file, file).items():
                if name in wanted and wanted[name] != shape:
                    raise ValueError(f"{file}: {name} is {shape}, and config.json makes it {wanted[name]}")


def _torch_tokens(folder: Path, names: Sequence[str], vocabulary: int) -> list[int]:
    if not {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"} & set(names):
        return [0, min(1, vocabulary - 1)]
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return _round_trip(
        lambda t: list(tokenizer(t, add_special_tokens=False)["input_ids"]),
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)),
        vocabulary, tokenizer.unk_token_id,
    )  # fmt: skip


def _round_trip(
    encode: Callable[[str], list[int]], decode: Callable[[list[int]], str], vocabulary: int, unknown: int | None = None
) -> list[int]:
    """The ids of the texts. Spaces and case may change, as some tokenizers have it, but no letter."""
    ids: list[int] = []
    for text in TEXTS:
        new = encode(text)
        if not new:
            raise ValueError(f"its tokenizer makes nothing of {text!r}")
        if max(new) >= vocabulary or min(new) < 0:
            raise ValueError(f"its tokenizer makes id {max(new)}, and the model has {vocabulary}")
        back = decode(new)
        if _letters(back) != _letters(text) and (unknown is None or unknown not in new):
            raise ValueError(f"its tokenizer makes {back!r} of {text!r}")
        ids += new
    return ids


def _letters(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(letter for letter in plain if not letter.isspace() and not unicodedata.combining(letter))


def _gguf(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    try:
        import llama_cpp
    except ImportError:
        raise _Skip("llama-cpp-python is not installed (pip install 'slmops[llamacpp]')") from None
    first = min(name for name in names if name.endswith(".gguf") and not name.startswith(("mmproj", "adapter/")))
    model = llama_cpp.Llama(str(folder / first), n_ctx=64, n_batch=64, logits_all=False, verbose=False)
    vocabulary = int(model.n_vocab())
    ids = _round_trip(
        lambda t: list(model.tokenize(t.encode(), add_bos=False)),
        lambda tokens: model.detokenize(tokens).decode("utf-8", "replace"), vocabulary,
    )  # fmt: skip
    model.eval(ids[: min(60, int(model.n_ctx()) - 1)])
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    if not all(math.isfinite(logits[i]) for i in range(vocabulary)):
        raise ValueError("what it puts out are not numbers")
    model.close()
    return {"runtime": "llama.cpp", "vocabulary": vocabulary, "tokens": len(ids)}


def _onnx(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    homes = [name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == "genai_config.json"]
    if not homes:
        try:
            import onnxruntime
        except ImportError:
            raise _Skip("onnxruntime is not installed (pip install 'slmops[runtime]')") from None
        for name in names:
            if name.endswith(".onnx"):
                onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        return {"runtime": "ONNX Runtime", "note": "loaded; what it reads is not known"}
    try:
        import onnxruntime_genai as genai
    except ImportError:
        raise _Skip("onnxruntime-genai is not installed (pip install 'slmops[runtime]')") from None
    import numpy

    home = folder / homes[0]
    said = json.loads((home / "genai_config.json").read_text(encoding="utf-8"))["model"]
    model = genai.Model(str(home))
    tokenizer = genai.Tokenizer(model)
    ids = _round_trip(
        lambda t: [int(i) for i in tokenizer.encode(t)],
        lambda tokens: str(tokenizer.decode(tokens)),
        int(said["vocab_size"]),
    )
    length = int(said.get("context_length") or 128)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=min(128, length))
    generator = genai.Generator(model, params)
    generator.append_tokens([ids[: min(60, length - 2)]])
    if not numpy.isfinite(numpy.asarray(generator.get_logits(), dtype=numpy.float32)).all():
        raise ValueError("what it puts out are not numbers")
    return {"runtime": "ONNX Runtime GenAI", "vocabulary": int(said["vocab_size"]), "tokens": len(ids)}


def main(folder: str, form: str) -> None:
    """Try the model and print what was found. Standard input holds the names of its files, a list in JSON."""
    answer: dict[str, Any]
    names = json.load(sys.stdin)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            answer = {"safetensors": _torch, "gguf": _gguf, "onnx": _onnx}[form](Path(folder), names)
    except _Skip as skip:
        answer = {"skipped": str(skip)}
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0][:300]
        answer = {
            "error": said if type(error) is ValueError and said else f"it does not load: {type(error).__name__}: {said}"
        }
    print(f"{_MARK}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
