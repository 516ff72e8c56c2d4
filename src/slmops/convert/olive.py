"""Method `convert.olive`: a workflow of Olive runs on the trained student, and what comes out is checked and judged like our own.

Olive (https://microsoft.github.io/Olive) runs in an environment of its own. Of the user's configuration file all passes are taken as
they are; what slmops decides is `adapt`'s: the input model, the folders, and the calibration data of a pass that names none (or
that names the data config `slmops`): examples of the project's training split, in a local file, where Olive would fetch a set from
the hub. The workflow has to end with an ONNX Runtime GenAI folder (`ModelBuilder`) for the CPU.

`check` refuses a file that cannot come to that before anything runs. The result gets the student's own tokenizer files, and is
compared with torch on validation prompts (`fidelity`); only a workflow that rounds nothing has to agree. Where a folder stands in
place of the file, it is what Olive made of this student earlier: it is taken as it is, and checked all the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from slmops.core import runtimes
from slmops.core.environment import Environment, requirements
from slmops.core.method import Context, Declaration, Facts
from slmops.core.method import Params as BaseParams
from slmops.core.spec import Positive
from slmops.errors import ConversionError, ToolError, UsageError

ENVIRONMENT = Environment(
    "olive", requirements(Path(__file__).with_name("olive.txt").read_text(encoding="utf-8")), size=1_800_000_000
)
DECLARATION = Declaration(
    name="convert.olive",
    version="1",
    makes="model",
    takes={"model": "model", "config": "file", "data": "dataset", "synthetic?": "dataset", "augmented?": "dataset"},
    extra="convert",
    packages=("onnxruntime-genai", "onnxruntime", "torch", "transformers"),
    environment=ENVIRONMENT,
)

BUILDERS = ("modelbuilder",)
"""Types of passes, in small letters, that write a folder for ONNX Runtime GenAI."""
CALIBRATED = ("autoclip", "autogptq", "gptq", "gptqmodel", "gptqquantizer", "autoawqquantizer", "sparsegpt")
"""Types of passes that take `data_config`, and fetch a dataset if there is none."""
DATA = "slmops"
"""The data config of the project's training examples."""
UNUSED = (
    "evaluator",
    "evaluators",
    "evaluate_input_model",
    "packaging_config",
    "azureml_client",
    "workflow_host",
    "plot_pareto_frontier",
)
"""Keys of a workflow that are taken out: the report judges, and nothing is sent anywhere."""
TAKEN = (".onnx", ".onnx.data", ".onnx_data", "genai_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class Params(BaseParams):
    """`files` of examples, as `input/file`, of which `examples` are what a pass calibrates on."""

    files: tuple[str, ...]
    examples: Positive = 256
    fidelity_prompts: Positive = 32
    min_token_agreement: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99


def covers(params: Params, config: Path) -> tuple[Path, ...]:
    """The files that a workflow reads: its own, and those beside it that it names. Of a folder, those of the model in it.

    Raises:
        ConversionError: the folder holds no model that runs, see `found_model`.
        UsageError: see `check`.
    """
    if config.is_dir():
        return tuple(path for path in sorted(found_model(config).iterdir()) if path.is_file())
    tree = read(config)
    check(tree, config)
    return (config, *sorted(set(_files(tree, config.parent).values())))


def read(file: Path) -> dict[str, Any]:
    """A workflow, from JSON or YAML.

    Raises:
        UsageError: it is neither.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    hint = "give the JSON or YAML that `olive run --config` takes"
    try:
        text = file.read_text(encoding="utf-8-sig")
        tree = YAML(typ="safe").load(text) if file.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", hint) from error
    except (ValueError, YAMLError) as error:
        raise UsageError(f"{file}: not a configuration of Olive: {str(error).splitlines()[0]}", hint) from error
    if not isinstance(tree, dict):
        raise UsageError(f"{file}: not a configuration of Olive: it maps no keys to values", hint)
    engine = tree.pop("engine", None)
    return {**engine, **tree} if isinstance(engine, dict) else tree


def passes(tree: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and settings of a workflow's passes, in their order; of several under one name each."""
    found = tree.get("passes")
    listed = found.items() if isinstance(found, dict) else ()
    return [
        (str(name), one)
        for name, value in listed
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, dict)
    ]


def _type(settings: Mapping[str, Any]) -> str:
    return str(settings.get("type", "")).lower()


def _config(settings: dict[str, Any]) -> dict[str, Any]:
    """Where a pass has its parameters: beside `type`, or in older files under `config`."""
    inner = settings.get("config")
    return inner if isinstance(inner, dict) else settings


