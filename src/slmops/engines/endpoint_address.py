"""Where an endpoint is and with which key: everything that can be known, and refused, before a request is sent.

Light: `slmops plan` calls `check_endpoint` without loading an HTTP client.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit, urlunsplit

from slmops.core.spec import Endpoint
from slmops.errors import UsageError

AZURE_API_VERSION = "2024-10-21"


def address(endpoint: Endpoint) -> str:
    """The URL that requests are posted to.

    Raises:
        UsageError: the base URL is not one, or holds a password.
    """
    parts = urlsplit(endpoint.url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"teacher.endpoint.url is not an http(s) URL: {shown(endpoint.url)}",
            "for instance https://api.openai.com/v1",
        )
    if "@" in parts.netloc:
        raise UsageError(
            "teacher.endpoint.url holds a user name or a password",
            "take it out: keys come from the environment variable that teacher.endpoint.api_key_env names",
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    query = parts.query
    if endpoint.api == "azure":
        if not re.search(r"/(v1|models|deployments/[^/]+)$", path):  # a resource's root: the model is a deployment
            root = path if path.endswith("/openai") else f"{path}/openai"
            path = f"{root}/deployments/{endpoint.model}"
        version = endpoint.api_version or ("" if path.endswith("/v1") else AZURE_API_VERSION)
        if version and "api-version=" not in query:
            query = f"{query}&api-version={version}".lstrip("&")
    elif not path and parts.port == 11434:  # Ollama's own port, given without its OpenAI-compatible path
        path = "/v1"
    return urlunsplit((parts.scheme, parts.netloc, f"{path}/chat/completions", query, ""))


def shown(url: str) -> str:
    """A URL without the parts that can hold a secret, for messages."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def api_key(endpoint: Endpoint, environ: Mapping[str, str] | None = None) -> str | None:
    """The key of an endpoint from the environment; None where none is asked for (Ollama, vLLM). Sends nothing.

    Raises:
        UsageError: the variable is not set or holds what no HTTP header can carry.
    """
    name = endpoint.api_key_env
    if name is None:
        if endpoint.api == "azure":
            raise UsageError("Azure needs a key", "name its environment variable in teacher.endpoint.api_key_env")
        return None
    key = (os.environ if environ is None else environ).get(name, "").strip()
    if not key:
        raise UsageError(
            f"the environment variable {name} (teacher.endpoint.api_key_env) is not set",
            f"export {name}=…, or take api_key_env out for an endpoint that wants no key",
        )
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UsageError(f"the key in {name} has characters that no key has", "copy it again, without spaces or quotes")
    return key


def check_endpoint(endpoint: Endpoint, budget: float | None = None, environ: Mapping[str, str] | None = None) -> None:
    """Everything that can be known before a request is sent.

    Raises:
        UsageError: bad URL, missing key, or a budget for an endpoint that asks for a key but has no price.
    """
    address(endpoint)
    key = api_key(endpoint, environ)
    price = endpoint.price
    if budget is not None and key is not None and price.input_per_million == price.output_per_million == 0:
        raise UsageError("a budget cannot be held without prices", "give teacher.endpoint.price, per million tokens")
