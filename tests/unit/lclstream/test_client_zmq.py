"""The ZeroMQ ends against plain libzmq sockets."""

from __future__ import annotations

import threading
import time

import pytest
import zmq

from lclstream.client import AddressError, BrokenStream, NoPeerError, StreamTimeout, WrongPeerError, pull, push


def messages(count: int, size: int = 1000) -> list[bytes]:
    return [bytes([i % 251]) * (size + i) for i in range(count)]


@pytest.fixture
def context():
    with zmq.Context() as made:
        yield made
        made.linger = 0


@pytest.mark.parametrize("size", [1, 100_000, 3_000_000])
def test_everything_sent_before_the_pusher_left_is_read_before_the_end(free_port, size):
    url = f"tcp://127.0.0.1:{free_port()}"
    sent = messages(20, size)

    def produce() -> None:
        with zmq.Context() as context, context.socket(zmq.PUSH) as pusher:
            pusher.bind(url)
            for message in sent:
                pusher.send(message)

    producer = threading.Thread(target=produce)
    producer.start()
    # A small prefetch: most messages are still on their way when the pusher has gone.
    with pull(url, library="zmq", timeout_s=30, prefetch=2) as puller:
        received = []
        for message in puller:
            received.append(message)
            time.sleep(0.001)
    producer.join(60)
    assert received == sent
    assert puller.statistics.messages == 20


def test_an_empty_message_ends_the_stream_though_the_peer_stays(free_port, context):
    url = f"tcp://127.0.0.1:{free_port()}"
    with context.socket(zmq.PUSH) as pusher:
        pusher.bind(url)
        with pull(url, library="zmq", timeout_s=30, sentinel=True) as puller:
            for message in (b"one", b"two", b""):
                pusher.send(message)
            assert list(puller) == [b"one", b"two"]


def test_a_peer_that_goes_without_the_expected_sentinel_broke_the_stream(free_port, context):
    url = f"tcp://127.0.0.1:{free_port()}"
    pusher = context.socket(zmq.PUSH)
    pusher.bind(url)
    with pull(url, library="zmq", timeout_s=30, sentinel=True) as puller:
        pusher.send(b"one")
        assert puller.receive() == b"one"
        pusher.close()
        with pytest.raises(BrokenStream, match="without an end-of-stream"):
            puller.receive()


def bound(socket: zmq.Socket[bytes], url: str) -> bool:
    """Listen, if a socket that was closed before has left the address: libzmq closes behind our back."""
    try:
        socket.bind(url)
    except zmq.ZMQError:
        return False
    return True


def test_a_peer_that_restarts_is_met_again(free_port, context, wait_until):
    url = f"tcp://127.0.0.1:{free_port()}"
    pusher = context.socket(zmq.PUSH)
    pusher.bind(url)
    with pull(url, library="zmq", timeout_s=30, sentinel=True, reconnect_s=30) as puller:
        pusher.send(b"before")
        assert puller.receive() == b"before"
        pusher.close()

        def restart() -> None:
            with zmq.Context() as second, second.socket(zmq.PUSH) as again:
                wait_until(lambda: bound(again, url), what="the address to be free")
                again.send(b"after")
                again.send(b"")

        timer = threading.Timer(0.5, restart)
        timer.start()
        assert list(puller) == [b"after"]
        timer.join()
    assert puller.statistics.reconnects == 1


def test_several_urls_end_each_by_its_own_sentinels(free_port, context):
    urls = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    first, second = (context.socket(zmq.PUSH) for _ in urls)
    first.bind(urls[0])
    second.bind(urls[1])
    with first, second, pull(urls, library="zmq", timeout_s=30) as puller:
        first.send(b"a")
        for _ in range(3):
            first.send(b"")  # a buffer may send more sentinels than we have connections
        assert puller.receive() == b"a"
        second.send(b"b")
        assert puller.receive() == b"b"
        second.send(b"")
        assert puller.receive() is None


def test_listening_ends_when_all_producers_have_gone(free_port):
    url = f"tcp://127.0.0.1:{free_port()}"

    def produce(part: int) -> None:
        with push(url, library="zmq", timeout_s=30) as pusher:
            for message in messages(10, 1000 * (part + 1)):
                pusher.send(message)

    with pull(url, library="zmq", listen=True, producers=2, timeout_s=30) as puller:
        producers = [threading.Thread(target=produce, args=(part,)) for part in range(2)]
        for producer in producers:
            producer.start()
        received = list(puller)
        for producer in producers:
            producer.join(60)
    assert sorted(received) == sorted(messages(10, 1000) + messages(10, 2000))
    assert puller.statistics.connections == 2


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_closing_a_pusher_waits_until_the_reader_has_everything(free_port, context, size):
    url = f"tcp://127.0.0.1:{free_port()}"
    sent = messages(20, size)
    received: list[bytes] = []
    closing = threading.Event()

    def read() -> None:
        closing.wait(60)
        received.extend(reader.recv() for _ in sent)

    with context.socket(zmq.PULL) as reader:
        reader.rcvhwm = 1  # most messages are still with the pusher when it closes
        reader.rcvtimeo = 30_000
        reader.bind(url)
        thread = threading.Thread(target=read)
        thread.start()
        with push(url, library="zmq", timeout_s=30, queue_messages=50) as pusher:
            for message in sent:
                pusher.send(message)
            closing.set()
        thread.join(60)
    assert received == sent


