"""`/openapi.json`: it names all that clients may ask, and nothing that is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.serve.app import application
from slmops.serve.gate import Rules, State
from slmops.serve.keys import Keys, make, write
from slmops.serve.pool import Pool
from tests.serve.live import Live, live
from tests.serve.test_bounds import asked
from tests.serve.test_openai import folder

__all__ = ["folder"]
UNSERVED = {"/api/pull", "/api/push", "/api/blobs/{digest}"}
"""Only say that they are not served."""


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Live]:
    with live(folder) as found:
        yield found


@pytest.fixture(scope="module")
def told(server: Live) -> Any:
    return server.client.get("/openapi.json").json()


def test_the_document_has_every_route_of_both_dialects_and_no_other(told: Any) -> None:
    app = application(Pool([]), State())
    there = {
        (re.sub(r":\w+\}", "}", route.path), method.lower())
        for route in app._app.routes
        if route.path.startswith(("/v1/", "/api/")) and route.path not in UNSERVED
        for method in route.methods - {"HEAD"}
    }
    assert there == {(path, method) for path, route in told["paths"].items() for method in route}


def test_what_the_document_refers_to_is_in_it(told: Any) -> None:
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(told)))
    operations = [one["operationId"] for route in told["paths"].values() for one in route.values()]
    linked = set(re.findall(r'"operationId": "([^"]+)", "parameters": \{"id": "\$', json.dumps(told)))
    assert names == set(told["components"]["schemas"]) and linked and linked <= set(operations)
    assert len(set(operations)) == len(operations)


def test_its_examples_are_answered_as_it_says(server: Live, told: Any) -> None:
    import jsonschema

    for path, route in told["paths"].items():
        for method, one in route.items():
            body = one.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
            if body is None or path.startswith(("/api/create", "/api/copy", "/api/delete")):  # there are no definitions
                continue
            answer = server.client.request(method, path, json=body | ({"stream": False} if "stream" in body else {}))
            good = one["responses"]["200"]
            kind = answer.headers["content-type"].split(";")[0]
            assert answer.status_code == 200 and kind in good["content"], (path, answer.text)
            if kind == "application/json":
                jsonschema.validate(answer.json(), {**good["content"][kind]["schema"], **told})


def test_who_has_no_key_is_told_no_name_of_a_model(folder: Path, tmp_path: Path) -> None:
    from slmops.serve.model import Settings

    token, key = make("desk", ["infer"], 0)
    write(tmp_path / "keys.json", [key])
    app = application(Pool([Settings(folder, "secret")]), State(), Rules(keys=Keys(tmp_path / "keys.json")))

    async def ask(http: Any) -> None:
        assert "secret" not in (await http.get("/openapi.json")).text
        assert "secret" in (await http.get("/openapi.json", headers={"authorization": f"Bearer {token}"})).text

    asked(app, ask)
