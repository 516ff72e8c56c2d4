"""Which requests a browser may have been made to send by a page of somebody else, and are refused.

A server on loopback is in reach of every page that its user visits. Three rules keep them out, by headers that a page
cannot set:

- **Host.** A page whose own name was made to resolve to this machine (DNS rebinding) is of one origin with the server, but sends its
  name as the host. Where no key is asked for, only addresses and names known to be ours pass.
- **Origin.** Browsers send it with every POST, and with every request whose answer another origin would read.
- **Content-Type.** What a browser sends without asking first (forms and plain text) is no type for JSON.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from slmops.serve.refusals import Headers, Refused

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
EXPOSED = "x-request-id, retry-after, retry-after-ms, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, " \
    "x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"  # fmt: skip
FORM = "application/x-www-form-urlencoded"


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_of(host: str) -> str:
    """The name or address of a Host header, without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Origins:
    """Who may ask.

    Attributes:
        hosts: names that a Host header may have beside addresses (see `open_to_addresses`); None: any.
        addresses: whether any IP address may be there: no page can have one of this machine as its own unless it came from here.
        cors: origins of pages that may ask; `*`: all.
    """

    hosts: frozenset[str] | None = None
    addresses: bool = False
    cors: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, host: str, keys: bool, allowed: frozenset[str] = frozenset(), cors: frozenset[str] = frozenset()
    ) -> Origins:
        """The rules for an address that is listened on. Keys make names safe beyond loopback: a foreign page has none."""
        if is_loopback(host):
            return cls(LOOPBACK | {host.lower()} | allowed, False, cors)
        if keys and not allowed:
            return cls(None, True, cors)
        return cls(LOOPBACK | {host.lower()} | allowed, True, cors)

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Refuse what may be another's page.

        Args:
            headers: names in lower case.

        Raises:
            Refused: with 403, or 415 for the type of a body.
        """
        host = headers.get("host", "")
        name = name_of(host)
        if self.hosts is not None and name not in self.hosts and not (self.addresses and _is_address(name)):
            raise Refused(
                403,
                f"this server is not known as {name[:100]!r}: start it with --allow-host",
                "host",
                "host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._ours(origin, host) and not self.shares(origin):
            said = f"pages of {origin[:100]!r} may not ask this server: start it with --cors"
            raise Refused(403, said, "origin", "origin_not_allowed")
        if method in ("POST", "PUT", "PATCH", "DELETE"):
            self._check_type(path, headers)

    def _check_type(self, path: str, headers: Mapping[str, str]) -> None:
        given = headers.get("content-type")
        if given is None:  # a page can leave it out too, but its Origin tells
            return
        kind = given.partition(";")[0].strip().lower()
        if kind == "application/json" or kind.endswith("+json"):
            return
        if path.startswith("/api/"):
            if kind == "application/octet-stream":
                return
            if kind == FORM and not headers.keys() & {
                "origin",
                "sec-fetch-site",
                "cookie",
            }:  # curl -d, as in Ollama's examples
                return
        raise Refused(
            415,
            f"a body of type {kind[:100]!r} is not read: send application/json",
            "content_type",
            "unsupported_media_type",
        )

    def _ours(self, origin: str, host: str) -> bool:
        """Whether a page came from this server. Schemes may differ behind a proxy that ends TLS."""
        return "://" in origin and origin.partition("://")[2].lower() == host.lower() != ""

    def shares(self, origin: str) -> bool:
        """Whether pages of an origin may ask."""
        return "*" in self.cors or origin in self.cors

    def answered(self, headers: Mapping[str, str]) -> Headers:
        """Headers that let the page read an answer."""
        if not self.cors:
            return ()
        origin = headers.get("origin")
        if origin is None or not self.shares(origin):
            return (("vary", "origin"),)
        return (
            ("access-control-allow-origin", origin), ("access-control-expose-headers", EXPOSED), ("vary", "origin"),
        )  # fmt: skip

    def preflight(self, method: str, headers: Mapping[str, str]) -> Headers | None:
        """The answer to a browser that asks before it sends, None if this is none. `check` has passed."""
        if (
            method != "OPTIONS"
            or "access-control-request-method" not in headers
            or not self.shares(headers.get("origin", ""))
        ):
            return None
        found = [
            ("access-control-allow-methods", "GET, HEAD, POST, DELETE"),
            (
                "access-control-allow-headers",
                headers.get("access-control-request-headers", "authorization, content-type"),
            ),
            ("access-control-max-age", "600"),
        ]
        if headers.get("access-control-request-private-network") == "true":
            found.append(("access-control-allow-private-network", "true"))
        return found
