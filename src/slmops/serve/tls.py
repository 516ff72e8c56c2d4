"""TLS: a certificate and its key from files, taken again when they change, without an end to any connection."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

from slmops.errors import UsageError

LOOK_S = 10.0


class Certificate:
    """What the server proves its name with. `context` takes a renewed one for connections to come.

    Raises:
        UsageError: the files are no certificate and its key.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self.context = self._read()
        self._stamp = self._stat()

    def _load(self, context: ssl.SSLContext) -> None:
        def locked() -> str:
            raise UsageError(
                f"{self._files[1]} wants a password", "give a key without one, in a file that only the server may read"
            )

        try:
            context.load_cert_chain(*self._files, password=locked)
        except (OSError, ValueError) as error:
            both = " and ".join(map(str, self._files))
            raise UsageError(
                f"{both} are no certificate and its key: {error}", "give PEM files, the chain whole"
            ) from error

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(context)
        return context

    def _stat(self) -> list[tuple[int, int]]:
        found = []
        for file in self._files:
            try:
                status = file.stat()
            except OSError:
                return []
            found.append((status.st_mtime_ns, status.st_ino))
        return found

    def renew(self) -> bool:
        """Take the files again if they have changed. Tried beside first: half of a change leaves what was.

        Raises:
            UsageError: they are no certificate and its key.
        """
        stamp = self._stat()
        if stamp == self._stamp:
            return False
        self._read()
        self._load(self.context)
        self._stamp = stamp
        return True

    async def follow(self, say: Callable[[str], None]) -> None:
        """Renew until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self.renew():
                    say("the certificate was renewed")
            except UsageError as error:
                say(f"the certificate is as before: {error.message}")
