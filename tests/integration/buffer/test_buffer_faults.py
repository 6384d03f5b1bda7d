"""Whatever a peer does, the others go on, memory is bounded, and the account closes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import socket
import struct
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pynng
import pytest
import zmq

from nngstream.wire import sp as sp_wire
from nngstream.wire import zmtp

pytestmark = pytest.mark.integration

SO_ATTACH_FILTER = 26

PRODUCER = """
import sys, zmq
context = zmq.Context(); push = context.socket(zmq.PUSH); push.connect(sys.argv[1])
number = 0
while True:
    push.send(b"%012d" % number + bytes(int(sys.argv[2]))); number += 1
"""
CONSUMER = """
import sys, zmq
context = zmq.Context(); pull = context.socket(zmq.PULL); pull.setsockopt(zmq.RCVHWM, 1); pull.connect(sys.argv[1])
while True:
    message = pull.recv(); print(int(message[:12]), flush=True)
"""


@pytest.mark.parametrize("size", [100, 1_000_000, 20_000_000])
def test_a_killed_producer_leaves_whole_messages_only(run_buffer, start, zmq_pull, collect, size):
    running = run_buffer(sentinel=1)
    collector = collect(zmq_pull(running.out).recv, sentinel=True)
    child = start(sys.executable, "-c", PRODUCER, running.inp, str(size))
    deadline = time.monotonic() + 20
    while running.amounts()[0] < (50 if size < 20_000_000 else 5):
        assert time.monotonic() < deadline, child.output()
        time.sleep(0.01)
    child.signal(9)
    assert running.wait() == "done"
    messages = collector.finish()
    assert [int(message[:12]) for message in messages] == list(range(len(messages)))
    assert {len(message) for message in messages} == {12 + size}
    assert len(messages) == running.amounts()[0]


@pytest.mark.parametrize("size", [100, 4096, 1_000_000, 12_000_000])
def test_a_killed_consumer_costs_what_its_socket_held_and_nothing_comes_twice(
    run_buffer, start, zmq_push, zmq_pull, collect, wait_until, size
):
    running = run_buffer(sentinel=1, send_buffer="64KiB", capacity="64MiB")
    child = start(sys.executable, "-c", CONSUMER, running.out)
    wait_until(lambda: running.status()["consumers"] == 1, 60, "consumer")
    push = zmq_push(running.inp)
    count = 400 if size < 1_000_000 else 60 if size == 1_000_000 else 16

    def produce() -> None:
        for number in range(count):
            push.send(b"%012d" % number + bytes(size))
            if number == count // 4:
                ready.set()

    ready = threading.Event()
    thread = threading.Thread(target=produce)
    thread.start()
    assert ready.wait(60)
    wait_until(lambda: "\n" in child.output(), 60, "messages at the consumer")
    child.signal(9)
    child.wait()
    collector = collect(zmq_pull(running.out).recv, sentinel=True)
    thread.join(60)
    push.close()
    assert running.wait() == "done"
    second = [int(message[:12]) for message in collector.finish()]
    first = [int(line) for line in child.output().split()]
    assert not set(first) & set(second), "nothing is given twice"
    assert len(second) == len(set(second))
    received, sent, held, lost = running.amounts()
    assert (received, held) == (count, 0)
    assert sent + lost == count
    # A kernel may acknowledge a segment after its program has read it, and a dying one never does: that counts as lost.
    assert sent >= len(first) + len(second) - (1 + (2 * 65536) // size)
    # One message of which some bytes were written, and those of which our socket held some (the kernel doubles what it
    # is asked for).
    assert lost <= 1 + -(-3 * 65536 // size)
    dead = next(
        peer for peer in running.status()["peers"] if peer["side"] == "out" and peer["ended"] != "end of stream"
    )
    assert dead["lost_messages"] == lost
    assert dead["messages"] + len(second) == sent


def test_a_late_consumer_gets_everything(run_buffer, zmq_push, zmq_pull, collect, wait_until):
    running = run_buffer(sentinel=1)
    push = zmq_push(running.inp)
    for number in range(50):
        push.send(b"%d" % number)
    push.close()
    wait_until(lambda: running.status()["state"] == "draining", 60, "draining")
    assert running.status()["held"]["messages"] == 50
    assert running.status()["oldest_age_s"] > 0
    collector = collect(zmq_pull(running.out).recv, sentinel=True)
    assert running.wait() == "done"
    assert collector.finish() == [b"%d" % number for number in range(50)]


@pytest.mark.parametrize("size", [1000, 200_000, 3_000_000])
def test_a_full_buffer_makes_producers_wait_and_drops_nothing(
    run_buffer, zmq_push, zmq_pull, collect, wait_until, size
):
    capacity = 8 << 20
    running = run_buffer(sentinel=1, capacity=capacity)
    push = zmq_push(running.inp)
    push.setsockopt(zmq.SNDHWM, 1)
    # More than the capacity and what the kernel holds on the way, up to 4 MB on one side and 6 MB on the other.
    count = (24_000_000 if size == 1000 else 40_000_000) // size
    thread = threading.Thread(target=lambda: [push.send(b"%012d" % n + bytes(size)) for n in range(count)])
    thread.start()
    wait_until(lambda: running.status()["producers_waiting"] == 1, 60, "waiting producer")
    held = running.status()["held"]["bytes"]
    assert capacity // 2 < held <= capacity
    assert running.buffer.pool.mapped <= capacity
    assert thread.is_alive()
    collector = collect(zmq_pull(running.out).recv, sentinel=True)
    thread.join(60)
    push.close()
    assert running.wait() == "done"
    assert [int(message[:12]) for message in collector.finish()] == list(range(count))
    assert running.status()["high_water_bytes"] <= capacity


def test_two_growing_messages_that_fill_the_memory_do_not_wait_for_each_other(run_buffer, zmq_push, zmq_pull):
    running = run_buffer(capacity="8MiB", producers=3)
    pushes = [zmq_push(running.inp) for _ in range(3)]
    parts = [bytes(1_500_000)] * 4
    for push in pushes:
        push.send_multipart(parts)
    pull = zmq_pull(running.out)
    for _ in pushes:
        assert pull.recv_multipart() == parts
    for push in pushes:
        push.close()
    assert running.wait() == "done"


@pytest.mark.parametrize("library", ["nng", "zmq"])
def test_a_message_larger_than_the_buffer_is_refused_to_its_producer_alone(
    run_buffer, nng, zmq_push, zmq_pull, wait_until, raw, push_greeting, sp, library
):
    running = run_buffer(capacity="1MiB", producers=2)
    good = raw(running.inp, push_greeting)
    bad = nng(pynng.Push0, dial=running.inp) if library == "nng" else zmq_push(running.inp)
    bad.send(bytes(2_000_000))
    wait_until(lambda: running.status()["refused"], 60, "refusal")
    assert "can never fit into a buffer of 1048576 bytes" in running.status()["last_refusal"]
    bad.close()
    good.sendall(sp(b"still here"))
    assert zmq_pull(running.out).recv() == b"still here"
    good.close()
    assert running.wait() == "done"


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "random": b"\x17\x03\x01" + bytes(range(256)) * 4,
    "half an SP greeting": b"\x00SP\x00",
    "SP of another version": b"\x00SP\x07\x00\x50\x00\x00",
    "a Pub0 socket": b"\x00SP\x00\x00\x20\x00\x00",
    "ZMTP 2": b"\xff" + bytes(8) + b"\x7f\x01\x08",
    "ZMTP with CURVE": b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32),
    "ZMTP without READY": b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32) + b"\x00\x01x",
    "nothing": b"",
}


@pytest.mark.parametrize("side", ["in", "out"])
def test_garbage_on_the_port_harms_nobody_else(run_buffer, raw, push_greeting, zmq_pull, sp, wait_until, side):
    running = run_buffer()
    producer = raw(running.inp, push_greeting)
    pull = zmq_pull(running.out)
    for number, garbage in enumerate(GARBAGE.values(), 1):
        url = running.inp if side == "in" else running.out
        where = ("127.0.0.1", int(url.rpartition(":")[2]))
        # It may be cut off at any moment.
        with contextlib.suppress(OSError), socket.create_connection(where, timeout=60) as sock:
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        wait_until(lambda number=number: running.status()["refused"] == number, 60, "refusal")
        producer.sendall(sp(b"%d" % number))
        assert pull.recv() == b"%d" % number
    producer.close()
    assert running.wait() == "done"
    assert running.status()["producers_seen"] == 1


def test_a_socket_on_the_wrong_side_is_told_so(run_buffer, zmq_pull, zmq_push, nng, wait_until):
    running = run_buffer()
    zmq_push(running.out)
    wait_until(lambda: running.status()["refused"] >= 1, 60, "refusal")
    assert "is a PUSH socket" in running.status()["last_refusal"]
    nng(pynng.Pull0, dial=running.inp, block_on_dial=False)
    wait_until(lambda: "Pull0" in (running.status()["last_refusal"] or ""), 60, "refusal")


AFTER_HANDSHAKE = {
    "half a header": b"\x00\x00\x00",
    "half a message": struct.pack(">Q", 1000) + bytes(10),
    "half a large message": struct.pack(">Q", 1_000_000) + bytes(400_000),
    "a length beyond everything": struct.pack(">Q", 2**64 - 1) + bytes(100),
}


@pytest.mark.parametrize("what", AFTER_HANDSHAKE)
def test_a_message_that_stops_half_way_is_not_received(run_buffer, raw, push_greeting, zmq_pull, sp, wait_until, what):
    running = run_buffer(producers=2, sentinel=1)
    broken = raw(running.inp, push_greeting)
    broken.sendall(sp(b"whole"))
    pull = zmq_pull(running.out)
    assert pull.recv() == b"whole"
    broken.sendall(AFTER_HANDSHAKE[what])
    broken.close()
    wait_until(lambda: running.status()["producers"] == 0, 60, "first producer gone")
    good = raw(running.inp, push_greeting)
    good.sendall(sp(b"other"))
    assert pull.recv() == b"other"
    good.close()
    assert running.wait() == "done"
    assert running.amounts() == (2, 2, 0, 0)
    peers = [peer for peer in running.status()["peers"] if peer["side"] == "in"]
    assert [peer["messages"] for peer in peers] == [1, 1]
    if "half" in what:
        assert peers[0]["incomplete_bytes"] == len(AFTER_HANDSHAKE[what])


def test_a_producer_that_falls_silent_inside_a_message_is_cut_off(run_buffer, raw, push_greeting, sp):
    running = run_buffer(silence=0.3)
    quiet = raw(running.inp, push_greeting)
    with contextlib.suppress(ConnectionError):  # on a busy machine even before all of this has been sent
        quiet.sendall(sp(bytes(1_000_000))[:500_000])
        assert quiet.recv(1) == b""
    assert running.wait() == "done"
    assert "silent for 0.3 s" in running.status()["peers"][0]["ended"]


def test_a_producer_may_be_silent_between_messages(run_buffer, raw, push_greeting, zmq_pull, sp):
    running = run_buffer(silence=0.2)
    producer = raw(running.inp, push_greeting)
    pull = zmq_pull(running.out)
    for number in range(3):
        time.sleep(0.3)
        producer.sendall(sp(b"%d" % number))
        assert pull.recv() == b"%d" % number
    producer.close()
    assert running.wait() == "done"


def test_slow_handshakes_hold_nobody_up_and_are_cut_off(run_buffer, raw, push_greeting, zmq_pull, sp, monkeypatch):
    monkeypatch.setattr("nngstream.handshake.HANDSHAKE_S", 2.0)
    running = run_buffer()
    slow = [raw(running.inp) for _ in range(20)]
    for sock in slow[::2]:
        sock.sendall(b"\xff")
    producer = raw(running.inp, push_greeting)
    producer.sendall(sp(b"through"))
    assert zmq_pull(running.out).recv() == b"through"
    started = time.monotonic()
    while any(_open(sock) for sock in slow):
        for sock in slow[::2]:
            try:
                sock.sendall(b"\x00")
            except OSError:
                continue
        assert time.monotonic() - started < 30, "one byte now and then does not buy more time"
        time.sleep(0.1)
    producer.close()
    assert running.wait() == "done"
    assert running.status()["refused"] == 20


def _open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return bool(sock.recv(100))
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        sock.settimeout(5)


def test_a_stop_signal_gives_away_what_it_can_and_counts_the_rest_as_lost(run_buffer, zmq_push, wait_until):
    running = run_buffer(drain=0.3)
    push = zmq_push(running.inp)
    for _ in range(10):
        push.send(b"x" * 1000)
    wait_until(lambda: running.amounts()[0] == 10, 60, "messages")
    running.buffer.stop()
    assert running.wait() == "failed"
    assert running.amounts() == (10, 0, 0, 10)


def test_a_stop_signal_while_a_consumer_is_there_loses_nothing(
    run_buffer, raw, push_greeting, sp, zmq_pull, wait_until
):
    running = run_buffer(drain=60)
    producer = raw(running.inp, push_greeting)
    producer.sendall(sp(b"x" * 1000) * 1000)
    wait_until(lambda: running.amounts()[0] == 1000, 60, "messages")
    running.buffer.stop()
    pull = zmq_pull(running.out)
    for _ in range(1000):
        assert len(pull.recv()) == 1000
    assert running.wait() == "done"
    assert running.amounts() == (1000, 1000, 0, 0)


def test_a_stop_signal_does_not_wait_for_a_consumer_that_does_not_read(
    run_buffer, raw, push_greeting, pull_greeting, sp, wait_until
):
    running = run_buffer(drain=0.3, send_buffer="16KiB")
    raw(running.out, pull_greeting)
    producer = raw(running.inp, push_greeting)
    thread = threading.Thread(target=lambda: producer.sendall(sp(bytes(20_000_000))))
    thread.start()
    wait_until(lambda: running.amounts()[0] == 1, 60, "message")
    thread.join(60)
    running.buffer.stop()
    assert running.wait() == "failed"
    assert running.amounts() == (1, 0, 0, 1)


def test_producers_that_come_within_the_grace_go_on(run_buffer, raw, push_greeting, sp, zmq_pull, wait_until):
    running = run_buffer(grace=60)
    pull = zmq_pull(running.out)
    for number in range(2):
        producer = raw(running.inp, push_greeting)
        producer.sendall(sp(b"%d" % number))
        assert pull.recv() == b"%d" % number
        producer.close()
        wait_until(lambda: running.status()["producers"] == 0, 60, "producer gone")
    assert running.status()["state"] == "streaming"
    running.buffer.lifecycle._grace = 0.05  # that was enough
    assert running.wait() == "done"
    assert running.status()["producers_seen"] == 2


def test_it_waits_for_as_many_producers_as_were_promised(run_buffer, raw, push_greeting, wait_until):
    running = run_buffer(producers=2)
    raw(running.inp, push_greeting).close()
    wait_until(lambda: running.status()["producers_seen"] == 1, 60, "first producer")
    wait_until(lambda: running.status()["producers"] == 0, 60, "first producer gone")
    running.thread.join(0.5)
    assert running.status()["state"] == "streaming"
    raw(running.inp, push_greeting).close()
    assert running.wait() == "done"


def test_heartbeats_of_zeromq_peers_are_answered(run_buffer, context, wait_until):
    running = run_buffer()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    for each in (push, pull):
        each.setsockopt(zmq.HEARTBEAT_IVL, 100)
        each.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2000)  # a busy machine may stop for a second
        each.setsockopt(zmq.RCVTIMEO, 30_000)
    push.connect(running.inp)
    pull.connect(running.out)
    wait_until(lambda: running.status()["producers"] + running.status()["consumers"] == 2, 60, "peers")
    time.sleep(3)  # longer than the time-out: without PONG both would have connected again
    assert (running.status()["producers_seen"], running.status()["consumers_seen"]) == (1, 1)
    push.send(b"alive")
    assert pull.recv() == b"alive"
    push.close()
    pull.close()


def test_a_full_buffer_does_not_look_dead_to_a_producer_with_heartbeats(
    run_buffer, context, zmq_pull, collect, wait_until, drained
):
    running = run_buffer(capacity="1MiB", sentinel=1)
    push = context.socket(zmq.PUSH)
    for option, value in ((zmq.HEARTBEAT_IVL, 200), (zmq.HEARTBEAT_TIMEOUT, 2000), (zmq.SNDTIMEO, 60_000)):
        push.setsockopt(option, value)
    push.connect(running.inp)
    wait_until(lambda: running.status()["producers"] == 1, 60, "producer")
    (producer,) = running.buffer._connections._those("in")
    wait_until(lambda: producer.inlet._heartbeats, 60, "its first PING")
    thread = threading.Thread(target=lambda: [push.send(b"%06d" % n + bytes(100_000)) for n in range(2000)])
    thread.start()
    wait_until(lambda: running.status()["producers_waiting"] == 1, 60, "full memory")
    time.sleep(4.5)  # two of its time-outs
    assert running.status()["producers_seen"] == 1
    collector = collect(zmq_pull(running.out).recv, sentinel=True)
    thread.join(60)
    drained(running, 2000)  # a heartbeat's answer to a producer that has closed makes its kernel drop what is left
    push.close()
    assert running.wait() == "done"
    assert [int(message[:6]) for message in collector.finish()] == list(range(2000))
    assert running.status()["producers_seen"] == 1


def test_what_lay_in_the_socket_of_a_dead_consumer_is_counted_at_that_peer(
    run_buffer, raw, push_greeting, pull_greeting, sp, sp_receive, wait_until
):
    running = run_buffer(send_buffer="128KiB")
    consumer = socket.socket()
    consumer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
    consumer.connect(("127.0.0.1", int(running.out.rpartition(":")[2])))
    consumer.sendall(pull_greeting)
    assert len(consumer.recv(8)) == 8
    producer = raw(running.inp, push_greeting)
    producer.sendall(sp(b"x" * 10_000) * 100)
    wait_until(lambda: running.amounts()[0] == 100, 60, "messages")
    for _ in range(3):
        sp_receive(consumer)
    (connection,) = running.buffer._connections._those("out")
    wait_until(lambda: connection.stream._unacknowledged() > 100_000, 60, "messages in its socket")
    consumer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    consumer.close()  # a reset, as when its machine dies
    wait_until(lambda: running.status()["consumers"] == 0, 60, "consumer gone")
    received, sent, held, lost = running.amounts()
    assert received == sent + held + lost
    # Its kernel took what it read, of which the last segment may not be acknowledged yet, and at most its buffer; what
    # our socket held is lost, the rest is held.
    assert 2 <= sent <= 10
    assert 5 <= lost <= 40
    assert held == 100 - sent - lost >= 50
    dead = next(peer for peer in running.status()["peers"] if peer["side"] == "out")
    assert (dead["messages"], dead["lost_messages"]) == (sent, lost)
    assert (dead["bytes"], dead["lost_bytes"]) == (10_000 * sent, 10_000 * lost)


#: What a visitor sends before it goes, and whether it waits for an answer. `{SP}` and `{READY}` say the right role.
VISITS = [
    (b"", False),
    (b"garbage", False),
    (b"\x00SP", False),
    (b"{SP}", True),
    (b"{SP}", False),
    (zmtp.greeting()[:30], False),
    (zmtp.greeting(), True),
    (zmtp.greeting() + b"\x04\x29\x05REA", True),
    (zmtp.greeting() + b"{READY}", True),
]


def _visit(port: int, role: str, what: bytes, *, answered: bool, reset: bool) -> None:
    what = what.replace(b"{SP}", sp_wire.greeting(sp_wire.PUSH if role == "PUSH" else sp_wire.PULL))
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(what.replace(b"{READY}", zmtp.ready(role)))
        if answered:
            assert sock.recv(1)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.timeout(300)
def test_ten_thousand_connections_that_come_and_go_leave_nothing(run_buffer, wait_until):
    count = 10_000
    running = run_buffer(producers=count, sentinel=1)
    ports = {role: int(url.rpartition(":")[2]) for role, url in (("PUSH", running.inp), ("PULL", running.out))}
    # What earlier tests of this process have left may end meanwhile: fewer are no leak.
    gc.collect()
    threads, files = threading.active_count(), _files()
    memory = 0
    for number in range(count):
        what, answered = VISITS[number // 4 % len(VISITS)]
        role = "PUSH" if number % 2 else "PULL"
        _visit(ports[role], role, what, answered=answered, reset=number % 4 > 1)
        if number == 500:  # code and caches are there now
            wait_until(lambda: threading.active_count() <= threads, 60, "end of all threads")
            memory = _memory()
    wait_until(lambda: threading.active_count() <= threads, 60, "end of all threads")
    wait_until(lambda: _files() <= files, 60, "closing of all files")
    assert _memory() - memory < 20 << 20
    status = running.status()
    assert status["producers"] == status["consumers"] == 0
    # Of nine kinds, three say all of who they are; a reset may overtake one of them, before it was looked at.
    assert count / 2 * 2 / 9 * 0.4 < status["producers_seen"] < count / 2 * 3 / 9 * 1.1
    assert status["refused"] > count / 9
    assert len(status["peers"]) <= 200


def _files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
@pytest.mark.skipif("LCLSTREAM_SOAK" not in os.environ, reason="ten minutes: set LCLSTREAM_SOAK=1")
@pytest.mark.timeout(1200)
def test_ten_minutes_at_full_rate_keep_the_memory_flat(start, tmp_path, wait_until):
    capacity, seconds = 256 << 20, float(os.environ.get("LCLSTREAM_SOAK_SECONDS", "600"))
    child = start(
        "nngstream", "--in", f"ipc://{tmp_path}/in", "--out", f"ipc://{tmp_path}/out", "--capacity", str(capacity),
        "--status", "http://127.0.0.1:0",
    )  # fmt: skip
    child.wait_for_output("status http")
    url = next(line.split()[1] for line in child.output().splitlines() if line.startswith("status http"))

    def status() -> dict[str, Any]:
        with urllib.request.urlopen(url + "/status", timeout=20) as answer:
            return dict(json.load(answer))

    # All memory is touched once before anything is measured: messages of three sizes fill it while nobody takes them.
    for size in ("1000", "100000", "3000000"):
        start(sys.executable, "-c", PRODUCER, f"ipc://{tmp_path}/in", size)
    wait_until(lambda: status()["producers_waiting"] == 3, 60, "a full buffer")
    start(
        sys.executable, "-c", CONSUMER.replace("print(int(message[:12]), flush=True)", "pass"), f"ipc://{tmp_path}/out"
    )
    before = status()["sent"]["bytes"]
    sizes = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(seconds / 60)
        pages = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))
    last = status()
    print(f"{(last['sent']['bytes'] - before) / seconds / 1e9:.2f} GB/s; MiB {[size >> 20 for size in sizes]}")
    assert last["lost"] == {"messages": 0, "bytes": 0}
    assert max(sizes) < capacity + (100 << 20), "the capacity, and a constant for the program and its connections"
    assert max(sizes[-20:]) - max(sizes[:20]) < 8 << 20, "no more in the last third than in the first"


def _fill(running, raw, push_greeting, pull_greeting, sp, wait_until, count=300):
    """A consumer that has read nothing yet, and more messages than both sockets hold."""
    consumer = raw(running.out, pull_greeting)
    wait_until(lambda: running.status()["consumers"] == 1, 60, "consumer")
    producer = raw(running.inp, push_greeting)
    for number in range(count):
        producer.sendall(sp(b"%06d" % number + bytes(50_000)))
    producer.close()
    wait_until(lambda: running.amounts()[0] == count, 60, "messages")
    return consumer


def test_a_consumer_may_pause_as_long_as_it_likes(
    run_buffer, raw, push_greeting, pull_greeting, sp, sp_receive, wait_until, monkeypatch
):
    monkeypatch.setattr("nngstream.connections.UNANSWERED_S", 0.3)
    running = run_buffer(send_buffer="64KiB")
    consumer = _fill(running, raw, push_greeting, pull_greeting, sp, wait_until)
    time.sleep(3)  # ten times as long as a dead host may take to answer
    assert [int(sp_receive(consumer)[:6]) for _ in range(300)] == list(range(300))
    consumer.close()
    assert running.wait() == "done"
    assert running.amounts() == (300, 300, 0, 0)


def test_a_consumer_whose_host_is_dead_is_cut_off(
    run_buffer, raw, push_greeting, pull_greeting, sp, sp_receive, wait_until, monkeypatch
):
    monkeypatch.setattr("nngstream.connections.UNANSWERED_S", 0.3)
    running = run_buffer(send_buffer="64KiB")
    dead = raw(running.out, pull_greeting)
    wait_until(lambda: running.status()["consumers"] == 1, 60, "consumer")
    refuse_all = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF: `ret 0`, no packet comes in
    dead.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(refuse_all)))
    producer = raw(running.inp, push_greeting)
    producer.sendall(sp(bytes(1_000_000)))
    wait_until(lambda: running.status()["consumers"] == 0, 30, "end of the dead consumer")
    peer = next(peer for peer in running.status()["peers"] if peer["side"] == "out")
    assert "its host has not answered for 0.3 s" in peer["ended"]
    second = raw(running.out, pull_greeting)
    producer.sendall(sp(b"next"))
    assert sp_receive(second) == b"next"
    second.close()
    producer.close()
    assert running.wait() == "done"


def test_a_stop_signal_may_come_at_any_moment(run_buffer):
    running = run_buffer()
    buffer = running.buffer
    stopped = threading.Event()

    def handler() -> None:
        with buffer._changed._cond:  # the interrupted thread was inside `wait` or `clear`
            buffer.stop()
        stopped.set()

    threading.Thread(target=handler, daemon=True).start()
    assert stopped.wait(60)
    assert running.wait() == "done"


def test_the_end_may_come_while_a_connection_begins(run_buffer, raw, monkeypatch):
    beginning, go_on = threading.Event(), threading.Event()

    class SlowThread(threading.Thread):
        def start(self) -> None:
            beginning.set()
            assert go_on.wait(60)
            super().start()

    running = run_buffer()
    monkeypatch.setattr("nngstream.connections.threading.Thread", SlowThread)
    raw(running.inp)
    assert beginning.wait(60)
    monkeypatch.undo()
    results: list[object] = []

    def join() -> None:
        try:
            results.append(running.buffer._connections.join("in", 0.1))
        except RuntimeError as error:
            results.append(error)

    joiner = threading.Thread(target=join)
    joiner.start()
    joiner.join(0.5)  # as far as it gets before the other thread goes on
    go_on.set()
    joiner.join(60)
    assert results == [False]


def test_a_send_buffer_the_kernel_does_not_grant_is_told_once(
    run_buffer, raw, pull_greeting, monkeypatch, caplog, wait_until
):
    running = run_buffer(send_buffer="64MB")
    monkeypatch.setattr("nngstream.stream.Stream.send_buffer", lambda _stream, _nbytes: 2 * 4_194_304)
    for number in range(2):
        raw(running.out, pull_greeting)
        wait_until(lambda number=number: running.status()["consumers"] == number + 1, 60, "consumer")
    (told,) = [record.getMessage() for record in caplog.records if "send_buffer" in record.getMessage()]
    assert "64000000 bytes are wanted, the kernel grants 4194304" in told
    assert "net.core.wmem_max" in told


@pytest.mark.parametrize("options", [{"send_buffer": "64KiB"}, {}])
def test_a_send_buffer_that_is_granted_or_was_not_asked_for_is_not_worth_a_word(
    run_buffer, raw, pull_greeting, monkeypatch, caplog, wait_until, options
):
    running = run_buffer(**options)
    monkeypatch.setattr("nngstream.stream.Stream.send_buffer", lambda _stream, _nbytes: 2 * 212_992)
    raw(running.out, pull_greeting)
    wait_until(lambda: running.status()["consumers"] == 1, 60, "consumer")
    assert "send_buffer" not in caplog.text
