"""One thread that waits at all listening sockets, and watches consumers, who are silent unless they leave.

Ownership: the doorman's thread accepts; listening sockets are opened and closed by the buffer's thread. Consumers'
threads register their sockets themselves (epoll allows that from any thread).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from nngstream.errors import ListenError
from nngstream.handshake import Side
from nngstream.url import Address

log = logging.getLogger("nngstream")

_BACKLOG = 1024
#: Out of file descriptors: connections wait in the backlog so long before the next attempt, in seconds.
_PAUSE_S = 0.2

Welcome = Callable[[socket.socket, str, Side, Address], None]


class Doorman:
    """See the module.

    Args:
        welcome: called for each connection, with socket, peer's address, side and our address; must not wait.
    """

    def __init__(self, welcome: Welcome) -> None:
        self._welcome = welcome
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._lock = threading.Lock()
        self._doors: dict[int, tuple[socket.socket, Side, Address]] = {}
        self._watched: dict[int, Callable[[], None]] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="doorman", daemon=True)

    def listen(self, address: Address, side: Side) -> Address:
        """Open a listening socket; nobody is accepted before :meth:`start`.

        Returns:
            The address with its real port.

        Raises:
            ListenError: it cannot be listened at; the message says what to do.
        """
        sock = _listening(address)
        if address.scheme != "ipc":
            address = address.at(sock.getsockname()[1])
        with self._lock:
            self._doors[sock.fileno()] = (sock, side, address)
        return address

    def start(self) -> None:
        """Begin to accept."""
        for number in self._doors:
            self._epoll.register(number, select.EPOLLIN)
        self._thread.start()

    def shut(self, side: Side) -> None:
        """Accept no more connections at this side."""
        with self._lock:
            doors = [number for number, door in self._doors.items() if door[1] == side]
            for number in doors:
                sock, _, address = self._doors.pop(number)
                if self._thread.is_alive():
                    self._epoll.unregister(number)
                if address.scheme == "ipc":
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(address.path)
                sock.close()

    def close(self) -> None:
        """Shut all doors and end the thread."""
        self.shut("in")
        self.shut("out")
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        self._epoll.close()
        os.close(self._wake)

    def watch(self, sock: socket.socket, called: Callable[[], None]) -> None:
        """Call `called` once when something comes from this connection; again after each :meth:`watch_again`."""
        with self._lock:
            self._watched[sock.fileno()] = called
            self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT)

    def watch_again(self, sock: socket.socket) -> None:
        """See :meth:`watch`."""
        self._epoll.modify(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget(self, sock: socket.socket) -> None:
        """Watch no more; to be called before the socket is closed, since its number is used again at once."""
        with self._lock:
            if self._watched.pop(sock.fileno(), None):
                self._epoll.unregister(sock.fileno())

    def _run(self) -> None:
        while not self._closing:
            for number, _ in self._epoll.poll():
                with self._lock:
                    door = self._doors.get(number)
                    called = self._watched.get(number)
                try:
                    if door is not None:
                        self._accept(*door)
                    elif called is not None:
                        called()
                except Exception:  # one connection's trouble must not close the door to all others
                    log.exception("cannot serve a connection")

    def _accept(self, sock: socket.socket, side: Side, address: Address) -> None:
        try:
            connection, where = sock.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.warning("%s: cannot accept: %s", address, error.strerror)
                threading.Event().wait(_PAUSE_S)
            return
        connection.setblocking(True)
        self._welcome(connection, _named(where, address), side, address)


def _named(where: object, address: Address) -> str:
    if isinstance(where, tuple):
        return f"{where[0]}:{where[1]}"
    return f"ipc:{address.path}"


def _listening(address: Address) -> socket.socket:
    try:
        if address.scheme == "ipc":
            return _listening_ipc(Path(address.path))
        host = address.host.strip("[]")
        family, _, _, _, where = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ListenError(f"cannot listen at {address}: {error.strerror}. {_remedy(address, error)}") from error
    sock.setblocking(False)
    return sock


def _listening_ipc(path: Path) -> socket.socket:
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
        path.unlink()  # left behind by a buffer that was killed
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        # Whoever may connect may read the data: only we, unless the folder's owner opens it.
        path.chmod(0o600)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True


def _remedy(address: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE and address.scheme == "ipc":
        return "Another program listens there, or it is a file: choose another path."
    if error.errno == errno.EADDRINUSE:
        return f"Choose another port (0 takes a free one), or stop what uses it: `ss -ltnp 'sport = :{address.port}'`."
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return "That is no address of this machine: `ip address` shows them; * is all of them."
    if error.errno == errno.EACCES:
        return "Ports below 1024 belong to the system, and folders to their owners: choose another."
    return "Choose another address."
