"""Keyed routing: all messages with one key reach one group of consumers."""

from __future__ import annotations

import struct
import threading

import pynng
import pytest

pytestmark = pytest.mark.integration

TWO = {"out": ["tcp://127.0.0.1:0", "tcp://127.0.0.1:0"]}


@pytest.mark.parametrize("size", [10, 200_000])
def test_all_sectors_of_a_frame_reach_one_group(
    run_buffer, nng, zmq_push, zmq_pull, collect, drained, wait_until, size
):
    running = run_buffer(**TWO, route="2:u32le", producers=4, sentinel=1)
    pulls = [zmq_pull(running.buffer.outputs[group]) for group in (0, 0, 1)]
    collectors = [collect(pull.recv, sentinel=True) for pull in pulls]
    wait_until(lambda: running.in_turn() == 3, 60, "three consumers")
    pushes = [zmq_push(running.inp) for _ in range(3)] + [nng(pynng.Push0, dial=running.inp)]
    frames = 100

    def produce(sector: int) -> None:
        for frame in range(frames):
            pushes[sector].send(struct.pack("<HI", sector, frame) + bytes(size))

    threads = [threading.Thread(target=produce, args=(sector,)) for sector in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    drained(running, 4 * frames)
    for push in pushes:
        push.close()
    assert running.wait() == "done"
    got = [[struct.unpack("<HI", message[:6]) for message in each.finish()] for each in collectors]
    assert sorted(got[0] + got[1]) == [(sector, frame) for sector in range(4) for frame in range(0, frames, 2)]
    assert sorted(got[2]) == [(sector, frame) for sector in range(4) for frame in range(1, frames, 2)]
    assert got[0]
    assert got[1], "a group's consumers share its messages"


def test_the_key_of_a_multipart_message_lies_in_its_first_part(run_buffer, zmq_push, zmq_pull):
    running = run_buffer(**TWO, route="0:u8")
    push = zmq_push(running.inp)
    for number in range(4):
        push.send_multipart([bytes([number]), b"\x07 not the key"])
    pulls = [zmq_pull(url) for url in running.buffer.outputs]
    for number in range(4):
        assert pulls[number % 2].recv_multipart()[0] == bytes([number])
    push.close()
    assert running.wait() == "done"


def test_messages_too_short_for_the_key_go_to_the_first_group(run_buffer, zmq_push, zmq_pull):
    running = run_buffer(**TWO, route="0:u32be")
    push = zmq_push(running.inp)
    for message in (b"", b"abc", b"\x00\x00\x00\x01"):
        push.send(message)
    first, second = [zmq_pull(url) for url in running.buffer.outputs]
    assert [first.recv(), first.recv(), second.recv()] == [b"", b"abc", b"\x00\x00\x00\x01"]
    push.close()
    assert running.wait() == "done"


def test_a_group_without_consumers_is_waited_for_and_shown(run_buffer, zmq_push, zmq_pull, wait_until):
    running = run_buffer(**TWO, route="0:u8")
    push = zmq_push(running.inp)
    for number in range(10):
        push.send(bytes([number]))
    push.close()
    second = zmq_pull(running.buffer.outputs[1])
    assert [second.recv() for _ in range(5)] == [bytes([number]) for number in (1, 3, 5, 7, 9)]
    wait_until(lambda: running.status()["state"] == "draining", 60, "draining")
    groups = running.status()["groups"]
    assert [(group["consumers"], group["queued"]["messages"]) for group in groups] == [(0, 5), (1, 0)]
    first = zmq_pull(running.buffer.outputs[0])
    assert [first.recv() for _ in range(5)] == [bytes([number]) for number in (0, 2, 4, 6, 8)]
    assert running.wait() == "done"
