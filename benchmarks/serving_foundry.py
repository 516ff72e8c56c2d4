"""Foundry Local's web service on a model of one's own, for `serving.py`: run by the Python of an environment that has its SDK.

    python serving_foundry.py FOLDER SCRATCH PORT THREADS

FOLDER is one of ONNX Runtime GenAI. It is registered in Foundry's local catalogue, so nothing is asked of the public one; answers come at
/catalogs/local/v1/chat/completions. What a request cannot say stands in a copy of the folder, SCRATCH: the threads, that the end token is
ruled out (a `min_length` that no answer reaches), and a chat template that is the message and no more, so that prompts have the tokens
that they have for the other servers.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

MODEL = "m:1"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NEVER = 1_000_000
"""Tokens, more than any answer has."""


def copy(source: Path, out: Path, threads: int) -> None:
    """The folder with settings of its own; weights are linked."""
    out.mkdir()
    for file in source.iterdir():
        if file.name not in ("genai_config.json", "chat_template.jinja"):
            (out / file.name).symlink_to(file.resolve())
    settings: dict[str, Any] = json.loads((source / "genai_config.json").read_text("utf-8"))
    settings["search"]["min_length"] = NEVER
    settings["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
    (out / "genai_config.json").write_text(json.dumps(settings), "utf-8")
    (out / "chat_template.jinja").write_text(TEMPLATE, "utf-8")


def serve(source: Path, scratch: Path, port: int, threads: int) -> None:
    """Until a signal ends this process."""
    from foundry_local_sdk import CatalogType, Configuration, FoundryLocalManager, ModelInfoBuilder

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    copy(source, scratch / "model", threads)
    FoundryLocalManager.initialize(
        Configuration(
            app_name="serving",
            app_data_dir=str(scratch / "data"),
            model_cache_dir=str(scratch / "cache"),
            web=Configuration.WebService(urls=f"http://127.0.0.1:{port}"),
            disable_nonessential_telemetry=True,
        )
    )
    manager = FoundryLocalManager.instance
    with ModelInfoBuilder() as about:
        about.set_string_property("task", "chat-completion")
        model = manager.get_catalog(CatalogType.LOCAL).register_model(
            model_path=str(scratch / "model"), model_id=MODEL, metadata=about
        )
    model.load()
    manager.start_web_service()
    signal.pause()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]).absolute(), int(sys.argv[3]), int(sys.argv[4]))
