"""URLs of stream sockets: ``tcp://host:port``, ``tls+tcp://host:port`` and ``ipc:///path``."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from lclstream.client.errors import AddressError

_SCHEMES = ("tcp", "tls+tcp", "ipc")


@dataclass(frozen=True)
class Address:
    """Where one socket listens or dials.

    Attributes:
        scheme: ``tcp``, ``tls+tcp`` or ``ipc``.
        host: host name or address without brackets (``0.0.0.0`` for "any"); empty for ``ipc``.
        port: TCP port; 0 for ``ipc`` and for "any free port" when listening.
        path: path of the socket file for ``ipc``.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.scheme == "ipc":
            return f"ipc://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def tls(self) -> bool:
        """Whether the bytes are encrypted."""
        return self.scheme == "tls+tcp"


def parse(url: str, *, listen: bool = False) -> Address:
    """The address a URL names.

    Args:
        url: for listening the host may be missing or ``*`` (any interface) and the port 0 (any free one).
        listen: whether we listen there.

    Raises:
        AddressError: the URL names no place to dial or listen.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise AddressError(f"{url!r} is not a URL: {error}") from error
    if parts.scheme not in _SCHEMES:
        raise AddressError(f"{url!r}: a stream URL starts with one of " + ", ".join(f"{s}://" for s in _SCHEMES))
    if parts.scheme == "ipc":
        path = url.removeprefix("ipc://")
        if not path:
            raise AddressError(f"{url!r} names no socket file: write ipc:///run/user/stream.sock")
        return Address("ipc", path=path)
    host = parts.hostname or ""
    if port is None or (port == 0 and not listen):
        raise AddressError(f"{url!r} names no port: write {parts.scheme}://{host or '127.0.0.1'}:5000")
    if not listen and host in ("", "*"):
        raise AddressError(f"{url!r} names no host to dial; an address to listen at needs listen (--listen)")
    return Address(parts.scheme, host="0.0.0.0" if host in ("", "*") else host, port=port)  # noqa: S104 - asked for
