"""`slmops fidelity`: what each form of a model keeps of the one that it was made from, and which hop broke it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from slmops.cli.bench import named, positive
from slmops.cli.common import cores, json_argument, open_project, print_json, project_arguments, say
from slmops.core.layout import columns
from slmops.core.words import EXACT, ROUNDED, Expect
from slmops.errors import UsageError

if TYPE_CHECKING:
    from slmops.core.fidelity import Link

HELP = "show what each form of a model keeps of the one before, and which hop broke it"

EPILOG = """\
Without a MODEL: the hops of the last run of the project, from the teacher to every form of the student.
With models, each is compared with the one before it. A MODEL is a folder in the form of Hugging Face, ONNX Runtime GenAI or GGUF,
or NAME=FOLDER. What a hop may change is seen from the folder: nothing if it was converted in fp32 or fp16, else the order
of tokens of about the same probability (rounded), anything between two folders of Hugging Face (learned);
--expect says it for each hop.

  slmops fidelity trained merged outputs/demo/gguf-q4_0 --expect exact,rounded --prompts messages.txt

exit codes: 0 no hop broke the model, 3 a hop did"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `fidelity` takes."""
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="messages, one a line (default: validation prompts of the project)"
    )
    parser.add_argument("--count", type=positive, default=32, metavar="N", help="at most so many of them (32)")
    parser.add_argument(
        "--expect",
        metavar="KIND,…",
        help=f"what each hop may change: {', '.join(get_args(Expect))}, with commas between",
    )
    parser.add_argument(
        "--exact", type=_share, default=EXACT, metavar="SHARE", help=f"of next tokens that an exact hop keeps ({EXACT})"
    )
    parser.add_argument(
        "--rounded",
        type=_share,
        default=ROUNDED,
        metavar="SHARE",
        help=f"of the probability of its choices that a hop which rounds keeps ({ROUNDED})",
    )
    project_arguments(parser)
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print the hops; the exit code says whether one broke the model."""
    from slmops.core.fidelity import verdict

    hops = _measured(options) if options.models else _of_last_run(options)
    if options.json:
        print_json({"hops": hops, "verdict": verdict(hops)})
    else:
        from slmops.evaluate.text import broken_lines, hop_rows

        for line in columns(hop_rows(hops), right=range(1, 5)):
            print(line)
        print("\n" + "\n".join(broken_lines(hops) or [verdict(hops)]))
    return 3 if any(hop["broke"] for hop in hops) else 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("give a share from 0 to 1")
    return value


def _of_last_run(options: argparse.Namespace) -> list[dict[str, Any]]:
    from slmops.store.files import read_json

    project = open_project(options)
    report = read_json(project.outputs / "report.json")
    hops: list[dict[str, Any]] = list((report or {}).get("hops", ()))
    if not hops:
        raise UsageError(f"there is no comparison of {project.spec.name} yet", "make it with `slmops run`")
    return hops


def _measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    import tempfile

    from slmops.core.fidelity import judge
    from slmops.engines import chain, open_engine

    folders = named(options.models)
    if len(folders) < 2:
        raise UsageError("one model has no hop", "give at least two, each made from the one before")
    links = chained(folders, options.expect)
    examples = _examples(options)
    say(f"models: {len(links)}, prompts: {len(examples)}")
    with tempfile.TemporaryDirectory() as work:
        met = chain.measure(
            links, lambda link: (open_engine(folders[link.name], threads=cores()), folders[link.name]), examples,
            lambda _link, example: example.prompt_messages(), Path(work), lambda name: say(f"  {name}"),
        )  # fmt: skip
    hops = [judge(link, met[link.name], options.exact, options.rounded) for link in links[1:]]
    return [hop.model_dump(mode="json") for hop in hops]


def chained(folders: dict[str, Path], expect: str | None) -> list[Link]:
    """Each folder as a link that comes from the one before.

    Raises:
        UsageError: `expect` has other words than it may, or not one for each hop.
        ModelError: a folder is no model.
    """
    from slmops.core.fidelity import Link
    from slmops.engines import detect
    from slmops.store.files import read_json

    runtimes = {name: detect(folder) for name, folder in folders.items()}
    given = expect.split(",") if expect else []
    wrong = next((word for word in given if word not in get_args(Expect)), None)
    if wrong is not None:
        raise UsageError(f"--expect: there is no {wrong!r}", f"give {', '.join(get_args(Expect))}")
    if given and len(given) != len(folders) - 1:
        raise UsageError(f"--expect has {len(given)} words for {len(folders) - 1} hops", "give one for each hop")
    names, links = list(folders), []
    for place, (name, folder) in enumerate(folders.items()):
        precision = (read_json(folder / "fidelity.json") or {}).get("precision")
        kind: Any = "learned" if runtimes[name] == "torch" else "exact" if precision in ("fp32", "fp16") else "rounded"
        if place and given:
            kind = given[place - 1]
        parent = names[place - 1] if place else None
        near = kind == "rounded" and place > 0 and {runtimes[name], runtimes[names[place - 1]]} == {"torch"}
        links.append(Link(name=name, parent=parent, expects=kind, runtime=runtimes[name], near=near))
    return links


def _examples(options: argparse.Namespace) -> list[Any]:
    """The prompts: of the file, else of the project's validation split."""
    from slmops.core.example import Example, Message

    if options.prompts is None:
        from slmops.engines.fidelity import choose
        from slmops.flow.state import State

        project = open_project(options)
        state = State(project, notes=False)
        data = next(s for s in state.survey(project.plan()) if s.step.id == "data")
        if data.output is None:
            raise UsageError(
                "the project's data are not prepared yet", "run `slmops run data`, or give messages with --prompts"
            )
        return choose(state.store.path(data.output), options.count)
    try:
        lines = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{options.prompts} cannot be read: {error}", "give a text file, one message a line"
        ) from error
    found = [Example((Message("user", line),), None, "gold") for line in lines if line][: options.count]
    if not found:
        raise UsageError(f"{options.prompts} holds no message", "give one message a line")
    return found
