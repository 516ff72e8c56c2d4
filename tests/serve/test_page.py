"""The chat page as browsers get it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from slmops.engines.minimal import write_minimal
from slmops.serve.page import FOLDER
from tests.serve.test_server import served

SOURCES = [*FOLDER.glob("*.html"), *FOLDER.glob("*.css"), *FOLDER.glob("*.js")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("served")
    write_minimal(folder, "onnx_genai")
    with served(folder) as (client, _):
        yield client


@pytest.mark.slow
def test_browsers_get_the_page_and_all_that_it_loads(client: httpx.Client) -> None:
    page = client.get("/", headers={"Accept": "text/html,*/*;q=0.8"})
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    loaded = set(re.findall(r'(?:src|href)="([^"]+)"', page.text)) - {"data:,"}
    for script in [name for name in loaded if name.endswith(".js")]:
        loaded |= {f"chat/{name}" for name in re.findall(r'from "\./([^"]+)"', client.get(f"/{script}").text)}
    assert loaded == {"chat/chat.css", "chat/chat.js", "chat/stream.js"}
    for name in loaded:
        got = client.get(f"/{name}")
        assert got.status_code == 200 and got.headers["x-content-type-options"] == "nosniff", name
        assert got.headers["content-type"].startswith("text/css" if name.endswith("css") else "text/javascript"), name
    assert client.get("/chat/__init__.py").status_code == client.get("/chat/..%2Fapp.py").status_code == 404


@pytest.mark.slow
def test_others_hear_that_somebody_is_there(client: httpx.Client) -> None:
    assert client.get("/", headers={"Accept": "*/*"}).text == "Ollama is running"
    assert client.head("/").status_code == 200


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere_and_no_text_becomes_html(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|sessionStorage", text
    )
    assert not re.search(r"\son\w+=\"|style=\"", text), "the page forbids itself code and style in its text"


def test_what_the_page_knows_of_the_api() -> None:
    node = shutil.which("node")
    assert node, "install Node (Debian: apt-get install nodejs)"
    file = Path(__file__).with_name("stream.test.mjs")
    done = subprocess.run([node, "--test", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^# pass [1-9]", done.stdout, re.M), done.stdout
