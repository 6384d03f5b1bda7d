"""Buffers in this process, and peers: real libnng, real libzmq, and bare sockets for what no library would do."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pynng
import pytest
import zmq
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from nngstream.buffer import Buffer
from nngstream.config import checked

PUSH = b"\x00SP\x00\x00\x50\x00\x00"
PULL = b"\x00SP\x00\x00\x51\x00\x00"


class Running:
    """A buffer whose `run` has a thread of its own."""

    def __init__(self, **options: Any) -> None:
        values: dict[str, Any] = {"in": ["tcp://127.0.0.1:0"], "out": ["tcp://127.0.0.1:0"], "grace": 0.05, "drain": 1}
        self.buffer = Buffer(checked(values | options, "test"))
        self.buffer.start()
        self.thread = threading.Thread(target=self.buffer.run, name="buffer under test")
        self.thread.start()

    @property
    def inp(self) -> str:
        return self.buffer.inputs[0]

    @property
    def out(self) -> str:
        return self.buffer.outputs[0]

    def status(self) -> dict[str, Any]:
        return self.buffer.status()

    def amounts(self) -> tuple[int, int, int, int]:
        """Messages received, sent, held, lost."""
        ledger = self.buffer.ledger()
        return ledger.received.messages, ledger.sent.messages, ledger.held.messages, ledger.lost.messages

    def in_turn(self) -> int:
        """Consumers that wait for a message: the next ones go to them, one after the other."""
        return sum(map(len, self.buffer.fifo._waiting))

    def wait(self, timeout: float = 60) -> str:
        self.thread.join(timeout)
        assert not self.thread.is_alive(), f"the buffer still runs after {timeout} s: {self.status()}"
        return str(self.buffer.state)

    def end(self) -> None:
        for _ in range(2):
            if self.thread.is_alive():
                self.buffer.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()


def assert_closed_account(buffer: Buffer) -> None:
    ledger = buffer.ledger()
    for unit in ("messages", "bytes"):
        received, sent, held, lost = (getattr(amount, unit) for amount in ledger[:4])
        assert received == sent + held + lost, f"{unit}: {ledger}"


@pytest.fixture
def run_buffer() -> Iterator[Callable[..., Running]]:
    """Start buffers; each must close its account, and leave no thread behind."""
    running: list[Running] = []
    before = set(threading.enumerate())

    def run(**options: Any) -> Running:
        running.append(Running(**options))
        return running[-1]

    yield run
    for each in running:
        each.end()
        assert_closed_account(each.buffer)
        assert each.buffer.pool.used == 0
    left = [thread for thread in threading.enumerate() if thread not in before and _ours(thread)]
    for thread in left:  # one whose connection has ended by itself may still be on its last lines
        thread.join(30)
        assert not thread.is_alive(), left


def _ours(thread: threading.Thread) -> bool:
    return thread.name.startswith(("in ", "out ", "dial", "doorman", "status", "buffer"))


def connect(url: str) -> socket.socket:
    """A bare connection to a buffer's URL."""
    parts = urlsplit(url)
    if parts.scheme == "ipc":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        sock.connect(parts.path)
        return sock
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise EOFError(f"closed {len(view)} bytes before the end of {size}")
        view = view[count:]
    return bytes(data)


def sp(message: bytes) -> bytes:
    return struct.pack(">Q", len(message)) + message


@pytest.fixture
def raw() -> Iterator[Callable[..., socket.socket]]:
    """Bare connections; `greeting` makes it an SP peer."""
    with contextlib.ExitStack() as stack:

        def open_one(url: str, greeting: bytes = b"") -> socket.socket:
            sock = stack.enter_context(connect(url))
            if greeting:
                sock.sendall(greeting)
                read_exactly(sock, 8)
            return sock

        yield open_one


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def nng() -> Iterator[Callable[..., Any]]:
    """Sockets of libnng: ``nng(pynng.Push0, dial=URL)``."""
    with contextlib.ExitStack() as stack:

        def open_one(kind: type, **options: Any) -> Any:
            socket_ = stack.enter_context(kind(**{"send_timeout": 60_000, "recv_timeout": 30_000, **options}))
            socket_.recv_max_size = 0
            return socket_

        yield open_one


