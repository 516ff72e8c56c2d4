"""`slmops chat`: talk to the result in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from slmops.cli.common import json_argument, open_project, project_arguments, say, seconds
from slmops.errors import ModelError, UsageError

HELP = "talk to the result in the terminal; each line of standard input is a message"

EPILOG = (
    "Messages may also be piped in, one a line. Ctrl-D ends. With --json every answer is one JSON object on a line."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `chat` takes."""
    parser.add_argument("messages", nargs="*", metavar="MESSAGE", help="answer these and end")
    project_arguments(parser)
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="a bundle folder (default: the project's)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--history", action="store_true", help="keep earlier turns as context (default for chat tasks)")
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Verify the bundle, load it, answer."""
    from slmops.bundle.manifest import verify
    from slmops.core.engine import Sampling
    from slmops.engines import open_engine

    if options.bundle is not None:
        folder: Path = options.bundle
    else:
        folder = open_project(options).outputs / "bundle"
    if not folder.is_dir():
        raise UsageError(f"there is no bundle at {folder}", "make it with `slmops run`")
    if options.temperature < 0:
        raise UsageError("--temperature must not be negative", "0 is greedy")
    manifest = verify(folder)
    instruction = manifest.task.get("instruction") or ""
    keep = options.history or manifest.task.get("type") == "chat"
    engine = open_engine(folder / "model", threads=max(1, options.threads))
    try:
        if engine.encode(list(manifest.chat_template.messages)) != list(manifest.chat_template.token_ids):
            raise ModelError(
                f"{folder}: this runtime tokenises otherwise than the one that was judged",
                "install the runtime that the manifest names",
            )
        opening = [{"role": "system", "content": instruction}] if instruction else []
        turns: list[dict[str, str]] = []
        for text in options.messages or _lines(manifest.name):
            turns = [*(turns if keep else []), {"role": "user", "content": text}]
            sampling = Sampling(
                max_new_tokens=manifest.limits.max_new_tokens,
                temperature=options.temperature,
                seed=time.time_ns() % 2**31,
            )
            try:
                answer = engine.generate([engine.encode(opening + turns)], sampling)[0]
            except ModelError as error:
                if options.messages or not sys.stdin.isatty():
                    raise
                say(f"error: {error.message}")
                turns = []
                continue
            turns.append({"role": "assistant", "content": answer.text})
            if options.json:
                row = {
                    "message": text,
                    "answer": answer.text,
                    "tokens": len(answer.tokens),
                    "finished": answer.finished,
                    "seconds": round(answer.total_s, 5),
                }
                print(json.dumps(row, ensure_ascii=False), flush=True)
            else:
                if options.messages:
                    print(f"> {text}")
                print(answer.text, flush=True)
                if sys.stdin.isatty() and not options.messages:
                    say(f"  ({len(answer.tokens)} tokens, {seconds(answer.total_s)})")
    finally:
        engine.close()
    return 0


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
