"""Data handlers, against real peers: pynng and pyzmq sockets in the same process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pynng
import pytest
import zmq

from lclstreamer import models
from lclstreamer.errors import ConnectError, HandlerError
from lclstreamer.events import Message
from lclstreamer.handlers.base import HandlerContext
from lclstreamer.handlers.files import BinaryFileWritingDataHandler
from lclstreamer.handlers.streaming import BinaryDataStreamingDataHandler


class Sink(threading.Thread):
    """A pulling NNG or ZeroMQ socket that keeps what it gets."""

    def __init__(self, library: str, url: str, *, listen: bool, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.library, self.pause_s, self.ended = library, pause_s, threading.Event()
        self.received: list[bytes] = []
        if library == "nng":
            self.nng = pynng.Pull0(recv_max_size=0, recv_timeout=50)
            self.nng.listen(url) if listen else self.nng.dial(url, block=True)
        else:
            self.context = zmq.Context()
            self.zmq = self.context.socket(zmq.PULL)
            self.zmq.RCVTIMEO = 50
            self.zmq.RCVHWM = 1
            self.zmq.bind(url) if listen else self.zmq.connect(url)
        self.start()

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.received.append(self.nng.recv() if self.library == "nng" else self.zmq.recv())
            except (pynng.Timeout, zmq.Again):
                continue
            time.sleep(self.pause_s)

    def close(self) -> None:
        self.ended.set()
        self.join(30)
        if self.library == "nng":
            self.nng.close()
        else:
            self.zmq.close(0)
            self.context.term()


@pytest.fixture
def sink() -> Iterator[Callable[..., Sink]]:
    made: list[Sink] = []

    def make(*arguments: Any, **options: Any) -> Sink:
        made.append(Sink(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        if not one.ended.is_set():
            one.close()


@contextmanager
def streaming(stop: threading.Event, **options: Any) -> Iterator[BinaryDataStreamingDataHandler]:
    settings = models.BinaryDataStreamingDataHandler(type="BinaryDataStreamingDataHandler", **options)
    handler = BinaryDataStreamingDataHandler(settings, HandlerContext(0, 1, stop))
    handler.open()
    try:
        yield handler
    finally:
        with suppress(HandlerError):
            handler.close(drain=False, timeout=1)


def message(content: bytes, **options: Any) -> Message:
    # In two pieces, since serializers give messages in pieces.
    return Message([content[:3], content[3:]], events=1, **options)


def send_many(handler: BinaryDataStreamingDataHandler, content: bytes, count: int) -> None:
    for _ in range(count):
        handler.handle(message(content))


CONTENT = [bytes([number]) * size for number, size in enumerate((1, 255, 256, 70_000, 3_000_000, 4, 5_000_000))]


@pytest.mark.parametrize("library", ["nng", "zmq"])
@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_everything_sent_before_closing_arrives_in_order(
    library: str,
    role: str,
    transport: str,
    sink: Any,
    stop: threading.Event,
    free_port: Any,
    tmp_path: Path,
    wait_until: Any,
) -> None:
    url = f"tcp://127.0.0.1:{free_port()}" if transport == "tcp" else f"ipc://{tmp_path}/s"
    if role == "client":
        peer = sink(library, url, listen=True)
    with streaming(stop, urls=[url], role=role, library=library) as handler:
        if role == "server":
            peer = sink(library, url, listen=False)
        for content in CONTENT:
            handler.handle(message(content))
        handler.close(drain=True)
        assert handler.messages == len(CONTENT)
        assert handler.nbytes == sum(map(len, CONTENT))
    wait_until(lambda: len(peer.received) == len(CONTENT), 60, "all messages")
    assert peer.received == CONTENT


@pytest.mark.parametrize("library", ["nng", "zmq"])
def test_several_sinks_share_the_messages_and_a_slow_one_gets_fewer(
    library: str, sink: Any, stop: threading.Event, free_port: Any, wait_until: Any
) -> None:
    urls = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    slow = sink(library, urls[0], listen=True, pause_s=0.3)
    fast = sink(library, urls[1], listen=True)
    count = 40
    with streaming(stop, urls=urls, role="client", library=library) as handler:
        wait_until(lambda: handler._connected == 2, 60, "two sinks")
        for number in range(count):
            handler.handle(message(number.to_bytes(4, "big") * 500_000))
        handler.close(drain=True)
    wait_until(lambda: len(slow.received) + len(fast.received) == count, 60, "all messages")
    got = sorted(int.from_bytes(one[:4], "big") for one in slow.received + fast.received)
    assert got == list(range(count))
    assert slow.received
    assert len(slow.received) < len(fast.received)


def test_without_a_sink_the_wait_is_bounded_and_the_error_says_what_to_do(
    stop: threading.Event, free_port: Any
) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with (
        streaming(stop, urls=[url], role="client", connect_timeout_s=0.3) as handler,
        pytest.raises(HandlerError, match=r"no sink is there since .* Start the sink first"),
    ):
        send_many(handler, b"abcd", 10)


def test_the_wait_for_a_sink_begins_when_connecting_does(
    stop: threading.Event, free_port: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    settings = models.BinaryDataStreamingDataHandler(
        type="BinaryDataStreamingDataHandler", urls=[url], role="client", connect_timeout_s=100
    )
    handler = BinaryDataStreamingDataHandler(settings, HandlerContext(0, 1, stop))
    real, late = time.monotonic, 200.0  # the data took longer to open than a sink may take to come
    monkeypatch.setattr("lclstreamer.handlers.streaming.time.monotonic", lambda: real() + late)
    handler.open()
    handler._check_alone()
    assert handler._queue.error is None
    handler.close(drain=False, timeout=1)


def test_a_rank_without_messages_still_says_hello(stop: threading.Event, free_port: Any) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    with (
        streaming(stop, urls=[url], role="client", connect_timeout_s=0.2, drain_timeout_s=0.4) as handler,
        pytest.raises(HandlerError, match="no sink is there"),
    ):
        handler.close(drain=True)


@pytest.mark.parametrize("library", ["nng", "zmq"])
def test_a_sink_that_takes_nothing_ends_the_wait(library: str, stop: threading.Event, free_port: Any) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(60)
        held: list[socket.socket] = []

        def shake_hands() -> None:
            peer, _ = server.accept()
            held.append(peer)
            if library == "nng":
                peer.sendall(b"\0SP\0\0\x51\0\0")
            else:
                peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
                ready = b"\x05READY\x0bSocket-Type\0\0\0\x04PULL"
                peer.sendall(bytes([4, len(ready)]) + ready)

        thread = threading.Thread(target=shake_hands)
        thread.start()
        url = f"tcp://127.0.0.1:{port}"
        with streaming(stop, urls=[url], role="client", library=library, send_timeout_s=0.5) as handler:  # noqa: SIM117
            with pytest.raises(HandlerError, match="send_timeout_s"):
                send_many(handler, bytes(4_000_000), 50)
        thread.join()
        held[0].close()


@pytest.mark.parametrize("library", ["nng", "zmq"])
def test_when_a_sink_leaves_the_messages_go_to_the_other_one(
    library: str, sink: Any, stop: threading.Event, free_port: Any, wait_until: Any
) -> None:
    urls = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    leaves, stays = (sink(library, url, listen=True) for url in urls)
    with streaming(stop, urls=urls, role="client", library=library) as handler:
        wait_until(lambda: handler._connected == 2, 60, "two sinks")
        handler.handle(message(b"first"))
        wait_until(lambda: handler.messages == 1, 60, "the first message sent")
        wait_until(lambda: leaves.received or stays.received, 60, "the first message received")
        leaves.close()
        wait_until(lambda: handler._connected == 1, 60, "one sink")
        for number in range(20):
            handler.handle(message(b"%04d" % number))
        handler.close(drain=True)
    wait_until(lambda: len(stays.received) + len(leaves.received) == 21, 60, "all messages")


@pytest.mark.parametrize(("library", "other"), [("nng", "zmq"), ("zmq", "nng")])
def test_a_sink_of_the_other_library_is_recognised(
    library: str, other: str, sink: Any, stop: threading.Event, free_port: Any
) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    sink(other, url, listen=True)
    with (
        streaming(stop, urls=[url], role="client", library=library, connect_timeout_s=1.0) as handler,
        pytest.raises(HandlerError, match="no sink is there"),
    ):
        send_many(handler, b"abcd", 20)


def test_zeromq_heartbeats_are_answered(stop: threading.Event, free_port: Any, wait_until: Any) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    context = zmq.Context()
    peer = context.socket(zmq.PULL)
    peer.setsockopt(zmq.HEARTBEAT_IVL, 100)
    peer.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2000)  # a busy machine may stop for a second
    peer.RCVTIMEO = 30_000
    peer.bind(url)
    monitor = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        with streaming(stop, urls=[url], role="client", library="zmq") as handler:
            wait_until(lambda: handler._connected, 60, "connection")
            # Longer than the heartbeat's limit: an unanswered one would end the connection.
            assert not monitor.poll(3000)
            handler.handle(message(b"alive"))
            assert peer.recv() == b"alive"
    finally:
        peer.disable_monitor()
        monitor.close(0)
        peer.close(0)
        context.term()


def test_an_address_in_use_is_named_at_once(stop: threading.Event) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectError, match="cannot listen at tcp"), streaming(stop, urls=[url], role="server"):
            pass


def test_an_unknown_host_is_named_at_once(stop: threading.Event) -> None:
    with (
        pytest.raises(ConnectError, match="host is not known"),
        streaming(stop, urls=["tcp://no-such-host.invalid:1"], role="client"),
    ):
        pass


def test_a_socket_file_left_behind_by_a_crash_is_no_obstacle(stop: threading.Event, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    with streaming(stop, urls=[f"ipc://{path}"], role="server"):
        assert path.exists()
    assert not path.exists()


def test_memory_is_given_back_when_a_message_has_been_sent(sink: Any, stop: threading.Event, free_port: Any) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    sink("nng", url, listen=True)
    released = []
    with streaming(stop, urls=[url], role="client", library="nng") as handler:
        for number in range(5):
            handler.handle(message(b"12345", on_release=lambda number=number: released.append(number)))
        handler.close(drain=True)
    assert released == list(range(5))


# -------------------------------------------------------------------------------------------------------------- files


def files(folder: Path, stop: threading.Event, **options: Any) -> BinaryFileWritingDataHandler:
    settings = models.BinaryFileWritingDataHandler(
        type="BinaryFileWritingDataHandler", write_directory=folder, **options
    )
    return BinaryFileWritingDataHandler(settings, HandlerContext(3, 4, stop))


@pytest.mark.parametrize("fsync", [False, True])
def test_every_message_is_a_file_named_after_rank_and_number(
    tmp_path: Path, stop: threading.Event, fsync: bool
) -> None:
    handler = files(tmp_path / "new" / "folder", stop, file_prefix="run7", fsync=fsync)
    handler.open()
    for content in CONTENT:
        handler.handle(message(content))
    handler.close(drain=True)
    names = sorted(os.listdir(tmp_path / "new" / "folder"))
    assert names == [f"run7_r3_{number}.h5" for number in range(len(CONTENT))]
    assert [(tmp_path / "new" / "folder" / name).read_bytes() for name in names] == CONTENT


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_no_part(stop: threading.Event, tmp_path: Path) -> None:
    handler = files(tmp_path, stop, file_suffix="dat")

    original = handler._write

    def write(path: Path, one: Message) -> None:
        real_open = Path.open

        def open_full(self: Path, *arguments: Any, **options: Any) -> Any:
            file = real_open(self, *arguments, **options)
            file.close()
            raise OSError(28, "No space left on device")

        Path.open = open_full  # type: ignore[method-assign, assignment]
        try:
            original(path, one)
        finally:
            Path.open = real_open  # type: ignore[method-assign]

    handler._write = write  # type: ignore[method-assign]
    handler.open()
    handler.handle(message(b"abcdef"))
    with pytest.raises(HandlerError, match=r"r3_0\.dat cannot be written: No space left on device; free space"):
        handler.close(drain=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("queued", [0, 2])
def test_a_file_that_is_still_being_written_at_the_deadline_is_not_reported_as_written(
    tmp_path: Path, stop: threading.Event, queued: int
) -> None:
    handler = files(tmp_path, stop)
    began, go_on, original = threading.Event(), threading.Event(), handler._write

    def hang(path: Path, one: Message) -> None:
        began.set()
        assert go_on.wait(30)
        original(path, one)

    handler._write = hang  # type: ignore[method-assign]
    handler.open()
    handler.handle(message(b"first"))
    assert began.wait(30)
    for _ in range(queued):
        handler.handle(message(b"later"))
    try:
        with pytest.raises(HandlerError, match=f"{queued + 1} messages were not written in time"):
            handler.close(drain=True, timeout=0.3)
        assert handler.messages == 0
    finally:
        go_on.set()
        handler._thread.join(30)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, stop: threading.Event) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HandlerError, match="write_directory"):
        files(tmp_path / "file" / "folder", stop).open()
