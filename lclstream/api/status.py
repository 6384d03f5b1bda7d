"""Reading a buffer's status over mutual TLS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lclstream.security import http
from lclstream.security.credentials import Credentials
from lclstream.security.errors import UnreachableError

#: Seconds one answer may take; a buffer answers at once or is in trouble.
TIMEOUT_S = 5.0


def messages(document: Mapping[str, Any], what: str) -> int:
    """How many messages a status document counts as `received`, `sent`, `held` or `lost`; 0 when it does not say."""
    section = document.get(what)
    return int(section.get("messages", 0)) if isinstance(section, Mapping) else 0


class HttpsStatusReader:
    """One buffer's status, over one connection that is kept.

    Args:
        url: the buffer's status address, such as ``https://dtn:30003``.
        credentials: who we are.
    """

    def __init__(self, url: str, credentials: Credentials) -> None:
        self._url = url
        self._http = http.async_client(url, credentials, timeout=TIMEOUT_S)

    async def read(self) -> dict[str, Any]:
        """The status document.

        Raises:
            PeerError: the buffer does not answer, or answers something else.
        """
        async with http.aexplained(self._url):
            response = (await self._http.get("/status")).raise_for_status()
        try:
            document = response.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise UnreachableError(f"{self._url}/status is not a buffer's status: {response.text[:200]!r}")
        return document

    async def aclose(self) -> None:
        """Close the connection."""
        await self._http.aclose()
