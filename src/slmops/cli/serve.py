"""`slmops serve`: models as a service for many clients."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmops.cli.bench import named, positive
from slmops.cli.common import cores, say
from slmops.errors import UsageError

HELP = "serve models to many clients in OpenAI's dialect"

EPILOG = """\
A MODEL is a folder in the form of ONNX Runtime GenAI, such as the model of a bundle, or NAME=FOLDER.

  slmops serve desk=outputs/demo/bundle/model
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
       -d '{"model": "desk", "messages": [{"role": "user", "content": "where is my parcel?"}]}'"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (8000)")
    parser.add_argument("--rows", type=positive, default=8, metavar="N", help="answers at a time, of each model (8)")
    parser.add_argument(
        "--queue", type=positive, default=256, metavar="N", help="requests that may wait for a row (256)"
    )
    parser.add_argument("--context", type=positive, metavar="TOKENS", help="of prompt and answer (as the model can)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of each model (all cores)")


def run(options: argparse.Namespace) -> int:
    """Serve until the process is told to end."""
    from slmops.serve.app import serve
    from slmops.serve.model import Settings

    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port} is no port", "give 1 to 65535, or 0 for any that is free")
    threads = options.threads or cores()
    wanted = [
        Settings(Path(folder), name, options.rows, options.context, threads, options.queue)
        for name, folder in named(options.models).items()
    ]
    serve(wanted, options.host, options.port, say)
    return 0
