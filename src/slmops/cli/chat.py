"""`slmops chat`: talk to the result, or to any model of this machine, in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.cli.common import json_argument, open_project, project_arguments, say, seconds
from slmops.errors import ModelError, UsageError

if TYPE_CHECKING:
    from slmops.serve.local import Talker
    from slmops.serve.model import Piece

HELP = "talk to the result in the terminal; each line of standard input is a message"

EPILOG = (
    "Messages may also be piped in, one a line. Ctrl-D ends. With --json every answer is one JSON object on a line.\n\n"
    "  slmops chat                                    the bundle of the project here\n"
    "  slmops chat --model models/qwen3 --history     a model that was pulled or converted"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `chat` takes."""
    parser.add_argument("messages", nargs="*", metavar="MESSAGE", help="answer these and end")
    project_arguments(parser)
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="a bundle folder (default: the project's)")
    parser.add_argument("--model", type=Path, metavar="PLACE", help="a model's folder or GGUF file instead of a bundle")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--history", action="store_true", help="keep earlier turns as context (default for chat tasks)")
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Verify the bundle, load it, answer."""
    if options.temperature < 0:
        raise UsageError("--temperature must not be negative", "0 is greedy")
    if options.model is not None and options.bundle is not None:
        raise UsageError("--bundle and --model exclude each other", "leave one out")
    threads = max(1, options.threads)
    if options.model is not None:
        from slmops.serve.local import talker

        if not options.model.exists():
            raise UsageError(f"there is no {options.model}", "give a model's folder, or a GGUF file")
        model = talker(options.model, threads)
        try:
            _talk(options, model, options.model.name, [], None, options.history)
        finally:
            model.close()
        return 0
    _bundle(options, threads)
    return 0


def _bundle(options: argparse.Namespace, threads: int) -> None:
    from slmops.bundle.manifest import verify
    from slmops.serve.local import talker

    folder: Path = options.bundle if options.bundle is not None else open_project(options).outputs / "bundle"
    if not folder.is_dir():
        raise UsageError(f"there is no bundle at {folder}", "make it with `slmops run`")
    manifest = verify(folder)
    instruction = manifest.task.get("instruction") or ""
    model = talker(folder / "model", threads)
    try:
        if model.encode(list(manifest.chat_template.messages)) != list(manifest.chat_template.token_ids):
            raise ModelError(
                f"{folder}: this runtime tokenises otherwise than the one that was judged",
                "install the runtime that the manifest names",
            )
        opening = [{"role": "system", "content": instruction}] if instruction else []
        keep = options.history or manifest.task.get("type") == "chat"
        _talk(options, model, manifest.name, opening, manifest.limits.max_new_tokens, keep)
    finally:
        model.close()


def _talk(
    options: argparse.Namespace, model: Talker, name: str, opening: list[dict[str, str]], most: int | None, keep: bool
) -> None:
    """Answer messages until there are no more."""
    turns: list[dict[str, str]] = []
    for text in options.messages or _lines(name):
        turns = [*(turns if keep else []), {"role": "user", "content": text}]
        begun = time.perf_counter()
        pieces: list[Piece] = []
        try:
            for piece in model.say(model.encode(opening + turns), most, options.temperature):
                if options.messages and not options.json and not pieces:
                    print(f"> {text}")
                pieces.append(piece)
                if not options.json:
                    print(piece.text, end="", flush=True)
        except ModelError as error:
            if options.messages or not sys.stdin.isatty():
                raise
            say(f"error: {error.message}")
            turns = []
            continue
        took, tokens = time.perf_counter() - begun, sum(piece.tokens for piece in pieces)
        answer = "".join(piece.text for piece in pieces)
        turns.append({"role": "assistant", "content": answer})
        if options.json:
            finished = bool(pieces) and pieces[-1].finish == "stop"
            row = {"message": text, "answer": answer, "tokens": tokens, "finished": finished, "seconds": round(took, 5)}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            print(flush=True)
            if sys.stdin.isatty() and not options.messages:
                say(f"  ({tokens} tokens, {seconds(took)})")


def _lines(name: str) -> Iterator[str]:
    """Messages from the terminal or a pipe; empty lines are left out."""
    live = sys.stdin.isatty()
    if live:
        say(f"{name}: type a message, Ctrl-D ends")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing)
    while True:
        if live:
            try:
                text = input("> ")
            except EOFError:
                print()
                return
        else:
            text = sys.stdin.readline()
            if not text:
                return
        if text.strip():
            yield text.strip()
