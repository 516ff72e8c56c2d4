"""API keys: who may ask for what. A file holds what is needed to know a key again, never the key.

A key is 256 random bits, so its plain SHA-256 is enough at rest: slow hashes protect what can be guessed, and this cannot be. Rotation
gives a name a second key, and an end to the first. A running server reads the file again when it has changed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slmops.errors import DataError, UsageError

SCOPES = ("infer", "admin", "metrics")
"""infer: ask models, and see which there are; admin: load, unload, pull and remove them; metrics: read /metrics."""
PREFIX = "slm-"
OPEN = frozenset({"/", "/favicon.ico", "/healthz", "/readyz"})
"""Paths that tell and do nothing that is worth a key, like those below `PAGE`."""
PAGE = "/chat/"
CHANGES = ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs", "/admin")
LOOK_S = 1.0


@dataclass(frozen=True)
class Key:
    """What is kept of a key. Times are seconds since 1970; limits that are None are the server's.

    Attributes:
        name: who has it. Several keys of a name are one to limits.
        digest: SHA-256 of the key, in hexadecimal.
    """

    name: str
    digest: str
    scopes: tuple[str, ...]
    created: int
    expires: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    answers: int | None = None

    @property
    def id(self) -> str:
        """Names it without telling it."""
        return self.digest[:8]

    def valid(self, now: float) -> bool:
        """Whether it has not expired."""
        return self.expires is None or now < self.expires


def needed(method: str, path: str) -> frozenset[str]:
    """The scopes of which one is enough for a path; none: it is open to all. What is not known needs `infer`."""
    path = path.rstrip("/") or "/"
    if (path in OPEN or path.startswith(PAGE)) and method in ("GET", "HEAD"):
        return frozenset()
    if path == "/metrics":
        return frozenset({"metrics", "admin"})
    changes = any(path == start or path.startswith(f"{start}/") for start in CHANGES)
    if changes or (path.startswith("/v1/models") and method not in ("GET", "HEAD")):
        return frozenset({"admin"})
    return frozenset({"infer"})


def digest_of(token: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def make(name: str, scopes: Sequence[str], now: float, **more: Any) -> tuple[str, Key]:
    """A new key: the key itself, which is kept nowhere, and what is kept of it."""
    token = PREFIX + secrets.token_urlsafe(32)
    return token, Key(name, digest_of(token), tuple(scopes), int(now), **more)


def rotate(keys: Sequence[Key], name: str, now: float, overlap: float) -> tuple[str, list[Key]]:
    """A new key for a name, with what its newest has, for as long as that was made for; the others end after `overlap` seconds.

    Raises:
        UsageError: the name has none, or all of them have ended.
    """
    own = [key for key in keys if key.name == name]
    if not any(key.valid(now) for key in own):
        said = f"all keys of {name} have ended" if own else f"there is no key {name}"
        raise UsageError(said, f"make one with `slmops keys add {name}`")
    newest = max(reversed(own), key=lambda key: key.created)
    lifetime = None if newest.expires is None else newest.expires - newest.created
    token, made = make(name, newest.scopes, now)
    made = replace(
        made, expires=None if lifetime is None else made.created + lifetime, requests_per_minute=newest.requests_per_minute,
        tokens_per_minute=newest.tokens_per_minute, answers=newest.answers,
    )  # fmt: skip
    end = int(now + overlap)
    kept = [
        replace(key, expires=min(end, key.expires or end)) if key.name == name else key
        for key in keys
        if key.valid(now)
    ]
    return token, [*kept, made]


def read(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        DataError: it cannot be read, or is no file of keys.
    """
    hint = "make it with `slmops keys add NAME`"
    try:
        found = json.loads(path.read_bytes())
        keys = [Key(**{**one, "scopes": tuple(one["scopes"])}) for one in found["keys"]]
        for key in keys:
            _check(key)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", hint) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no file of keys: {error}", hint) from error
    return keys


def _check(key: Key) -> None:
    numbers = (key.expires, key.requests_per_minute, key.tokens_per_minute, key.answers)
    good = (
        isinstance(key.name, str)
        and isinstance(key.digest, str)
        and len(key.digest) == 64
        and isinstance(key.created, int)
    )
    good = good and all(number is None or (isinstance(number, int) and number >= 1) for number in numbers)
    if not good or not set(key.scopes) <= set(SCOPES):
        raise ValueError(f"the key {str(key.name)[:40]} has an odd field")


def write(path: Path, keys: Sequence[Key]) -> None:
    """Write a file of keys, whole or not at all, for its owner's eyes."""
    from slmops.store.files import write_json

    rows = [{name: value for name, value in asdict(key).items() if value is not None} for key in keys]
    write_json(path, {"version": 1, "keys": rows})


class Keys:
    """The keys of a running server. What the file says counts within `LOOK_S`; a file that cannot be read changes nothing.

    Args:
        clock: seconds since 1970.
        say: gets a line when the file cannot be read.

    Raises:
        DataError: the file cannot be read at first.
    """

    def __init__(
        self, path: Path, *, clock: Callable[[], float] = time.time, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._path, self._clock, self._say = path, clock, say
        self._stamp = self._stat()
        self._looked = clock()
        self._take(read(path))

    def _take(self, keys: Sequence[Key]) -> None:
        self._by_start: dict[str, list[Key]] = {}
        for key in keys:
            self._by_start.setdefault(key.digest[:8], []).append(key)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _look(self, now: float) -> None:
        if 0 <= now - self._looked < LOOK_S:
            return
        self._looked = now
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read(self._path))
        except DataError as error:
            self._say(f"the keys are as before: {error.message}")

    def find(self, token: str) -> Key | None:
        """The key, if there is one that has not expired.

        It is looked up by the first bits of its digest, whose times tell nothing about keys, as a digest cannot be chosen;
        the rest is compared in constant time.
        """
        now = self._clock()
        self._look(now)
        digest = digest_of(token)
        found = None
        for key in self._by_start.get(digest[:8], ()):
            if hmac.compare_digest(key.digest, digest) and key.valid(now):
                found = key
        return found
