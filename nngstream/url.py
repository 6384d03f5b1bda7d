"""Where the buffer listens, and whom it calls.

===============================  ==================================================================
``tcp://HOST:PORT``              listen; port 0 takes a free one, host ``*`` is every interface
``tls+tcp://HOST:PORT``          the same with mutual TLS
``ipc:///PATH``                  listen at a UNIX socket
``dial+tcp://HOST:PORT`` ...     any of these with ``dial+``: connect, and connect again when it breaks
===============================  ==================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nngstream.errors import ConfigurationError

_SCHEMES = ("tcp", "tls+tcp", "ipc")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%a-z]+\]|[^:/\[\]]+):(?P<port>\d{1,5})")
#: Linux takes 107 bytes of a socket's path.
_MAX_PATH = 107


@dataclass(frozen=True)
class Address:
    """One URL of ``--in``, ``--out`` or ``--status``.

    Attributes:
        scheme: ``tcp``, ``tls+tcp``, ``ipc`` (or ``http``, ``https`` for the status).
        host, port: of the network schemes.
        path: of ``ipc``.
        dial: connect instead of listening.
    """

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    dial: bool = False

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.scheme in ("tls+tcp", "https")

    def at(self, port: int) -> Address:
        """The same address with the port that the system chose."""
        return replace(self, port=port)

    def __str__(self) -> str:
        where = self.path if self.scheme == "ipc" else f"{self.host}:{self.port}"
        return f"{'dial+' if self.dial else ''}{self.scheme}://{where}"


def parse(text: str, *, schemes: tuple[str, ...] = _SCHEMES) -> Address:
    """Read a URL.

    Raises:
        ConfigurationError: it is none of those of the module's table; the message says what would be one.
    """
    scheme, separator, rest = text.partition("://")
    dial = scheme.startswith("dial+")
    scheme = scheme.removeprefix("dial+")
    if not separator or scheme not in schemes or (dial and "http" in schemes):
        allowed = ", ".join(f"{each}://" for each in schemes)
        raise ConfigurationError(f"{text!r} is no address: it must begin with one of {allowed}" + _dial_hint(schemes))
    if scheme == "ipc":
        return _ipc(text, rest, dial)
    found = _HOST_PORT.fullmatch(rest.rstrip("/"))
    if not found or int(found["port"]) > 65535:
        raise ConfigurationError(f"{text!r} is no address: after {scheme}:// comes HOST:PORT, such as 127.0.0.1:5000")
    host = "0.0.0.0" if found["host"] == "*" else found["host"]  # noqa: S104 - asked for by the user
    if dial and int(found["port"]) == 0:
        raise ConfigurationError(f"{text!r}: nobody can be called at port 0")
    return Address(scheme, host, int(found["port"]), dial=dial)


def _ipc(text: str, path: str, dial: bool) -> Address:
    if not path.startswith("/"):
        raise ConfigurationError(f"{text!r} is no address: ipc needs an absolute path, such as ipc:///run/user/1000/in")
    if len(path.encode()) > _MAX_PATH:
        raise ConfigurationError(
            f"{text!r}: the path of a UNIX socket has at most {_MAX_PATH} bytes; choose a shorter one"
        )
    return Address("ipc", path=path, dial=dial)


def _dial_hint(schemes: tuple[str, ...]) -> str:
    return "" if "http" in schemes else " (or dial+ and one of them, to connect instead of listening)"
