"""Load for `buffer.py`: plain sockets that speak ZeroMQ's protocol, a process each.

They write prepared bytes and count what arrives, so that neither a library nor parsing is measured; what is left is the
kernel's copy on each side, and the benchmark says what that costs.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from nngstream.wire import zmtp

fork = multiprocessing.get_context("fork")
BLOCK = 256 * 1024
READ = 1 << 20
_STAMP = struct.Struct("Qd")


def connect(url: str, kind: str, tls: dict[str, str] | None) -> socket.socket:
    """A connection after the handshake of a PUSH or PULL socket."""
    deadline = time.monotonic() + 15
    host, _, port = url.rpartition("://")[2].rpartition(":")
    while True:
        try:
            sock = socket.create_connection((host, int(port)), timeout=10)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        context = ssl.create_default_context(cafile=tls["ca"])
        context.load_cert_chain(tls["certificate"], tls["key"])
        sock = context.wrap_socket(sock, server_hostname=host)
    sock.sendall(zmtp.greeting() + zmtp.ready(kind))
    exactly(sock, zmtp.GREETING_SIZE)
    exactly(sock, exactly(sock, 2)[1])
    sock.settimeout(None)
    return sock


def exactly(sock: socket.socket, size: int) -> bytearray:
    """Read so many bytes."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise ConnectionError("closed")
        view = view[count:]
    return data


def produce(url: str, size: int, tls: dict[str, str] | None, interval_s: float) -> None:
    """Send messages of `size` bytes for ever, as fast as they are taken, or one every `interval_s`."""
    sock = connect(url, "PUSH", tls)
    with suppress(ConnectionError):  # the buffer was stopped
        _produce(sock, size, interval_s)


def _produce(sock: socket.socket, size: int, interval_s: float) -> None:
    header = zmtp.ZMTP.header(size, False)
    if interval_s:
        message = bytearray(header + bytes(size))
        due = time.monotonic()
        while True:
            due += interval_s
            time.sleep(max(0.0, due - time.monotonic()))
            struct.pack_into("d", message, len(header), time.monotonic())
            sock.sendall(message)
    block = memoryview((header + os.urandom(min(size, 1 << 20)) * max(1, size >> 20))[: len(header) + size])
    if len(block) < BLOCK:
        block = memoryview(bytes(block) * (BLOCK // len(block)))
    while True:
        sock.sendall(block)


def consume(url: str, size: int, tls: dict[str, str] | None, counter: Synchronized[int]) -> None:
    """Count the bytes that arrive, for ever."""
    sock = connect(url, "PULL", tls)
    buffer = memoryview(bytearray(READ))
    total = 0
    while True:
        count = sock.recv_into(buffer)
        if not count:
            return
        total += count
        counter.value = total


def clock(url: str, size: int, tls: dict[str, str] | None, path: str) -> None:
    """Note how old each message is when its last byte has arrived, in a file of doubles, for ever."""
    sock = connect(url, "PULL", tls)
    header = len(zmtp.ZMTP.header(size, False))
    with Path(path).open("ab", buffering=0) as file:
        while True:
            message = exactly(sock, header + size)
            file.write(struct.pack("d", time.monotonic() - struct.unpack_from("d", message, header)[0]))


def produce_at(
    url: str, size: int, tls: dict[str, str] | None, rate: float, seconds: float, behind: Synchronized[float]
) -> None:
    """Send `rate` messages a second for so long, each with its number and the time at which it was due.

    `behind` becomes the largest delay of a message's last byte against that time, in seconds.
    """
    sock = connect(url, "PUSH", tls)
    header = zmtp.ZMTP.header(size, False)
    step = len(header) + size
    together = max(1, BLOCK // step)
    block = bytearray((header + bytes(size)) * together)
    begin = time.monotonic()
    for first in range(0, int(rate * seconds), together):
        due = begin + first / rate
        time.sleep(max(0.0, due - time.monotonic()))
        for index in range(together):
            _STAMP.pack_into(block, index * step + len(header), first + index, due)
        sock.sendall(block)
        behind.value = max(behind.value, time.monotonic() - due)
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(4096):
        pass


def check(url: str, size: int, tls: dict[str, str] | None, late_s: float, found: Any) -> None:
    """Look at every message's number and age: `found` becomes messages, those missing, those late, the greatest age."""
    sock = connect(url, "PULL", tls)
    header = len(zmtp.ZMTP.header(size, False))
    step = header + size
    buffer = memoryview(bytearray(step * max(1, BLOCK // step)))
    have = expected = 0
    while count := sock.recv_into(buffer[have:]):
        have += count
        now = time.monotonic()
        whole = have // step
        for index in range(whole):
            number, due = _STAMP.unpack_from(buffer, index * step + header)
            found[1] += abs(number - expected)
            expected = number + 1
            if now - due > late_s:
                found[2] += 1
            found[3] = max(found[3], now - due)
        found[0] += whole
        rest = have - whole * step
        if whole:
            buffer[:rest] = buffer[whole * step : have]
        have = rest


@contextmanager
def started(processes: list[Any]) -> Iterator[None]:
    """Start processes; at the end, kill them, and complain when one had failed."""
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            if process.exitcode:
                raise SystemExit(f"a load process ended with {process.exitcode}")
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait(condition: Callable[[], bool], timeout: float = 30) -> None:
    """Wait until something is so, or end the program."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing arrived within {timeout:g} s")
        time.sleep(0.01)
