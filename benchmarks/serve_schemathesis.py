"""Hooks for Schemathesis over `slmops serve`: requests of its document name a model that is there. See `README.md`.

    slmops serve tiny=FOLDER --port 8000 &
    SCHEMATHESIS_HOOKS=benchmarks.serve_schemathesis MODEL=tiny st run http://127.0.0.1:8000/openapi.json

Without them nearly every request would be answered with 404. A name that is no text stays as it is: it is there to be refused.
"""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis

MODEL = os.environ.get("MODEL", "tiny")
MADE, OTHER = "made", "other"
"""Definitions that come and go."""
NAMES = {
    "/api/create": {"model": MADE, "from": MODEL},
    "/api/copy": {"source": MODEL, "destination": OTHER},
    "/api/delete": {"model": OTHER},
}


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """A body with names that are known, whose answer is kept."""
    if isinstance(body, dict):
        for field, name in NAMES.get(context.operation.path, {"model": MODEL}).items():
            if isinstance(body.get(field), str):
                body[field] = name
        if body.get("store") is False:  # it would be missed afterwards, when it is asked for
            body["store"] = True
    return body


@schemathesis.deserializer("application/x-ndjson")
def lines(context: Any, response: Any) -> Any:
    """The last line of a stream, all of which are JSON."""
    return [json.loads(line) for line in response.content.splitlines()][-1]
