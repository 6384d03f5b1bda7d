"""The NNG ends against real libnng, against each other, and against peers that misbehave."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pynng
import pytest

from lclstream.client import (
    BrokenStream,
    ListenError,
    NoPeerError,
    Pusher,
    StreamTimeout,
    WrongPeerError,
    pull,
    push,
)

PUSH_HELLO = b"\0SP\0\0\x50\0\0"
PULL_HELLO = b"\0SP\0\0\x51\0\0"


def messages(count: int, size: int = 1000) -> list[bytes]:
    return [bytes([i % 251]) * (size + i) for i in range(count)]


def send_all(pusher: Pusher, sent: list[bytes]) -> None:
    for message in sent:
        pusher.send(message)


@contextmanager
def served(port: int, *answers: Callable[[socket.socket], None]) -> Iterator[None]:
    """A raw TCP server that treats its first connections as the functions say, one after the other."""
    server = socket.create_server(("127.0.0.1", port))

    def run() -> None:
        for answer in answers:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                answer(connection)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(60)
        assert not thread.is_alive()


def say(*pieces: bytes, reset: bool = False) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(8, socket.MSG_WAITALL)
        connection.sendall(b"".join(pieces))
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def framed(message: bytes) -> bytes:
    return struct.pack(">Q", len(message)) + message


@contextmanager
def libnng_reader(url: str, count: int) -> Iterator[list[bytes]]:
    """libnng reads `count` messages beside us; the list is complete when the block has ended."""
    received: list[bytes] = []
    with pynng.Pull0(listen=url, recv_timeout=30_000, recv_max_size=0) as puller:
        reader = threading.Thread(target=lambda: received.extend(puller.recv() for _ in range(count)))
        reader.start()
        yield received
        reader.join(60)


# pynng 0.9 cannot hand out an empty message, so the smallest here has one byte.
@pytest.mark.parametrize("size", [1, 100_000, 5_000_000])
def test_what_our_pusher_sends_libnng_receives_in_order_and_whole(free_port, size):
    url = f"tcp://127.0.0.1:{free_port()}"
    sent = messages(10, size)
    with libnng_reader(url, len(sent)) as received, push(url, timeout_s=30) as pusher:
        send_all(pusher, sent)
    assert received == sent
    assert pusher.statistics.messages == 10
    assert pusher.statistics.lost == 0


@pytest.mark.parametrize("size", [0, 10, 100_000, 5_000_000])
def test_what_libnng_sends_our_puller_receives(free_port, size):
    url = f"tcp://127.0.0.1:{free_port()}"
    sent = messages(10, size)
    with pull(url, listen=True, timeout_s=30) as puller:
        with pynng.Push0(dial=url) as pusher:
            for message in sent:
                pusher.send(message)
            received = [puller.receive() for _ in sent]
        assert puller.receive() is None
        assert received == sent


@pytest.mark.parametrize("pusher_listens", [True, False])
def test_an_iteration_ends_with_the_stream(free_port, pusher_listens):
    url = f"tcp://127.0.0.1:{free_port()}"
    sent = messages(50, 200_000)

    def produce() -> None:
        with push(url, listen=pusher_listens, timeout_s=30) as pusher:
            for message in sent:
                pusher.send(message)

    producer = threading.Thread(target=produce)
    producer.start()
    with pull(url, listen=not pusher_listens, timeout_s=30) as puller:
        received = list(puller)
    producer.join(60)
    assert received == sent
    assert puller.over
    assert puller.statistics.messages == 50
    assert puller.statistics.bytes == sum(map(len, sent))
    assert puller.statistics.last_unix_s >= puller.statistics.first_unix_s
    assert abs(time.time() - puller.statistics.last_unix_s) < 60
    assert puller.statistics.rate_bytes_s > 0


def test_unix_sockets_carry_the_stream_between_libnng_and_us(tmp_path: Path):
    url = f"ipc://{tmp_path}/stream.sock"
    sent = messages(5, 100_000)
    with pull(url, listen=True, timeout_s=30) as puller, pynng.Push0(dial=url) as pusher:
        for message in sent:
            pusher.send(message)
        assert [puller.receive() for _ in sent] == sent
    with libnng_reader(url, len(sent)) as received, push(url, timeout_s=30) as ours:
        for message in sent:
            ours.send(message)
    assert received == sent


def test_several_urls_and_connections_are_one_stream(free_port):
    urls = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    sent = messages(40, 1000)

    def produce(part: int) -> None:
        with push(urls[part], listen=True, timeout_s=30) as pusher:
            opened.wait(60)  # who sends and leaves between two connections is not met by the second
            for message in sent[part::2]:
                pusher.send(message)

    opened = threading.Event()
    producers = [threading.Thread(target=produce, args=(part,)) for part in range(2)]
    for producer in producers:
        producer.start()
    with pull(urls, connections=2, timeout_s=30) as puller:
        opened.set()
        received = list(puller)
    for producer in producers:
        producer.join(60)
    assert sorted(received) == sorted(sent)
    assert puller.statistics.connections == 4


def test_a_connection_cut_inside_a_message_is_a_broken_stream_after_the_whole_ones(free_port):
    port = free_port()
    cut = struct.pack(">Q", 1000) + b"x" * 10
    with served(port, say(PUSH_HELLO, framed(b"one"), framed(b"two"), cut)):
        stream = iter(pull(f"tcp://127.0.0.1:{port}", timeout_s=30))
        assert next(stream) == b"one"
        assert next(stream) == b"two"
        with pytest.raises(BrokenStream, match="10 of 1000 bytes"):
            next(stream)


def test_a_reset_connection_is_a_broken_stream(free_port):
    port = free_port()
    with served(port, say(PUSH_HELLO, reset=True)), pytest.raises(BrokenStream, match="reset"):
        list(pull(f"tcp://127.0.0.1:{port}", timeout_s=30))


def test_the_other_connections_are_read_to_their_end_before_a_break_is_told(free_port):
    broken, well = free_port(), free_port()
    good = say(PUSH_HELLO, *map(framed, messages(5)))
    with served(broken, say(PUSH_HELLO, struct.pack(">Q", 5))), served(well, good):
        puller = pull([f"tcp://127.0.0.1:{port}" for port in (broken, well)], timeout_s=30)
        received = []
        puller.open()
        received.extend(puller.receive() for _ in range(5))
        with pytest.raises(BrokenStream, match="1 of 2 connections"):
            puller.receive()
        puller.close()
    assert received == messages(5)
    assert puller.statistics.lost == 1


def test_a_broken_connection_is_dialled_again_when_asked(free_port):
    port = free_port()
    first = say(PUSH_HELLO, framed(b"before"), struct.pack(">Q", 9))
    with served(port, first, say(PUSH_HELLO, framed(b"after"))):
        puller = pull(f"tcp://127.0.0.1:{port}", timeout_s=30, reconnect_s=10)
        assert list(puller) == [b"before", b"after"]
    assert puller.statistics.reconnects == 1
    assert puller.statistics.lost == 1


def test_nobody_there_is_told_within_the_bound(free_port):
    began = time.monotonic()
    with pytest.raises(NoPeerError, match="nobody to connect to"):
        pull(f"tcp://127.0.0.1:{free_port()}", connect_timeout_s=0.3).open()
    with pytest.raises(NoPeerError, match="nobody connected"):
        next(iter(pull(f"tcp://127.0.0.1:{free_port()}", listen=True, connect_timeout_s=0.3)))
    with pytest.raises(NoPeerError), push(f"tcp://127.0.0.1:{free_port()}", connect_timeout_s=0.3):
        pass
    assert time.monotonic() - began < 30


def test_a_puller_started_before_its_buffer_waits_for_it(free_port):
    port = free_port()
    result: list[bytes] = []
    reader = threading.Thread(target=lambda: result.extend(pull(f"tcp://127.0.0.1:{port}", timeout_s=30)))
    reader.start()
    time.sleep(0.2)  # the order is the point of this test, not a wait for luck
    with served(port, say(PUSH_HELLO, framed(b"late"))):
        reader.join(60)
    assert result == [b"late"]


def test_silence_of_a_connected_peer_is_a_timeout(free_port):
    url = f"tcp://127.0.0.1:{free_port()}"
    with pynng.Push0(listen=url), pull(url, timeout_s=0.3) as puller, pytest.raises(StreamTimeout, match="still conn"):
        puller.receive()


@pytest.mark.parametrize(
    ("hello", "remedy"),
    [(PULL_HELLO, "other side"), (b"\xff\0\0\0\0\0\0\0\x01\x7f", "library zmq"), (b"HTTP/1.1", "is no NNG socket")],
)
def test_a_peer_that_is_no_pusher_is_named_with_the_remedy(free_port, hello, remedy):
    port = free_port()
    with served(port, say(hello)), pytest.raises(WrongPeerError, match=remedy):
        pull(f"tcp://127.0.0.1:{port}", connect_timeout_s=5).open()


def test_an_address_in_use_is_told_at_once(free_port):
    url = f"tcp://127.0.0.1:{free_port()}"
    with pull(url, listen=True), pytest.raises(ListenError, match="in use"):
        pull(url, listen=True).open()


def test_closing_ends_the_threads_while_messages_wait(free_port, wait_until):
    url = f"tcp://127.0.0.1:{free_port()}"
    before = threading.active_count()
    with push(url, listen=True, timeout_s=30, queue_messages=50) as pusher:
        with pull(url, timeout_s=30, prefetch=1) as puller:
            for message in messages(40, 100_000):
                pusher.send(message)
            assert puller.receive()
        pusher.abort()
    # Those of earlier tests may end meanwhile.
    wait_until(lambda: threading.active_count() <= before, what="end of the threads")


def test_a_pusher_without_a_reader_says_what_had_not_left(free_port):
    url = f"tcp://127.0.0.1:{free_port()}"
    with pynng.Pull0(listen=url, recv_buffer_size=1) as puller:
        pusher = push(url, timeout_s=1.5, queue_messages=4).open()
        with pytest.raises(StreamTimeout, match="took a message"):
            send_all(pusher, [bytes(20_000_000)] * 20)
        with pytest.raises(StreamTimeout, match="4 messages had not been taken"):
            pusher.close()
        assert pusher.statistics.lost >= 4
        del puller


def test_a_pusher_whose_reader_dies_says_so(free_port):
    port = free_port()
    pusher = push(f"tcp://127.0.0.1:{port}", timeout_s=30)
    with served(port, say(PULL_HELLO, reset=True)), pytest.raises(BrokenStream):
        send_all(pusher, [bytes(1_000_000)] * 100)
    pusher.abort()


def test_a_message_of_which_nothing_was_sent_goes_to_the_next_reader(free_port):
    url = f"tcp://127.0.0.1:{free_port()}"
    with push(url, listen=True, timeout_s=30) as pusher:
        with pull(url, timeout_s=30) as first:
            pusher.send(b"one")
            assert first.receive() == b"one"
        with pull(url, timeout_s=30) as second:
            pusher.send(b"two")
            assert second.receive() == b"two"
    assert pusher.statistics.lost == 0


def test_a_listening_puller_waits_for_all_announced_producers(free_port):
    url = f"tcp://127.0.0.1:{free_port()}"
    with pull(url, listen=True, producers=2, timeout_s=30) as puller:
        with push(url) as pusher:
            pusher.send(b"first")
        assert puller.receive() == b"first"

        def later() -> None:
            with push(url) as pusher:
                pusher.send(b"second")

        timer = threading.Timer(0.8, later)  # longer than the grace: only the number keeps the stream open
        timer.start()
        assert puller.receive() == b"second"
        assert puller.receive() is None
        timer.join()
