"""The client examples, started as their first lines say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from slmops.core.environment import Environment, requirements
from slmops.engines.minimal import _write_tokenizer, write_minimal
from slmops.store import environments
from tests.serve.conftest import Converted
from tests.serve.conftest import converted as converted  # the fixture
from tests.serve.test_ollama import CALLING
from tests.serve.test_server import served
from tests.train import bases

CLIENTS = Path(__file__).parents[2] / "examples" / "clients"
MESSAGE = 'say "hello" \\ twice'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_minimal(folder, "onnx_genai")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for which no part of a script is left out: its template has tools, and it can wear the adapter `cards`."""
    from slmops.convert import onnx_adapters
    from slmops.core.method import Context

    words, data, out = (tmp_path_factory.mktemp(name) for name in ("words", "data", "whole"))
    _write_tokenizer(words)
    (words / "chat_template.jinja").write_text(CALLING)
    base = bases.save("qwen3", words, out / "base", context=1024)
    cards = bases.adapter(base, out / "cards")
    row = '{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}\n'
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(row * 4)
    (out / "model").mkdir()
    params = onnx_adapters.Params(precision="fp32", fidelity_prompts=2)
    given = {"base": base, "adapter.cards": cards, "data.cards": data}
    onnx_adapters.run(params, given, out / "model", Context(0, out, out))
    return out / "model"


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | variables, text=True, capture_output=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_openai_for_python(folder: Path) -> None:
    with served(folder, "--context", "96") as (client, _):
        said = run(
            sys.executable, CLIENTS / "with_openai.py", "tiny", MESSAGE, SLMOPS_URL=str(client.base_url).rstrip("/")
        )
    assert said.count("likeliest:") == 8


@pytest.mark.slow
def test_everything_with_openai_and_ollama_for_python(whole: Path, tmp_path: Path) -> None:
    with served(whole, "--definitions", str(tmp_path)) as (client, _):
        url = str(client.base_url).rstrip("/")
        asked = run(sys.executable, CLIENTS / "every_openai.py", f"{url}/v1", "tiny", "cards")
        ollama = run(sys.executable, CLIENTS / "every_ollama.py", url, "tiny", "cards")
    for said in (asked, ollama):
        assert "left out" not in said and "\nadapter:" in said and "\nerrors:" in said
    assert list(tmp_path.iterdir()) == []  # what the script made it deleted again


@pytest.mark.slow
def test_what_a_model_has_not_is_left_out_and_said(folder: Path) -> None:
    with served(folder) as (client, _):
        url = str(client.base_url).rstrip("/")
        asked = run(sys.executable, CLIENTS / "every_openai.py", f"{url}/v1", "tiny")
    assert "tools left out:" in asked and "adapter" not in asked


LANGCHAIN = Environment(
    "langchain", requirements(Path(__file__).with_name("langchain.txt").read_text(encoding="utf-8")), size=140_000_000
)


@pytest.mark.slow
def test_everything_with_langchain(whole: Path, tmp_path: Path) -> None:
    """Its dependencies are many, and are no business of slmops: they have an environment of their own."""
    python = environments.ensure(LANGCHAIN)
    with served(whole, "--definitions", str(tmp_path)) as (client, _):
        command = [python, CLIENTS / "every_langchain.py", f"{str(client.base_url).rstrip('/')}/v1", "tiny", "cards"]
        done = subprocess.run(
            command, env=environments.clean(python), text=True, capture_output=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out" not in done.stdout and "\nadapter:" in done.stdout and "\nOllama's dialect:" in done.stdout


@pytest.mark.parametrize("file", sorted(CLIENTS.glob("*.py")), ids=lambda path: path.name)
def test_python_can_be_parsed(file: Path) -> None:
    compile(file.read_text(encoding="utf-8"), str(file), "exec")


@pytest.mark.slow
def test_ollama_for_python(folder: Path) -> None:
    with served(folder, "--context", "96") as (client, _):
        said = run(sys.executable, CLIENTS / "with_ollama.py", "tiny", MESSAGE, OLLAMA_HOST=str(client.base_url))
    assert said.startswith("models: tiny") and "tokens/s" in said


@pytest.mark.slow
def test_openai_for_node(folder: Path, whole: Path, tmp_path: Path) -> None:
    npm, node = shutil.which("npm"), shutil.which("node")
    assert npm and node, "install Node (Debian: apt-get install nodejs npm)"
    shutil.copy(CLIENTS / "with_openai.mjs", tmp_path)
    run(npm, "install", "--prefix", tmp_path, "--no-audit", "--no-fund", "--silent", "openai@6")
    with served(folder, "--context", "96") as (client, _):
        url = str(client.base_url).rstrip("/")
        said = run(node, tmp_path / "with_openai.mjs", "tiny", MESSAGE, SLMOPS_URL=url)
    assert said.strip().endswith("tokens")
    shutil.copy(CLIENTS / "every_openai.mjs", tmp_path)
    with served(whole) as (client, _):
        url = f"{str(client.base_url).rstrip('/')}/v1"
        asked = run(node, tmp_path / "every_openai.mjs", url, "tiny", "cards")
    assert "left out" not in asked and "\nadapter:" in asked and "\nerrors" in asked


@pytest.mark.slow
def test_curl(folder: Path) -> None:
    with served(folder, "--context", "96") as (client, _):
        said = run(CLIENTS / "with_curl.sh", "tiny", MESSAGE, SLMOPS_URL=str(client.base_url).rstrip("/"))
    assert '"object":"chat.completion"' in said and "data: [DONE]" in said and '"done":true' in said.replace(" ", "")


@pytest.mark.slow
def test_cpp_answers_as_the_library_does_in_python(converted: Converted, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    model = converted("qwen3", "fp32")
    packages, library = Path(sysconfig.get_path("purelib")), tmp_path / "library"
    library.mkdir()
    (library / "libonnxruntime-genai.so").symlink_to(packages / "onnxruntime_genai" / "libonnxruntime-genai.so")
    (library / "libonnxruntime.so").symlink_to(next((packages / "onnxruntime" / "capi").glob("libonnxruntime.so.1.*")))
    link = ["-L", library, "-l:libonnxruntime-genai.so", f"-Wl,-rpath,{library}"]
    run("g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", CLIENTS / "with_genai.cpp", *link, "-o", tmp_path / "ask")
    said = run(tmp_path / "ask", model, MESSAGE, LD_LIBRARY_PATH=str(library))

    loaded = og.Model(str(model))
    tokenizer = og.Tokenizer(loaded)
    generator, stream = og.Generator(loaded, og.GeneratorParams(loaded)), tokenizer.create_stream()
    prompt = tokenizer.apply_chat_template(
        '[{"role": "user", "content": "say \\"hello\\" \\\\ twice"}]', add_generation_prompt=True
    )
    generator.append_tokens(tokenizer.encode(prompt))
    expected = ""
    while not generator.is_done():
        generator.generate_next_token()
        expected += "".join(stream.decode(token) for token in generator.get_next_tokens())
    assert expected and said == expected + "\n"


def test_csharp_can_be_parsed() -> None:
    import tree_sitter
    import tree_sitter_c_sharp

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_c_sharp.language()))
    source = (CLIENTS / "WithGenAi.cs").read_bytes()
    assert not parser.parse(source).root_node.has_error
    assert parser.parse(source.replace(b"while (", b"while ((")).root_node.has_error
