"""Logins to registries as `docker login` leaves them: ~/.docker/config.json, or where DOCKER_CONFIG says.

Promises: a login is that of exactly the host asked for. Credential helpers (`credsStore`, `credHelpers`) are asked for one host by
their protocol: its name on standard input, JSON on standard output. What is damaged or fails counts as no login.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCKER_HUB = "index.docker.io"
HELPER_SECONDS = 20


@dataclass(frozen=True)
class Login:
    """Who asks: a name and a secret, or a token that is exchanged for another. None of it is shown."""

    name: str = ""
    secret: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The header of basic authentication."""
        return "Basic " + base64.b64encode(f"{self.name}:{self.secret}".encode()).decode()


def login(host: str) -> Login | None:
    """The login to a registry, None where there is none."""
    try:
        folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker").expanduser()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return None
    if not isinstance(config, dict):
        return None
    names = (host, DOCKER_HUB) if host == "docker.io" else (host,)
    for key, helper in _object(config.get("credHelpers")).items():
        if host_of(key) in names and (found := _ask(helper, key)):
            return found
    known = {key: _object(entry) for key, entry in _object(config.get("auths")).items() if host_of(key) in names}
    for entry in known.values():
        if found := _entry(entry):
            return found
    store = config.get("credsStore")
    keys = [*known, "https://index.docker.io/v1/"] if host == "docker.io" else [*known, host]
    return next((found for key in keys if store and (found := _ask(store, key))), None)


def host_of(key: str) -> str:
    """The host that an entry is for, written as a host or as an address."""
    return re.sub(r"^https?://", "", key).partition("/")[0].lower()


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _entry(entry: Mapping[str, Any]) -> Login | None:
    identity = str(entry.get("identitytoken") or "")
    try:
        name, _, secret = base64.b64decode(str(entry.get("auth") or ""), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        name = secret = ""
    name, secret = name or str(entry.get("username") or ""), secret or str(entry.get("password") or "")
    return Login(name, secret.rstrip("\0"), identity) if identity or (name and secret) else None


def _ask(helper: Any, key: str) -> Login | None:
    if not isinstance(helper, str) or not re.fullmatch(r"[\w.-]+", helper):
        return None
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"], input=key, capture_output=True, text=True, timeout=HELPER_SECONDS, check=True
        )  # fmt: skip
        said = json.loads(done.stdout)
        name, secret = str(said["Username"]), str(said["Secret"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None
    return Login(identity=secret) if name == "<token>" else Login(name, secret)