def test_nobody_there_is_told_within_the_bound(free_port):
    url = f"tcp://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(NoPeerError, match="nobody to connect to"):
        pull(url, library="zmq", connect_timeout_s=0.3).open()
    with pytest.raises(NoPeerError, match="nobody connected"):
        list(pull(url, library="zmq", listen=True, connect_timeout_s=0.3))
    with pytest.raises(NoPeerError, match="nobody to connect to"):
        push(url, library="zmq", connect_timeout_s=0.3).open()
    waiting = push(url, library="zmq", listen=True, connect_timeout_s=0.3, timeout_s=0.3)
    with waiting as pusher, pytest.raises(NoPeerError, match="nobody connected"):
        pusher.send(b"x")
    assert time.monotonic() - began < 30


def test_silence_of_a_connected_peer_is_a_timeout(free_port, context):
    url = f"tcp://127.0.0.1:{free_port()}"
    with context.socket(zmq.PUSH) as pusher:
        pusher.bind(url)
        with pull(url, library="zmq", timeout_s=0.3) as puller, pytest.raises(StreamTimeout):
            puller.receive()


def test_an_nng_peer_is_named_with_the_remedy(free_port):
    url = f"tcp://127.0.0.1:{free_port()}"
    with push(url, listen=True), pytest.raises((WrongPeerError, NoPeerError)):
        pull(url, library="zmq", connect_timeout_s=1).open()


def test_a_pusher_whose_reader_has_gone_says_so(free_port, context):
    url = f"tcp://127.0.0.1:{free_port()}"
    reader = context.socket(zmq.PULL)
    reader.bind(url)
    pusher = push(url, library="zmq", timeout_s=30).open()
    pusher.send(b"one")
    assert reader.recv() == b"one"
    reader.close()

    def go_on() -> None:
        for _ in range(1000):
            pusher.send(b"x")
            time.sleep(0.01)

    with pytest.raises(BrokenStream, match="has gone"):
        go_on()
    pusher.abort()


def test_encryption_with_zeromq_is_refused():
    with pytest.raises(AddressError, match="no TLS"):
        pull("tls+tcp://127.0.0.1:5000", library="zmq")


def test_a_reader_that_pauses_for_long_gets_every_message(free_port, context, monkeypatch):
    """libzmq's heartbeats go unanswered while its queue is full, and end a healthy connection."""
    plain = zmq.Socket.setsockopt

    def hastened(self, option, value):
        plain(self, option, value // 100 if option in (zmq.HEARTBEAT_IVL, zmq.HEARTBEAT_TIMEOUT) else value)

    monkeypatch.setattr(zmq.Socket, "setsockopt", hastened)
    url = f"tcp://127.0.0.1:{free_port()}"
    sent = messages(40, 1_000_000)
    received = []
    with context.socket(zmq.PUSH) as pusher:
        pusher.sndhwm = 2
        pusher.bind(url)

        def produce() -> None:
            for message in (*sent, b""):
                pusher.send(message)

        producer = threading.Thread(target=produce)
        with pull(url, library="zmq", timeout_s=30, prefetch=1, sentinel=True) as puller:
            producer.start()
            for message in puller:
                received.append(message)
                if len(received) == 1:
                    time.sleep(1.5)  # what the promise is about: longer than heartbeats would wait
        producer.join(60)
    assert received == sent
    assert puller.statistics.reconnects == 0


@pytest.mark.parametrize("end", [pull, push])
def test_a_machine_that_vanished_is_noticed_by_tcp_itself(free_port, context, end):
    url = f"tcp://127.0.0.1:{free_port()}"
    with context.socket(zmq.PUSH if end is pull else zmq.PULL) as peer:
        peer.bind(url)
        with end(url, library="zmq", timeout_s=30) as stream:
            (link,) = (stream._receiver if end is pull else stream._sender)._links
            assert link.socket.getsockopt(zmq.TCP_KEEPALIVE) == 1
            assert link.socket.getsockopt(zmq.HEARTBEAT_IVL) == 0
