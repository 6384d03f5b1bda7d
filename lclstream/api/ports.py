"""Whether a port can be taken: asked of the machine itself before a port is leased."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Collection, Iterator

#: Seconds a connection attempt to another machine may take to tell that somebody listens there.
CONNECT_TIMEOUT_S = 0.5


def is_free(host: str, port: int) -> bool:
    """Whether nobody uses that port.

    On this machine the port is bound for a moment, which also sees sockets that are bound but do not listen. For
    another machine a connection is tried; a machine that does not answer at all counts as free, because the job that
    is about to start there will tell.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are still in TIME_WAIT may be listened at again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                return False
        else:
            return True
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        return probe.connect_ex(address) != 0


def candidates(first: int, last: int, taken: Collection[int]) -> Iterator[int]:
    """The ports of a range that are not taken, from a random one on: a port that was just freed is not used at once."""
    count = last - first + 1
    start = random.randrange(count)  # noqa: S311 - spreads load, protects nothing
    for offset in range(count):
        port = first + (start + offset) % count
        if port not in taken:
            yield port