def check(tree: Mapping[str, Any], file: Path) -> None:
    """Refuse a workflow that cannot come to a model that slmops runs.

    Raises:
        UsageError: with the key.
    """

    def wrong(message: str, hint: str) -> UsageError:
        return UsageError(f"{file}: {message}", hint)

    kind = tree.get("input_model", {}).get("type", "HfModel") if isinstance(tree.get("input_model", {}), dict) else ""
    if str(kind).lower() not in ("hfmodel", "hfmodelhandler"):
        raise wrong(
            f"input_model is {kind or 'no mapping'}", "slmops gives the student in Hugging Face form: an HfModel"
        )
    listed = passes(tree)
    if not listed:
        raise wrong("there are no passes", "add passes, the last one a ModelBuilder")
    if not any(_type(one) in BUILDERS for _name, one in listed):
        kinds = ", ".join(str(one.get("type")) for _name, one in listed)
        raise wrong(
            f"no pass writes a folder for ONNX Runtime GenAI (there are: {kinds})",
            'end with {"type": "ModelBuilder", "precision": "int4"}',
        )
    if tree.get("search_strategy"):
        raise wrong(
            "search_strategy is set", "slmops runs one workflow: take it out, or write a file for each candidate"
        )
    known = {DATA, *(str(c.get("name")) for c in tree.get("data_configs") or () if isinstance(c, dict))}
    for name, one in listed:
        data = _config(one).get("data_config")
        if isinstance(data, str) and data not in known:
            raise wrong(
                f"passes.{name}.data_config: there is no data config {data}",
                f"these are there: {', '.join(sorted(known))}",
            )
    systems = tree.get("systems") or {}
    for name, system in systems.items() if isinstance(systems, dict) else ():
        if str(system.get("type", "LocalSystem")).lower() != "localsystem":
            raise wrong(f"systems.{name} is a {system['type']}", "slmops runs Olive on this machine: use a LocalSystem")
        for accelerator in _config(system).get("accelerators") or ():
            providers = [str(p[0] if isinstance(p, list) else p) for p in accelerator.get("execution_providers") or ()]
            other = next((p for p in providers if p != "CPUExecutionProvider"), None)
            if other or str(accelerator.get("device", "cpu")).lower() != "cpu":
                raise wrong(
                    f"systems.{name} is for {other or accelerator['device']}",
                    "slmops judges what runs on the CPU: use CPUExecutionProvider",
                )


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _strings(inner)


def _files(tree: Mapping[str, Any], base: Path) -> dict[str, Path]:
    """Relative names in a workflow that are files in its folder, such as data and user scripts."""
    named = {
        s for s in _strings(tree) if 0 < len(s) < 1000 and "." in s and "\n" not in s and not Path(s).is_absolute()
    }
    return {s: base / s for s in named if ".." not in Path(s).parts and (base / s).is_file()}


def adapt(
    tree: Mapping[str, Any], base: Path, model: Path, calibration: Path, longest: int, work: Path
) -> dict[str, Any]:
    """The workflow as it is run.

    Args:
        tree: what `read` gave.
        base: the folder of its file, which relative names in it are of.
        model: the student's folder.
        calibration: JSON Lines with `messages`.
        longest: tokens of the model's context.
        work: an empty folder for what Olive writes.
    """
    places = {name: str(path.absolute()) for name, path in _files(tree, base).items()}

    def placed(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: placed(value) for key, value in node.items()}
        return (
            [placed(value) for value in node]
            if isinstance(node, list)
            else places.get(node, node)
            if isinstance(node, str)
            else node
        )

    found: dict[str, Any] = {key: placed(value) for key, value in tree.items() if key not in UNUSED}
    given = found.get("input_model") or {}
    kept = {key: value for key, value in given.items() if key in ("task", "load_kwargs", "model_attributes")}
    found["input_model"] = {"type": "HfModel", **kept, "model_path": str(model)}
    for _name, one in passes(found):
        if _type(one) in CALIBRATED and not _config(one).get("data_config"):
            _config(one)["data_config"] = DATA
    configs = [config for config in found.get("data_configs") or () if config.get("name") != DATA]
    found["data_configs"] = [
        *configs,
        {
            "name": DATA, "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "json", "data_files": str(calibration), "split": "train"},
            "pre_process_data_config": {
                "chat_template": True, "strategy": "line-by-line", "max_seq_len": longest, "pad_to_max_len": False,
            },
            "dataloader_config": {"batch_size": 1},
        },
    ]  # fmt: skip
    if not found.get("systems"):
        accelerators = [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]
        found["systems"] = {"this": {"type": "LocalSystem", "accelerators": accelerators}}
        found["host"] = found["target"] = "this"
    return found | {"output_dir": str(work / "out"), "cache_dir": str(work / "cache"), "log_severity_level": 1}


def rounds(tree: Mapping[str, Any]) -> bool:
    """Whether a workflow does more to the weights than to write them in float32."""
    return any(
        _type(one) not in BUILDERS or str(_config(one).get("precision", "fp32")) != "fp32" for _n, one in passes(tree)
    )