class Collector(threading.Thread):
    """Receives until a number of messages, an empty one (`sentinel`), or :meth:`finish`.

    The time-out of its socket is how often it looks whether to go on. Only one who knows neither a number nor an end
    takes a time-out for the end, when as many as are expected have come.
    """

    def __init__(self, receive: Callable[[], Any], *, count: int | None = None, sentinel: bool = False) -> None:
        super().__init__(name="collector")
        self._receive = receive
        self._count = count
        self._sentinel = sentinel
        self._finish = threading.Event()
        self._came: Callable[[], int] = lambda: len(self.messages)
        self._expected = 0
        self._deadline = 0.0
        self.messages: list[Any] = []

    def run(self) -> None:
        with contextlib.suppress(pynng.Closed, EOFError, ConnectionError, OSError):
            while self._count is None or len(self.messages) < self._count:
                try:
                    message = self._receive()
                except (pynng.Timeout, zmq.Again):
                    if self._over():
                        return
                    continue
                if self._sentinel and not message:
                    return
                self.messages.append(message)

    def _over(self) -> bool:
        if not self._finish.is_set():
            return False
        if time.monotonic() > self._deadline:
            return True
        return not self._sentinel and self._count is None and self._came() >= self._expected

    def finish(self, expected: int = 0, came: Callable[[], int] | None = None) -> list[Any]:
        """Receive what is still under way, and return everything.

        Args:
            expected: how many messages there must be before a silence is the end: a busy machine may be silent, too.
            came: counts them, when several collectors share them.
        """
        self._expected, self._came = expected, came or self._came
        self._deadline = time.monotonic() + 30
        self._finish.set()
        self.join(60)
        assert not self.is_alive()
        return self.messages


@pytest.fixture
def collect() -> Iterator[Callable[..., Collector]]:
    started: list[Collector] = []

    def begin(receive: Callable[[], Any], **options: Any) -> Collector:
        started.append(Collector(receive, **options))
        started[-1].start()
        return started[-1]

    yield begin
    for each in started:
        each.finish()


@pytest.fixture
def zmq_pull(context: zmq.Context[Any]) -> Callable[..., zmq.Socket[Any]]:
    sockets = []

    def pull(url: str, *, timeout_s: float = 30) -> zmq.Socket[Any]:
        sockets.append(context.socket(zmq.PULL))
        sockets[-1].setsockopt(zmq.RCVTIMEO, round(1000 * timeout_s))
        sockets[-1].connect(url)
        return sockets[-1]

    return pull


@pytest.fixture
def zmq_push(context: zmq.Context[Any]) -> Callable[..., zmq.Socket[Any]]:
    sockets = []

    def push(url: str) -> zmq.Socket[Any]:
        sockets.append(context.socket(zmq.PUSH))
        sockets[-1].setsockopt(zmq.SNDTIMEO, 60_000)
        sockets[-1].setsockopt(zmq.LINGER, 60_000)
        sockets[-1].connect(url)
        return sockets[-1]

    return push


@pytest.fixture
def sp_receive() -> Callable[[socket.socket], bytes]:
    """Receive one message of an SP connection."""

    def receive(sock: socket.socket) -> bytes:
        (size,) = struct.unpack(">Q", read_exactly(sock, 8))
        return read_exactly(sock, size)

    return receive


@pytest.fixture
def drained() -> Callable[[Any], None]:
    """Wait until a libnng pusher's bytes have left: closing it earlier would lose them."""

    def wait(running: Running, messages: int) -> None:
        deadline = time.monotonic() + 60
        while running.amounts()[0] < messages:
            assert time.monotonic() < deadline, f"{running.amounts()[0]} of {messages} messages came"
            time.sleep(0.005)

    return wait


@pytest.fixture(name="sp")
def sp_fixture() -> Callable[[bytes], bytes]:
    """A message as an SP peer sends it."""
    return sp


@pytest.fixture
def push_greeting() -> bytes:
    return PUSH


@pytest.fixture
def pull_greeting() -> bytes:
    return PULL


class Authority:
    """Certificates with P-256 keys, which both OpenSSL and Mbed TLS understand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self._certificate = self._sign("authority", self._key, ca=True)
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def member(self, name: str, *, ed25519_key: bool = False) -> dict[str, Path]:
        """Options of a buffer (`certificate`, `key`, `ca`), and both in one file (`both`), as pynng wants it."""
        key = ed25519.Ed25519PrivateKey.generate() if ed25519_key else ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key).public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        files = {kind: self.folder / f"{name}.{kind}" for kind in ("certificate", "key", "both")}
        for kind, data in (("certificate", certificate), ("key", private), ("both", private + certificate)):
            files[kind].touch(0o600)
            files[kind].write_bytes(data)
        return {**files, "ca": self.ca}

    def _sign(
        self, name: str, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, *, ca: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "ours")


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "others")
