"""Who is at the other end of a UNIX socket, by the kernel."""

from __future__ import annotations

import pwd
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from lclstream.signer.errors import RefusedError

_UCRED = struct.Struct("3i")


@dataclass(frozen=True)
class Peer:
    """A process at the other end.

    Attributes:
        pid: its process id.
        uid: its user's number, as it was when it connected (for a listening socket: when it began to listen).
        gid: its group's number.
    """

    pid: int
    uid: int
    gid: int

    def login(self) -> str:
        """The user's login.

        Raises:
            RefusedError: the user has none here: he is unknown, or comes out of a container that maps its users.
        """
        if self.uid == _overflow_uid() or self.uid < 0:
            raise RefusedError(
                "login", f"user {self.uid} stands for users of another namespace: ask from outside the container"
            )
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            raise RefusedError("login", f"user {self.uid} has no login on this machine") from None


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel.

    Raises:
        OSError: the connection has gone, or is no UNIX socket.
    """
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid, gid)


def _overflow_uid() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 65534
