"""Assemble the bundle: copy the judged model, render an example, write the manifest, read everything back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import slmops
from slmops.bundle.manifest import (
    NAME,
    BundleFile,
    ChatTemplate,
    Limits,
    Manifest,
    Runtime,
    payload_digest,
    verify,
)
from slmops.core import method
from slmops.core.digest import digest_file
from slmops.core.method import Context, Declaration, Facts
from slmops.store.files import read_json

DECLARATION = Declaration(
    name="bundle.assemble",
    version="2",
    makes="bundle",
    takes={"model": "model", "report": "report", "data": "dataset"},
    extra="runtime",
    packages=("onnxruntime-genai",),
)

EXAMPLE = "An example message, with digits 0123 and an é."
NOT_PAYLOAD = ("fidelity.json",)


class Params(method.Params):
    """Name, version and task as in slmops.yaml; `precision` of the model; the most new tokens it was judged with."""

    name: str
    version: str
    licence: str
    task: dict[str, Any]
    precision: str
    max_new_tokens: int


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Write the bundle into `out`.

    Raises:
        ModelError: the model does not load.
    """
    from slmops.engines import open_engine

    for source in sorted(path for path in inputs["model"].rglob("*") if path.is_file()):
        if source.name not in NOT_PAYLOAD:
            target = out / "model" / source.relative_to(inputs["model"])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for name in ("report.json", "report.html"):
        shutil.copyfile(inputs["report"] / name, out / name)
    fidelity = inputs["model"] / "fidelity.json"
    if fidelity.exists():
        shutil.copyfile(fidelity, out / "fidelity.json")
    instruction = params.task.get("instruction") or ""
    messages = [{"role": "system", "content": instruction}] if instruction else []
    messages.append({"role": "user", "content": EXAMPLE})
    engine = open_engine(out / "model", threads=ctx.threads)
    try:
        ids, context = engine.encode(messages), engine.context_length
    finally:
        engine.close()
    files = tuple(
        BundleFile(path=path.relative_to(out).as_posix(), size=path.stat().st_size, digest=digest_file(path))
        for path in sorted(out.rglob("*"))
        if path.is_file()
    )
    report = json.loads((inputs["report"] / "report.json").read_text())
    info = read_json(inputs["data"] / "info.json") or {}
    digests = {name: part["digest"] for name, part in info.get("files", {}).items()}
    manifest = Manifest(
        name=params.name,
        version=params.version,
        task=params.task,
        runtime=Runtime(name="onnxruntime-genai", version=version("onnxruntime-genai")),
        precision=params.precision,
        payload=payload_digest(files),
        files=files,
        chat_template=ChatTemplate(messages=tuple(messages), token_ids=tuple(ids)),
        limits=Limits(context_tokens=context, max_new_tokens=params.max_new_tokens),
        verdict=str(report.get("verdict", "")),
        provenance={"slmops": slmops.__version__, "data": digests},
        licences={"model": params.licence or "unstated"},
    )
    (out / NAME).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    verify(out)
    return {"payload": manifest.payload, "bytes": sum(file.size for file in files)}
