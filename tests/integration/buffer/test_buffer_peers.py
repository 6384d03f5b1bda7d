"""Messages go through whole, once, from any producer to any consumer."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections import Counter
from pathlib import Path

import pynng
import pytest
import zmq

from nngstream.wire import sp, zmtp

pytestmark = pytest.mark.integration

SIZES = [0, 1, 255, 256, 4096, 131_000, 262_144, 300_000, 1_000_000]


def _message(number: int, size: int) -> bytes:
    head = b"%08d" % number
    return head + hashlib.sha256(head).digest()[:1] * size


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_mixed_producers_and_consumers_share_one_port_a_side(
    run_buffer, nng, zmq_pull, zmq_push, collect, tmp_path, drained, wait_until, scheme
):
    urls = {} if scheme == "tcp" else {"in": [f"ipc://{tmp_path}/i"], "out": [f"ipc://{tmp_path}/o"]}
    running = run_buffer(sentinel=1, producers=4, **urls)
    pulls = [zmq_pull(running.out) for _ in range(2)]
    collectors = [collect(pull.recv, sentinel=True) for pull in pulls]
    nng_pulls = [nng(pynng.Pull0, dial=running.out, recv_timeout=200) for _ in range(2)]
    collectors += [collect(pull.recv) for pull in nng_pulls]
    wait_until(lambda: running.in_turn() == 4, 60, "four consumers")
    messages = [_message(number, SIZES[number % len(SIZES)]) for number in range(400)]
    pushes = [nng(pynng.Push0, dial=running.inp) for _ in range(2)]
    zmq_pushes = [zmq_push(running.inp) for _ in range(2)]

    def produce(first: int, send) -> None:
        for number in range(first, len(messages), 4):
            send(messages[number])

    senders = [push.send for push in [*pushes, *zmq_pushes]]
    threads = [threading.Thread(target=produce, args=(first, send)) for first, send in enumerate(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    drained(running, len(messages))
    for socket_ in [*pushes, *zmq_pushes]:
        socket_.close()
    assert running.wait() == "done"

    def came() -> int:
        return sum(len(collector.messages) for collector in collectors)

    got = [message for collector in collectors for message in collector.finish(len(messages), came)]
    assert Counter(got) == Counter(messages)
    assert all(collector.messages for collector in collectors), "every consumer takes part"
    nbytes = sum(map(len, messages))
    status = running.status()
    assert status["received"] == status["sent"] == {"messages": 400, "bytes": nbytes}
    assert status["lost"] == status["held"] == {"messages": 0, "bytes": 0}
    assert {(peer["side"], peer["protocol"]) for peer in status["peers"]} == {
        (side, protocol) for side in ("in", "out") for protocol in ("nng", "zmq")
    }
    assert sum(peer["bytes"] for peer in status["peers"] if peer["side"] == "out") == nbytes


def test_one_producer_and_one_consumer_keep_the_order(run_buffer, zmq_push, zmq_pull, collect):
    running = run_buffer(sentinel=1)
    collector = collect(zmq_pull(running.out).recv, sentinel=True)
    push = zmq_push(running.inp)
    for number in range(20_000):
        push.send(b"%d" % number + b"x" * (number % 97))
    push.close()
    assert running.wait() == "done"
    assert [int(message.rstrip(b"x")) for message in collector.finish()] == list(range(20_000))


@pytest.mark.parametrize("listener", ["nng", "zmq"])
@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_it_dials_listening_producers_and_consumers_of_both_libraries(
    run_buffer, nng, context, collect, free_port, tmp_path, wait_until, listener, scheme
):
    addresses = [f"tcp://127.0.0.1:{free_port()}" if scheme == "tcp" else f"ipc://{tmp_path}/{name}" for name in "io"]
    if listener == "nng":
        push, pull = nng(pynng.Push0, listen=addresses[0]), nng(pynng.Pull0, listen=addresses[1])
    else:
        push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        pull.setsockopt(zmq.RCVTIMEO, 30_000)
        push.bind(addresses[0])
        pull.bind(addresses[1])
    running = run_buffer(**{"in": [f"dial+{addresses[0]}"], "out": [f"dial+{addresses[1]}"]})
    collector = collect(pull.recv, count=100)
    wait_until(lambda: running.status()["producers"] == 1, 60, "producer")
    messages = [os.urandom(1 + 1000 * number) for number in range(100)]
    for message in messages:
        push.send(message)
    collector.join(60)
    assert collector.messages == messages
    push.close()
    assert running.wait() == "done"


def test_three_stacked_buffers_pass_on_every_message_and_the_end(run_buffer, zmq_push, zmq_pull, collect):
    first = run_buffer(name="first")
    last = run_buffer(sentinel=1, name="last")
    middle = run_buffer(**{"in": ["dial+" + first.out], "out": ["dial+" + last.inp], "name": "middle"})
    collector = collect(zmq_pull(last.out, timeout_s=0.2).recv_multipart)
    push = zmq_push(first.inp)
    for number in range(300):
        push.send_multipart([b"%d" % number, bytes(2000 * (number % 100))])
    push.close()
    assert [each.wait() for each in (first, middle, last)] == ["done"] * 3
    assert collector.finish(301) == [[b"%d" % n, bytes(2000 * (n % 100))] for n in range(300)] + [[b""]]
    assert {peer["buffer"] for peer in middle.status()["peers"]} == {"first", "last"}


def test_a_dialling_buffer_may_be_there_first(run_buffer, zmq_push, zmq_pull, collect, free_port):
    port = free_port()
    dialling = run_buffer(**{"in": [f"dial+tcp://127.0.0.1:{port}"]}, sentinel=1)
    listening = run_buffer(**{"out": [f"tcp://127.0.0.1:{port}"]})
    collector = collect(zmq_pull(dialling.out).recv, sentinel=True)
    push = zmq_push(listening.inp)
    push.send(b"one")
    push.close()
    assert listening.wait() == "done"
    assert dialling.wait() == "done"
    collector.join(60)
    assert collector.messages == [b"one"]


def test_parts_of_a_message_stay_together_and_apart(run_buffer, zmq_push, zmq_pull, nng, collect, drained):
    running = run_buffer(sentinel=1)
    messages = [[b"head%d" % n, bytes([n % 256]) * (n * 4001 % 400_000), b"", b"tail"] for n in range(120)]
    push = zmq_push(running.inp)
    pulls = [zmq_pull(running.out, timeout_s=0.2) for _ in range(3)]
    collectors = [collect(pull.recv_multipart) for pull in pulls]
    for message in messages:
        push.send_multipart(message)
    push.close()
    assert running.wait() == "done"

    def came() -> int:
        return sum(len(collector.messages) for collector in collectors)

    expected = len(messages) + len(pulls)  # each consumer is told the end
    got = [message for each in collectors for message in each.finish(expected, came) if message != [b""]]
    assert sorted(got) == sorted(messages)


def test_an_nng_consumer_gets_the_parts_joined(run_buffer, zmq_push, nng, collect):
    running = run_buffer()
    pull = nng(pynng.Pull0, dial=running.out)
    push = zmq_push(running.inp)
    push.send_multipart([b"ab", b"", b"c" * 300_000])
    push.close()
    assert pull.recv() == b"ab" + b"c" * 300_000
    assert running.wait() == "done"


def test_a_message_of_many_large_parts_grows_in_memory(run_buffer, zmq_push, zmq_pull):
    running = run_buffer(capacity="64MiB")
    parts = [os.urandom(3_000_000) for _ in range(15)]
    pull = zmq_pull(running.out)
    push = zmq_push(running.inp)
    push.send_multipart(parts)
    push.close()
    assert pull.recv_multipart() == parts
    assert running.wait() == "done"


def test_two_urls_a_side_feed_one_queue(run_buffer, zmq_push, zmq_pull, tmp_path):
    running = run_buffer(
        **{"in": ["tcp://127.0.0.1:0", f"ipc://{tmp_path}/i"], "out": ["tcp://127.0.0.1:0", f"ipc://{tmp_path}/o"]},
        producers=2,
    )
    pushes = [zmq_push(url) for url in running.buffer.inputs]
    for number, push in enumerate(pushes):
        push.send(b"%d" % number)
    pull = zmq_pull(running.buffer.outputs[1])
    assert sorted([pull.recv(), pull.recv()]) == [b"0", b"1"]
    for push in pushes:
        push.close()
    assert running.wait() == "done"
    assert not Path(tmp_path / "i").exists(), "the UNIX socket is removed at the end"


def test_waiting_consumers_are_served_in_turn(run_buffer, zmq_push, zmq_pull, wait_until):
    running = run_buffer(sentinel=1)
    pulls = [zmq_pull(running.out) for _ in range(4)]
    push = zmq_push(running.inp)
    for number in range(40):
        # Who has been served must be back in the line: the thread of its connection may have been held up.
        wait_until(lambda: running.in_turn() == 4, 60, "four consumers")
        push.send(b"%d" % number)
        wait_until(lambda number=number: running.amounts()[1] == number + 1, 60, "message sent")
    push.close()
    assert running.wait() == "done"
    taken = []
    for pull in pulls:
        count = 0
        while pull.recv():
            count += 1
        taken.append(count)
    assert taken == [10, 10, 10, 10]


def test_a_burst_of_small_messages_is_shared(run_buffer, raw, sp, push_greeting, zmq_pull, wait_until):
    running = run_buffer(sentinel=1)
    pulls = [zmq_pull(running.out) for _ in range(4)]
    wait_until(lambda: running.in_turn() == 4, 60, "four consumers")
    producer = raw(running.inp, push_greeting)
    producer.sendall(b"".join(sp(b"%d" % number) for number in range(400)))
    producer.close()
    assert running.wait() == "done"
    for pull in pulls:
        count = 0
        while pull.recv():
            count += 1
        assert count >= 20


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.skipif("LCLSTREAM_SOAK" not in os.environ, reason="takes 5 GiB of memory: set LCLSTREAM_SOAK=1")
def test_a_message_of_more_than_4_gib_passes_from_one_protocol_to_the_other(run_buffer, raw, push_greeting):
    size, block = (1 << 32) + 1_000_000, bytes(range(250)) * 4000
    running = run_buffer(capacity="5GiB")
    producer = raw(running.inp, push_greeting)
    producer.settimeout(300)
    consumer = raw(running.out)
    consumer.sendall(zmtp.greeting() + zmtp.ready("PULL"))

    def produce() -> None:
        producer.sendall(sp.SP.header(size))
        sent = 0
        while sent < size:
            at = sent % len(block)
            sent += producer.send(memoryview(block)[at : at + size - sent])
        producer.close()

    thread = threading.Thread(target=produce)
    thread.start()
    assert consumer.recv(zmtp.GREETING_SIZE, socket.MSG_WAITALL)[:1] == b"\xff"
    assert len(consumer.recv(consumer.recv(2, socket.MSG_WAITALL)[1], socket.MSG_WAITALL)) > 5  # READY
    consumer.settimeout(300)
    assert consumer.recv(9, socket.MSG_WAITALL) == zmtp.ZMTP.header(size, False)
    total, last = 0, b""
    while data := consumer.recv(len(block)):
        total, last = total + len(data), last[-1000:] + data
    assert total == size
    end = (size - 1000) % len(block)
    assert last[-1000:] == (2 * block)[end : end + 1000]
    thread.join(60)
    assert running.wait() == "done"
    assert running.status()["sent"] == {"messages": 1, "bytes": size}
