"""The servers that `serving.py` measures: how each is had, started and asked. With `--genai FOLDER THREADS` it is the driver of one.

slmops             `slmops serve`
llama-server       llama.cpp's own server, built here from the sources that llama-cpp-python ships
llama-cpp-python   `python -m llama_cpp.server`, in an environment of its own
ONNX GenAI Engine  `onnxruntime_genai.Engine` in a process, asked over a pipe: it has no server
Foundry Local      the web service of its SDK, in an environment of its own; `serving_foundry.py` beside this starts it
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops.core.environment import Environment
from slmops.core.method import Progress
from slmops.store import environments

VERSION = "0.3.36"
PEERS = Environment(
    "serving-peers",
    (f"llama-cpp-python=={VERSION}",
     "annotated-doc==0.0.7", "annotated-types==0.8.0", "anyio==4.16.0", "click==8.5.1", "diskcache==5.6.3",
     "fastapi==0.165.0", "h11==0.16.0", "idna==3.20", "Jinja2==3.1.6", "MarkupSafe==3.0.4", "numpy==2.4.6",
     "opentelemetry-api==1.45.2", "packaging==26.4", "pydantic==2.14.4", "pydantic-settings==2.16.3",
     "pydantic_core==2.50.5", "python-dotenv==1.2.4", "PyYAML==6.0.4", "sse-starlette==3.7.0",
     "starlette==1.10.0", "starlette-context==0.3.6", "typing-inspection==0.4.5",
     "typing_extensions==4.16.0", "uvicorn==0.54.0"),
    250_000_000,
)  # fmt: skip
FOUNDRY = Environment(
    "serving-foundry",
    ("foundry-local-sdk==2.2.1", "onnxruntime==1.31.0", "onnxruntime-genai-core==0.18.0",
     "annotated-types==0.8.0", "anyio==4.16.0", "certifi==2026.10.19.post1", "cffi==2.1.1", "charset-normalizer==3.5.3",
     "flatbuffers==25.12.19", "h11==0.16.0", "httpcore2==2.16.2", "httpx2==2.16.2", "idna==3.20", "jiter==0.19.0",
     "numpy==2.4.6", "openai==3.57.0", "packaging==26.4", "protobuf==7.36.2", "pycparser==3.12", "pydantic==2.14.4",
     "pydantic_core==2.50.5", "requests==2.34.2", "sniffio==1.3.1", "truststore==0.10.5",
     "typing_extensions==4.16.0", "typing-inspection==0.4.5", "urllib3==2.8.0"),
    300_000_000,
)  # fmt: skip
FLAGS = ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_UI=OFF",
         "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF")  # fmt: skip
SYSTEMS = ("slmops", "llama-server", "llama-cpp-python", "ONNX GenAI Engine", "Foundry Local")
PATIENCE_S = 300.0


def llama_server(folder: Path, progress: Progress) -> Path:
    """The program, which is built where it is not there yet (about 11 minutes of one core; needs cmake and a C++ compiler)."""
    source = folder / f"llama-cpp-python-{VERSION}"
    program = source / "build" / "bin" / "llama-server"
    if program.is_file():
        return program
    missing = [name for name in ("cmake", "c++") if not shutil.which(name)]
    if missing:
        raise SystemExit(
            f"llama-server is built here and needs {' and '.join(missing)}; or leave it out: --skip llama-server"
        )
    progress.log(f"building llama-server in {source}")
    if not (source / "llama.cpp").is_dir():
        _sources(source)
    build, log = source / "build", source / "build.log"
    with log.open("w") as file:  # thousands of lines of warnings
        for command in (
            ["-S", str(source / "llama.cpp"), "-B", str(build), *(f"-D{flag}" for flag in FLAGS)],
            ["--build", str(build), "--target", "llama-server", "-j", str(os.cpu_count() or 1)],
        ):
            if subprocess.run(["cmake", *command], stdout=file, stderr=subprocess.STDOUT).returncode:
                raise SystemExit(f"llama-server could not be built: see {log}; or leave it out: --skip llama-server")
    return program


def _sources(source: Path) -> None:
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*command, "-d", str(source), f"llama-cpp-python=={VERSION}"], check=True)
    (packed,) = source.glob("*.tar.gz")
    inner = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
    with tarfile.open(packed) as file:
        file.extractall(source, [m for m in file.getmembers() if m.name.startswith(inner)], filter="data")
    (source / inner).rename(source / "llama.cpp")
    packed.unlink()


class Server:
    """A server that runs.

    Attributes:
        api: where its paths begin.
        body: of a request; it makes it write a fixed number of tokens.

    Args:
        files: of the model: `onnx` (the folder of slmops, which Foundry Local takes too), `genai` (that of GenAI's builder), `gguf`.
        cores: it may use these.
        streams: it has to answer so many at a time.
        tell: of slmops.
    """

    def __init__(
        self, system: str, files: dict[str, Path], *, cores: Sequence[int], streams: int, context: int, tokens: int, end: int,
        tools: dict[str, Path], log: Path, tell: float = 10.0,
    ) -> None:  # fmt: skip
        self.system, self.port = system, _free_port()
        self.api = "/v1"
        self.body: dict[str, Any] = {"model": "m", "max_tokens": tokens, "temperature": 0.0}
        threads, port = str(len(cores)), str(self.port)
        variables = dict(os.environ) | {"OMP_NUM_THREADS": threads}
        if system == "slmops":
            start = "import sys; from slmops.cli.main import main; sys.exit(main())"
            command = [sys.executable, "-c", start, "serve", f"m={files['onnx']}", "--rows", str(streams), "--context",
                       str(context), "--threads", threads, "--port", port, "--tell", str(tell)]  # fmt: skip
            self.body |= {"logit_bias": {str(end): -100}}
        elif system == "llama-server":
            command = [str(tools["llama-server"]), "-m", str(files["gguf"]), "-c", str(context * streams), "-np", str(streams),
                       "-t", threads, "-tb", threads, "--host", "127.0.0.1", "--port", port]  # fmt: skip
            self.body |= {"ignore_eos": True}
        elif system == "llama-cpp-python":
            command = [str(tools["python"]), "-m", "llama_cpp.server", "--model", str(files["gguf"]), "--n_ctx", str(context),
                       "--n_threads", threads, "--n_threads_batch", threads, "--port", port, "--interrupt_requests", "false"]  # fmt: skip
            variables = environments.clean(tools["python"]) | {"OMP_NUM_THREADS": threads}
            self.body |= {"logit_bias": {str(end): -100}}
        elif system == "Foundry Local":
            driver = Path(__file__).with_name("serving_foundry.py")
            scratch = log.with_suffix(".scratch")
            command = [str(tools["foundry"]), str(driver), str(files["onnx"]), str(scratch), port, threads]
            variables = environments.clean(tools["foundry"]) | {"OMP_NUM_THREADS": threads}
            self.api = "/catalogs/local/v1"
            self.body |= {"model": "m:1"}
        else:
            command = [sys.executable, __file__, "--genai", str(files["genai"]), threads]
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE if system.startswith("ONNX") else self._log, stderr=self._log,
            env=variables, preexec_fn=lambda: os.sched_setaffinity(0, set(cores)),
        )  # fmt: skip
        try:
            self._wait(log)
        except BaseException:
            self.stop()
            raise

    def _wait(self, log: Path) -> None:
        if self.process.stdout is not None:
            if self.process.stdout.readline() != b"ready\n":
                raise SystemExit(f"{self.system} did not start: see {log}")
            return
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self.process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.api}/models", timeout=5),
            ):
                return
            time.sleep(0.1)
        raise SystemExit(f"{self.system} did not start: see {log}")

    def genai(self, job: dict[str, Any]) -> dict[str, Any]:
        """Have the driver do a job."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.system} died")
        found: dict[str, Any] = json.loads(line)
        return found

    def peak(self) -> int:
        """Greatest resident memory in bytes: the sum over its processes."""
        return sum(_peak(pid) for pid in _tree(self.process.pid))

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _tree(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [one for child in task.read_text().split() for one in _tree(int(child))]
    return found


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def drive(folder: str, threads: int) -> None:
    """Jobs of `{"prompts", "streams", "tokens"}` from standard input, each done with so many requests open at a time.

    GenAI's engine takes as many requests as it is given and works on its own number of them (4 on CPU).
    """
    import onnxruntime_genai as og

    settings = og.Config(folder)
    settings.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(settings)
    engine = og.Engine(model)
    buffer = engine.create_event_buffer(256)
    words = og.Tokenizer(model)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        left = list(job["prompts"])
        going: dict[int, tuple[Any, Any, dict[str, Any]]] = {}
        heard: list[dict[str, Any]] = []
        began = time.perf_counter()
        while left or going:
            while left and len(going) < job["streams"]:
                asked = time.perf_counter()
                request = engine.create_request()
                how = og.TurnOptions(request)
                how.set_do_sample(False)
                how.set_min_generated_tokens(job["tokens"])
                how.set_max_generated_tokens(job["tokens"])
                request.begin_turn(words.encode(left.pop(0)), how)
                stream = words.create_stream()
                going[id(request)] = (request, stream, {"asked": asked, "texts": [], "tokens": 0})
            for event in engine.run(buffer):
                request, stream, found = going[id(event.request)]
                if event.token is not None:
                    stream.decode(event.token)
                    found["texts"].append(time.perf_counter())
                    found["tokens"] += 1
                if event.flags & og.EngineEventFlags.FAILED:
                    raise SystemExit(f"the engine failed: {event.error_code}")
                if event.flags & og.EngineEventFlags.TURN_FINISHED:
                    found["ended"] = time.perf_counter()
                    heard.append(found)
                    request.close()
                    del going[id(request)]
        print(json.dumps({"seconds": time.perf_counter() - began, "heard": heard}), flush=True)


if __name__ == "__main__":
    drive(sys.argv[2], int(sys.argv[3]))
