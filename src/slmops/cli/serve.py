"""`slmops serve`: models as a service for many clients."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.cli.bench import named, positive
from slmops.cli.common import say
from slmops.cli.fit import amount
from slmops.errors import UsageError
from slmops.serve.engines import KINDS

if TYPE_CHECKING:
    from slmops.serve.gate import Rules

HELP = "serve models to many clients in OpenAI's and Ollama's dialects"

EPILOG = """\
A MODEL is a folder in the form of ONNX Runtime GenAI, such as the model of a bundle, one with a GGUF file or the file itself, or one in
the form of Hugging Face; or NAME=FOLDER. What it is decides which engine runs it. A folder of such folders is all of them, each
loaded when it is first asked. Low-rank adapters that were converted with the model, and those of --adapter, are asked for as
NAME+ADAPTER.

  slmops serve desk=outputs/demo/bundle/model
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
       -d '{"model": "desk", "messages": [{"role": "user", "content": "where is my parcel?"}]}'

To others, with keys and TLS:

  slmops keys add desk-app --file keys.json
  slmops serve desk=outputs/demo/bundle/model --host 0.0.0.0 --keys keys.json --tls-cert cert.pem --tls-key key.pem"""

MARKS = ("genai_config.json", "config.json")
"""Files that only the folder of a model has."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a file of models and their settings, in YAML")
    parser.add_argument("--host", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, help="0: any that is free (8000)")
    parser.add_argument("--rows", type=positive, metavar="N", help="answers at a time, of each model (8)")
    parser.add_argument("--queue", type=positive, metavar="N", help="requests that may wait for a row (256)")
    parser.add_argument("--context", type=positive, metavar="TOKENS", help="of prompt and answer (as the model can)")
    parser.add_argument(
        "--threads",
        type=_threads,
        metavar="N",
        help="CPU threads of each model (auto: as many as are fastest here)",
    )
    parser.add_argument(
        "--tell", type=float, metavar="MS",
        help="tokens of an answer that come within so many milliseconds are sent together (10); 0: each at once",
    )  # fmt: skip
    parser.add_argument("--engine", choices=KINDS, help="refuse models that are not for this one")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME+ADAPTER=PLACE",
        help="one more adapter of a model; may be repeated",
    )
    parser.add_argument(
        "--load", choices=("start", "fit", "demand"),
        help="when models are loaded: all at the start, at the start those that fit, or when they are first asked (fit)",
    )  # fmt: skip
    parser.add_argument(
        "--idle", type=waiting, metavar="SECONDS", help="unload a model so long after its last answer (never)"
    )
    parser.add_argument(
        "--memory",
        type=amount,
        metavar="SIZE",
        help="most that all models take together, such as 4G (80 %% of what is free)",
    )
    parser.add_argument(
        "--fallback", action="append", default=[], metavar="MODEL=SMALLER",
        help="who answers where MODEL cannot in time, or for want of memory; may be given many times",
    )  # fmt: skip
    parser.add_argument(
        "--definitions",
        type=Path,
        metavar="FOLDER",
        help="where what /api/create makes is kept (the user's data folder)",
    )
    who = parser.add_argument_group("who may ask")
    who.add_argument(
        "--keys", type=Path, metavar="FILE", help="keys that are let in, see `slmops keys`; read again when it changes"
    )
    who.add_argument(
        "--no-keys", action="store_true", help="let everybody in who reaches another address than this machine's own"
    )
    who.add_argument("--no-admin", action="store_true", help="have no /admin: models are not changed from outside")
    who.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients may call this server by, beside its own",
    )
    who.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages that may ask, such as https://desk.example.com; * with keys",
    )
    who.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="certificate chain (PEM); taken again when it changes"
    )
    who.add_argument("--tls-key", type=Path, metavar="FILE", help="its key (PEM)")
    bounds = parser.add_argument_group("limits, of each key unless it has its own")
    bounds.add_argument("--requests-per-minute", type=positive, metavar="N", help="more get 429 (no limit)")
    bounds.add_argument(
        "--tokens-per-minute", type=positive, metavar="N", help="read and written; beyond, 429 (no limit)"
    )
    bounds.add_argument("--answers", type=positive, metavar="N", help="at a time; more get 429 (no limit)")
    bounds.add_argument(
        "--deadline",
        type=positive,
        metavar="SECONDS",
        help="for a whole request; X-Request-Timeout may shorten it (no limit)",
    )
    seen = parser.add_argument_group("what it tells, beside /metrics")
    seen.add_argument("--log", metavar="FILE", help="a line of JSON for each request; -: on standard error")
    seen.add_argument("--log-prompts", action="store_true", help="with the texts that are asked and said")
    seen.add_argument(
        "--traces",
        metavar="URL",
        help="OpenTelemetry spans to a collector (OTLP over HTTP); also by OTEL_EXPORTER_OTLP_ENDPOINT",
    )