def run(params: Params, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
    """Run the workflow `inputs["config"]` on `inputs["model"]`, take its result into `out`, and check that.

    Raises:
        ConversionError: the architecture cannot run, or Olive failed, or its result is no model that runs here.
        ToolError: Olive's environment cannot be made.
        UsageError: see `check`.
    """
    from slmops.engines import detect, fidelity, read_json
    from slmops.store import environments
    from slmops.store.files import remove_tree

    source, file = inputs["model"], inputs["config"]
    if detect(source) != "torch":
        raise ConversionError(f"{source} is not a Hugging Face model", "convert the trained model, not a converted one")
    config = read_json(source / "config.json")
    refusal = runtimes.onnx_genai(config)
    if refusal:
        raise ConversionError(*refusal)
    examples = fidelity.choose(inputs["data"], params.fidelity_prompts)
    if file.is_dir():
        take(found_model(file), source, out, own=True)
        agreed = fidelity.check(source, out, examples, "as Olive made it", params.min_token_agreement, ctx)
        return facts_of(out, agreed, [], 0)
    tree = read(file)
    check(tree, file)
    python = environments.ensure(ENVIRONMENT, ctx.progress)
    work = ctx.scratch / "olive"
    remove_tree(work)
    work.mkdir(parents=True)
    calibration = write_calibration(params, inputs, work / "calibration.jsonl")
    adapted = adapt(tree, file.parent, source, work / "calibration.jsonl", int(config["max_position_embeddings"]), work)
    (work / "workflow.json").write_text(json.dumps(adapted, indent=2), encoding="utf-8")
    ctx.progress.start("running the Olive workflow")
    try:
        variables = {
            "OMP_NUM_THREADS": str(ctx.threads),
            "OLIVE_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        environments.run(
            python, "olive", ["run", "--config", str(work / "workflow.json")], log=ctx.scratch / "olive.log",
            progress=ctx.progress, folder=work, variables=variables,
        )  # fmt: skip
    except ToolError as error:
        raise ConversionError(f"Olive failed: {error.message}", _hint(error)) from error
    finally:
        ctx.progress.stop()
    made = found_model(work / "out")
    take(made, source, out)
    precision = "rounded" if rounds(tree) else "fp32"
    agreed = fidelity.check(source, out, examples, precision, params.min_token_agreement, ctx)
    remove_tree(work)
    used = any(_config(one).get("data_config") == DATA for _n, one in passes(adapted))
    return facts_of(out, agreed, [str(one.get("type")) for _name, one in passes(tree)], calibration if used else 0)


def facts_of(out: Path, agreed: Mapping[str, Any], types: list[str], examples: int) -> Facts:
    """What the record says of a result: passes and calibration examples as far as they are known, bytes, agreement."""
    return {
        "passes": types,
        "calibration_examples": examples,
        "model_bytes": sum(f.stat().st_size for f in out.glob("*.onnx*")),
        "token_agreement": agreed["token_agreement"],
        "mean_kl": agreed["mean_kl"],
    }


def _hint(error: ToolError) -> str:
    offline = ("LocalEntryNotFoundError", "ConnectionError", "OfflineModeIsEnabled", "Couldn't reach", "Couldn't find")
    if any(word in error.message for word in offline):
        return f"the workflow fetches something that cannot be reached; for calibration data name the data config `{DATA}`. {error.hint}"
    return error.hint


def write_calibration(params: Params, inputs: Mapping[str, Path], file: Path) -> int:
    """The `params.examples` training examples with the smallest ids, one a line as `messages`; returns how many there are.

    Raises:
        DataError: there is none.
    """
    from slmops.engines.tokenizer import examples_of
    from slmops.errors import DataError

    found = {(example.id, example.answer or ""): example for example in examples_of(inputs, params.files)}
    if not found:
        raise DataError("there is no example to calibrate on", f"the files are: {', '.join(params.files)}")
    chosen = [found[key] for key in sorted(found)[: params.examples]]
    rows = (json.dumps({"messages": example.messages()}, ensure_ascii=False) for example in chosen)
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return len(chosen)


def found_model(output: Path) -> Path:
    """The folder for ONNX Runtime GenAI in what Olive wrote.

    Raises:
        ConversionError: there is none, or several.
    """
    folders = sorted({path.parent for path in output.rglob("genai_config.json")})
    if len(folders) > 1:
        names = ", ".join(str(folder.relative_to(output)) for folder in folders)
        raise ConversionError(f"Olive wrote several models: {names}", "give a workflow that ends with one")
    if not folders:
        graphs = sorted(str(path.relative_to(output)) for path in output.rglob("*.onnx"))
        what = f"only {graphs[0]}" if graphs else "no ONNX model"
        raise ConversionError(
            f"the workflow ended with {what} and no genai_config.json, which ONNX Runtime GenAI needs",
            "end the workflow with a ModelBuilder pass",
        )
    return folders[0]


def take(made: Path, source: Path, out: Path, own: bool = False) -> None:
    """Copy a model that Olive wrote, with the tokenizer files of the folder that it was made from.

    Args:
        own: prefer tokenizer files that lie beside the model.
    """
    for path in sorted(made.iterdir()):
        if path.is_file() and path.name.endswith(TAKEN):
            shutil.copyfile(path, out / path.name)
    for name in TOKENIZER_FILES:
        given = made / name if own and (made / "tokenizer.json").is_file() else source / name
        if given.is_file():
            shutil.copyfile(given, out / name)
    settings = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    if settings["model"].get("bos_token_id", 0) is None:
        del settings["model"]["bos_token_id"]
    (out / "genai_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
