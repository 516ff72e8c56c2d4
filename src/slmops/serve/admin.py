"""What the keeper of a server may do to its models while it runs: `/admin/models` and below.

Only for those who are let in: by default who asks from this machine itself, not through a proxy and not from a page in a browser.
Errors have the shape of OpenAI's. Nothing that is done here outlives the server: at its next start it serves what it is told then.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from slmops.errors import DataError, NoRoomError, ResourceError, SlmopsError
from slmops.serve import memory, versions
from slmops.serve.model import Model, Settings
from slmops.serve.pool import Pool, Slot

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Kind = TypeVar("Kind", bound="Asked")
Done = Callable[[Request, str], Awaitable[dict[str, Any]]]
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via", "origin")
"""What proxies and browsers send. A proxy that adds none of them cannot be told from a program on this machine."""
NAMES = ("localhost", "127.0.0.1", "::1")


class Asked(BaseModel):
    """A body: these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class Judged(Asked):
    """With canaries: in place, or a file of them on the server; neither: those of the model's settings."""

    canaries: Annotated[list[versions.Canary], Field(min_length=1)] | str | None = None
    agreement: Share = 1.0

    def prompts(self) -> list[versions.Canary] | None:
        """The canaries that are given."""
        return versions.read_canaries(Path(self.canaries)) if isinstance(self.canaries, str) else self.canaries


class Version(Judged):
    """Another version: what is not given stays as it is served now."""

    folder: str
    rows: Count | None = None
    context: Count | None = None
    threads: Count | None = None

    def settings(self, now: Settings) -> Settings:
        """How it is served."""
        given = {key: getattr(self, key) for key in ("rows", "context", "threads") if getattr(self, key) is not None}
        return replace(now, folder=Path(self.folder), **given)


class Trial(Version):
    """A candidate."""

    share: Share = 0.0
    shadow: Share = 0.0


def local(request: Request) -> bool:
    """Whether a request comes from this machine, from a program that means this server."""
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        near = request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        near = False
    return near and name.lower() in NAMES and not any(key in request.headers for key in FORWARDED)


def routes(pool: Pool, trusted: Callable[[Request], bool] = local) -> list[Route]:
    """The routes over the models of a server. `trusted`: whether a request may pass."""

    def guarded(work: Done) -> Callable[[Request], Awaitable[Response]]:
        async def run(request: Request) -> Response:
            if not trusted(request):
                return refusal(403, "this may be asked on the machine of the server alone", "not_local")
            name = request.path_params.get("name", "")
            try:
                return JSONResponse(await work(request, name))
            except KeyError:
                return refusal(404, f"there is no model {name}; there are: {', '.join(pool.names)}", "model_not_found")
            except ValidationError as failure:
                first = failure.errors(include_url=False, include_context=False, include_input=False)[0]
                place = ".".join(str(part) for part in first["loc"])
                return refusal(400, f"{place or 'the body'}: {first['msg']}", "invalid_request")
            except SlmopsError as failure:
                return of(failure)

        return run

    def slot(name: str) -> Slot:
        return pool.slots[name]

    async def every(request: Request, name: str) -> dict[str, Any]:
        kept = {"budget_bytes": pool.budget, "reserved_bytes": pool.reserved, "free_bytes": memory.free()}
        return {"memory": kept, "models": {name: card(slot) for name, slot in pool.slots.items()}}

    async def one(request: Request, name: str) -> dict[str, Any]:
        return card(slot(name))

    async def load(request: Request, name: str) -> dict[str, Any]:
        await slot(name).current.start()
        return card(slot(name))

    async def unload(request: Request, name: str) -> dict[str, Any]:
        if not await slot(name).current.unload():
            raise versions.ConflictError(f"{name} has open answers", "ask again when they are finished")
        return card(slot(name))

    async def swap(request: Request, name: str) -> dict[str, Any]:
        asked, now = await body(request, Version), slot(name).current.settings
        return await versions.swap(pool, name, asked.settings(now), asked.prompts(), asked.agreement)

    async def rollback(request: Request, name: str) -> dict[str, Any]:
        return await versions.rollback(pool, name)

    async def candidate(request: Request, name: str) -> dict[str, Any]:
        asked, now = await body(request, Trial), slot(name).current.settings
        return await versions.try_out(
            pool, name, asked.settings(now), asked.share, asked.shadow, asked.prompts() or (), asked.agreement
        )

    async def promote(request: Request, name: str) -> dict[str, Any]:
        asked = await body(request, Judged)
        return await versions.settle(pool, name, True, asked.prompts(), asked.agreement)

    async def end(request: Request, name: str) -> dict[str, Any]:
        return await versions.settle(pool, name, False)

    async def report(request: Request, name: str) -> dict[str, Any]:
        found = slot(name).candidate
        if found is None:
            raise versions.ConflictError(f"{name} has no candidate", "try a version out first")
        told = await asyncio.to_thread(found.pairs.report)
        return {"current": slot(name).current.version, "candidate": found.model.version, **told}

    under = "/admin/models/{name:path}"
    posts = {
        "load": load,
        "unload": unload,
        "swap": swap,
        "rollback": rollback,
        "candidate": candidate,
        "promote": promote,
    }
    return [
        Route("/admin/models", guarded(every)),
        *[Route(f"{under}/{verb}", guarded(work), methods=["POST"]) for verb, work in posts.items()],
        Route(f"{under}/candidate", guarded(end), methods=["DELETE"]),
        Route(f"{under}/report", guarded(report)),
        Route(under, guarded(one)),
    ]


async def body(request: Request, kind: type[Kind]) -> Kind:
    """The body of a request; an empty one is {}."""
    return kind.model_validate_json(await request.body() or b"{}")


def card(slot: Slot) -> dict[str, Any]:
    """What there is to say of a model."""
    found = _of(slot.current)
    before = {"version": slot.before_version, "folder": str(slot.before.folder)} if slot.before else None
    trial = slot.candidate
    tried = None if trial is None else {**_of(trial.model), "share": trial.share, "shadow": trial.shadow}
    return {**found, "fallback": slot.current.settings.fallback, "before": before, "candidate": tried}


def _of(model: Model) -> dict[str, Any]:
    return {
        "version": model.version, "folder": str(model.settings.folder), "state": model.state, "answers": model.active,
        "reserved_bytes": model.reserved, "resident_bytes": memory.resident(model.pid), "peak_bytes": memory.peak(model.pid),
        "load_s": model.load_s, "unloaded_in_s": model.left if model.ready else None,
    }  # fmt: skip


def of(failure: SlmopsError) -> Response:
    """An error of slmops."""
    said = f"{failure.message} ({failure.hint})" if failure.hint else failure.message
    if isinstance(failure, ResourceError):
        status = 507 if isinstance(failure, NoRoomError) else 503
        return refusal(status, said, "no_memory" if status == 507 else "overloaded", failure.retry_after)
    if isinstance(failure, versions.CanaryError):
        return refusal(409, said, "canaries_failed", failed=failure.failed)
    if isinstance(failure, versions.ConflictError):
        return refusal(409, said, "conflict")
    return refusal(400 if isinstance(failure, DataError) else 422, said, "cannot_be_done")


def refusal(status: int, message: str, code: str, retry_after: float | None = None, **more: Any) -> Response:
    """An error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": str(max(1, round(retry_after or 1)))} if status in (503, 507) else None
    said = {"error": {"message": message, "type": kind, "param": None, "code": code, **more}}
    return JSONResponse(said, status, headers=headers)