def waiting(text: str) -> float:
    """Seconds, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("give seconds, 0 or more")
    return value


def _threads(text: str) -> int:
    return 0 if text == "auto" else positive(text)


def adapters_of(given: Sequence[str], models: Collection[str]) -> dict[str, dict[str, Path]]:
    """Places of adapters by model and name.

    Raises:
        UsageError: one is not written NAME+ADAPTER=PLACE, is of no model, or is given twice.
    """
    found: dict[str, dict[str, Path]] = {}
    for text in given:
        names, equals, place = text.partition("=")
        model, plus, adapter = names.rpartition("+")
        if not (equals and plus and model and adapter and place):
            raise UsageError(f"--adapter {text} names no adapter and its place", "write NAME+ADAPTER=PLACE")
        if model not in models:
            raise UsageError(f"--adapter {text}: there is no model {model}", f"there are: {', '.join(models)}")
        if adapter in found.setdefault(model, {}):
            raise UsageError(f"--adapter {text}: {names} is there already", "give it another name")
        found[model][adapter] = Path(place)
    return found


def run(options: argparse.Namespace) -> int:
    """Serve until the process is told to end."""
    from slmops.cli import serve_file
    from slmops.serve.app import serve
    from slmops.serve.model import Settings
    from slmops.serve.tls import Certificate

    if bool(options.models) == bool(options.config):
        raise UsageError(
            "no models are given" if not options.models else "models are given twice", "give MODEL, or --config FILE"
        )
    spec = serve_file.read(options.config) if options.config else None

    def said(key: str, otherwise: object) -> object:
        given = getattr(options, key)
        given = getattr(spec, key) if given is None and spec is not None else given
        return otherwise if given is None else given

    port = said("port", 8000)
    if not isinstance(port, int) or not 0 <= port <= 65535:
        raise UsageError(f"--port {port} is no port", "give 1 to 65535, or 0 for any that is free")
    keys = {"rows": 8, "context": None, "threads": 0, "queue": 256, "load": "fit", "idle": None, "engine": None}
    tell_ms = said("tell", 10.0)
    if not isinstance(tell_ms, float | int) or not 0 <= tell_ms <= 1000:
        raise UsageError(f"--tell {tell_ms} is out of range", "give 0 to 1000 milliseconds")
    common = Settings(Path(), "", tell_ms=tell_ms, **{key: said(key, otherwise) for key, otherwise in keys.items()})  # type: ignore[arg-type]
    if spec is not None:
        wanted = serve_file.settings(spec, options.config, common)
    else:
        wanted = []
        for name, folder in named(options.models).items():
            inside = folders(folder)
            load = common.load if options.load else "demand"
            wanted += [replace(common, folder=one, name=_inner(options.models, name, one), load=load) for one in inside]
            wanted += [] if inside else [replace(common, folder=folder, name=name)]
    for text in options.fallback:
        name, _, other = text.partition("=")
        if name not in [one.name for one in wanted] or not other:
            raise UsageError(f"--fallback {text}: no model is called {name}", "give --fallback MODEL=SMALLER")
        wanted = [replace(one, fallback=other) if one.name == name else one for one in wanted]
    twice = {one.name for one in wanted if sum(other.name == one.name for other in wanted) > 1}
    if twice:
        raise UsageError(f"two models are called {min(twice)}", "give them names: NAME=FOLDER")
    adapters = adapters_of(options.adapter, [one.name for one in wanted])
    wanted = [replace(one, adapters={**one.adapters, **adapters.get(one.name, {})}) for one in wanted]
    memory = said("memory", None)
    tried = serve_file.trials(spec, options.config) if spec is not None else []
    host = str(said("host", "127.0.0.1"))
    rules = _rules(options, host)
    certificate = None
    if options.tls_cert or options.tls_key:
        if not (options.tls_cert and options.tls_key):
            raise UsageError("--tls-cert and --tls-key go together", "give both")
        certificate = Certificate(options.tls_cert, options.tls_key)
    tell, stops = _told(options)
    try:
        serve(
            wanted, host, port, _say, None if memory is None else int(amount(str(memory))), tried, options.definitions, rules,
            tell, certificate,
        )  # fmt: skip
    finally:
        for stop in stops:
            stop()
    return 0


def _told(options: argparse.Namespace) -> tuple[list[Any], list[Callable[[], Any]]]:
    """Who gets every request that is over, and what ends them."""
    from slmops.serve.log import Log, LogFile

    tell: list[Any] = []
    stops: list[Callable[[], Any]] = []
    if options.log_prompts and not options.log:
        raise UsageError("--log-prompts is for a log", "give --log FILE too")
    if options.log == "-":
        tell.append(Log(sys.stderr).tell)
    elif options.log:
        try:
            file = LogFile(Path(options.log))
        except OSError as error:
            raise UsageError(f"{options.log} cannot be written: {error.strerror}", "give another --log") from error
        tell.append(Log(file).tell)
        stops.append(file.close)
    standard = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if options.traces or any(os.environ.get(name) for name in standard):
        from slmops.serve.traces import Traces

        traces = Traces(options.traces or "")
        tell.append(traces.tell)
        stops.append(traces.stop)
    return tell, stops


def _say(line: str) -> None:
    """A line for people, who may have stopped listening to a server that goes on."""
    with contextlib.suppress(OSError):
        say(line)


def _rules(options: argparse.Namespace, host: str) -> Rules:
    """Who is let in, and how often."""
    from slmops.serve.gate import Rules
    from slmops.serve.keys import Keys
    from slmops.serve.limits import Accounts, Limits
    from slmops.serve.origins import Origins, is_loopback

    away = not is_loopback(host)
    if options.keys and options.no_keys:
        raise UsageError("--keys and --no-keys exclude each other", "leave one out")
    if away and not (options.keys or options.no_keys):
        raise UsageError(
            f"others can reach {host}, and no keys are asked for",
            "make some with `slmops keys add NAME` and give --keys keys.json, or say --no-keys",
        )
    for origin in options.cors:
        if origin == "*" and not options.keys:
            raise UsageError(
                "--cors * lets every page that somebody visits ask", "name the origins, or give --keys too"
            )
        if origin != "*" and ("://" not in origin or origin.endswith("/")):
            raise UsageError(
                f"--cors {origin} is no origin", "write it as browsers do: https://desk.example.com, no path"
            )
    if away and options.keys and not options.tls_cert:
        say(
            "keys go over the network as they are: give --tls-cert and --tls-key, or put what ends TLS before this server"
        )
    origins = Origins.of(
        host,
        bool(options.keys),
        frozenset(name.lower() for name in options.allow_host),
        frozenset(options.cors),
    )
    limits = Limits(options.requests_per_minute, options.tokens_per_minute, options.answers)
    keys = Keys(options.keys, say=_say) if options.keys else None
    return Rules(origins, keys, Accounts(limits), options.deadline, options.log_prompts, not options.no_admin)


def folders(folder: Path) -> list[Path]:
    """The models in a folder of models; none if it is no such folder."""
    if not folder.is_dir() or _is_model(folder):
        return []
    return sorted(inner for inner in folder.iterdir() if inner.is_dir() and _is_model(inner))


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS) or any(folder.glob("*.gguf"))


def _inner(given: list[str], name: str, folder: Path) -> str:
    """What a model in a folder of models is called: its own name, behind that of the folder where it was given one."""
    return f"{name}/{folder.name}" if any(text.startswith(f"{name}=") for text in given) else folder.name
