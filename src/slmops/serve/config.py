"""The strict form of a file of models to serve: what `slmops serve --config` reads.

What is given for all models holds for those that do not say otherwise; an option of the command line goes before what the file gives
for all. Reading the file is `slmops.cli.serve_file`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from slmops.core.model import Value
from slmops.serve.engines import Kind

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Load = Literal["start", "fit", "demand"]


class CandidateSpec(Value):
    """Another version that is tried on real requests from the start on. See docs/guides/serve.md."""

    folder: str = Field(description="the other version's folder")
    share: Share = Field(0.0, description="of the requests that it answers")
    shadow: Share = Field(0.0, description="of the others that it answers too, to compare")


class Common(Value):
    """What can be said of one model, or of all."""

    rows: Count | None = Field(None, description="answers at a time (8)")
    context: Count | None = Field(None, description="tokens of prompt and answer (as the model can)")
    threads: Count | None = Field(None, description="CPU threads (as many as are fastest here)")
    queue: Count | None = Field(None, description="requests that may wait for a row (256)")
    load: Load | None = Field(
        None, description="when it is loaded: start, fit (at the start where it fits), demand (fit)"
    )
    engine: Kind | None = Field(None, description="refuse it if it is not for this engine")
    tell: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None, description="tokens that come within so many milliseconds are sent together (10)"
    )
    idle: Seconds | None = Field(None, description="seconds without an answer until it is unloaded (never)")


class ModelSpec(Common):
    """A model."""

    folder: str = Field(description="its folder, relative to this file")
    fallback: str | None = Field(
        None, description="the model that answers where this one cannot in time or for want of memory"
    )
    canaries: str | None = Field(
        None, description="a file of prompts that another version has to answer before it takes over"
    )
    candidate: CandidateSpec | None = None
    adapters: dict[str, str] = Field(
        default_factory=dict, description="more adapters: NAME: PLACE, relative to this file"
    )


class ServeSpec(Common):
    """The whole file."""

    models: Annotated[dict[str, ModelSpec], Field(min_length=1)] = Field(description="NAME: {folder: FOLDER}")
    host: str | None = Field(None, description="address to listen on (127.0.0.1: this machine alone)")
    port: Annotated[int, Field(ge=0, le=65535)] | None = Field(None, description="0: any that is free (8000)")
    memory: str | int | None = Field(
        None, description="most that all models take together, such as 4G (a share of what is free)"
    )
