"""The chat page at `/`: three files beside this module, which load nothing from elsewhere and store nothing.

It talks to the server as any client does, by `/v1/models` and `/v1/chat/completions`.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

FOLDER = Path(__file__).parent
KINDS = {"chat.css": "text/css", "chat.js": "text/javascript", "stream.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    """The page itself, to browsers; what Ollama says to others, as its clients ask here whether somebody is there."""
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Ollama is running", headers={"Vary": "Accept"})
    return FileResponse(FOLDER / "index.html", headers={**HEADERS, "Vary": "Accept"})


async def part(request: Request) -> Response:
    """A file of the page."""
    name = request.path_params["name"]
    if name not in KINDS:
        return PlainTextResponse("there is no such file", 404)
    return FileResponse(FOLDER / name, media_type=KINDS[name], headers=HEADERS)
