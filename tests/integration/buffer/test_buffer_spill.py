"""Messages on disk: in order, bounded, deleted when given away, and there again after a crash."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import threading
import urllib.request

import pytest
import zmq

from nngstream.spill import RECORD

pytestmark = pytest.mark.integration


def _segments(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.segment"))


def _status(url: str) -> dict:
    with urllib.request.urlopen(url + "/status", timeout=60) as answer:
        return json.load(answer)


def test_messages_wait_on_disk_while_nobody_takes_them(run_buffer, zmq_push, zmq_pull, tmp_path, wait_until):
    running = run_buffer(spill=str(tmp_path / "s"), sentinel=1)
    push = zmq_push(running.inp)
    messages = [[b"%d" % number, bytes(number * 731 % 300_000)] for number in range(200)]
    for message in messages:
        push.send_multipart(message)
    push.close()
    wait_until(lambda: running.amounts()[0] == 200, 60, "all messages")
    wait_until(lambda: running.buffer.pool.used == 0, 60, "empty memory")
    assert running.status()["held"]["messages"] == 200
    assert running.status()["disk_bytes"] > running.status()["held"]["bytes"]
    pull = zmq_pull(running.out)
    assert [pull.recv_multipart() for _ in messages] == messages
    assert running.wait() == "done"
    assert _segments(tmp_path / "s") == []


@pytest.mark.parametrize("size", [1000, 700_000])
def test_a_full_memory_goes_to_disk_instead_of_holding_producers_up(
    run_buffer, zmq_push, raw, pull_greeting, sp_receive, tmp_path, wait_until, size
):
    running = run_buffer(spill=str(tmp_path / "s"), capacity="8MiB", send_buffer="64KiB")
    slow = raw(running.out, pull_greeting)
    wait_until(lambda: running.status()["consumers"] == 1, 60, "consumer")
    push = zmq_push(running.inp)
    count = 60_000_000 // size
    if size == 1000:
        count //= 4
    for number in range(count):
        push.send(b"%012d" % number + bytes(size))
    push.close()
    wait_until(lambda: running.amounts()[0] == count, 60, "all messages")
    assert running.buffer.pool.mapped <= 8 << 20
    assert running.status()["disk_bytes"] > 4 << 20
    for number in range(count):
        assert int(sp_receive(slow)[:12]) == number
    assert running.wait() == "done"
    assert _segments(tmp_path / "s") == []


@pytest.mark.parametrize("reason", ["limit", "full disk"])
def test_a_full_disk_falls_back_to_back_pressure(
    run_buffer, zmq_push, zmq_pull, collect, tmp_path, wait_until, monkeypatch, reason
):
    options = {"spill_limit": "10MB"} if reason == "limit" else {}
    if reason == "full disk":
        written = []
        real = os.pwrite

        def pwrite(number, data, position):
            written.append(len(data))
            if sum(written) > 10_000_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(number, data, position)

        monkeypatch.setattr("nngstream.spill.os.pwrite", pwrite)
    running = run_buffer(spill=str(tmp_path / "s"), capacity="8MiB", sentinel=1, **options)
    push = zmq_push(running.inp)
    push.setsockopt(zmq.SNDHWM, 1)
    count = 60
    thread = threading.Thread(target=lambda: [push.send(b"%012d" % n + bytes(700_000)) for n in range(count)])
    thread.start()
    wait_until(lambda: running.status()["producers_waiting"] == 1, 60, "waiting producer")
    wait_until(lambda: running.status()["disk_bytes"] > 5_000_000, 60, "messages on disk")
    assert running.status()["disk_bytes"] <= 10_500_000
    collector = collect(zmq_pull(running.out).recv, sentinel=True)
    thread.join(60)
    push.close()
    assert running.wait() == "done"
    assert [int(message[:12]) for message in collector.finish()] == list(range(count))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_cannot_be_written_at_the_end_is_counted_as_lost(
    run_buffer, zmq_push, raw, pull_greeting, tmp_path, wait_until, monkeypatch, number
):
    """Who reads the last figures must not take it for kept."""
    running = run_buffer(spill=str(tmp_path / "s"), capacity="64MiB", send_buffer="64KiB", drain=0.1)
    slow = raw(running.out, pull_greeting)
    wait_until(lambda: running.in_turn() == 1, 60, "consumer")
    push = zmq_push(running.inp)
    for _ in range(20):
        push.send(bytes(700_000))
    push.close()
    wait_until(lambda: running.amounts()[0] == 20, 60, "all messages")
    assert running.status()["disk_bytes"] == 0, "they are in memory: a consumer is there"

    def pwrite(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("nngstream.spill.os.pwrite", pwrite)
    running.buffer.stop()
    assert running.wait() == "failed"
    status = running.status()
    assert status["held"]["messages"] == 0
    assert status["sent"]["messages"] + status["lost"]["messages"] == 20
    assert status["lost"]["messages"] > 10
    slow.close()


def _start(start, folder, *words, command=("nngstream",)):
    child = start(
        *command, "--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--status", "http://127.0.0.1:0",
        "--spill", str(folder), "--grace", "0.1", "--drain", "0.3", *words,
    )  # fmt: skip
    child.wait_for_output("status http")
    return child, dict(line.split() for line in child.output().splitlines() if len(line.split()) == 2)


@pytest.mark.parametrize(("count", "size"), [(60_000, 100), (300, 100_000), (24, 4_000_000)])
def test_what_was_on_disk_survives_a_crash_of_the_buffer(
    start, context, zmq_push, zmq_pull, tmp_path, wait_until, count, size
):
    child, urls = _start(start, tmp_path / "s")
    push = zmq_push(urls["in"])
    for number in range(count):
        push.send(b"%012d" % number + bytes(size))
    wait_until(lambda: _status(urls["status"])["received"]["messages"] == count, 60, "all messages")
    wait_until(lambda: _status(urls["status"])["disk_bytes"] > count * size, 60, "all on disk")
    # It takes few messages beyond those the program asks for: most have not been given away when the buffer is killed.
    pull = context.socket(zmq.PULL)
    for option, value in ((zmq.RCVHWM, 1), (zmq.RCVBUF, 65536), (zmq.RCVTIMEO, 30_000)):
        pull.setsockopt(option, value)
    pull.connect(urls["out"])
    first = [int(pull.recv()[:12]) for _ in range(count // 3)]
    child.signal(signal.SIGKILL)
    child.process.wait(60)
    pull.close()
    push.close()
    again, urls = _start(start, tmp_path / "s", "--producers", "0", "--sentinel", "1")
    recovered = _status(urls["status"])["recovered_messages"]
    pull = zmq_pull(urls["out"])
    second = []
    while message := pull.recv():
        assert len(message) == 12 + size
        second.append(int(message[:12]))
    assert first == list(range(count // 3))
    assert second == list(range(count - recovered, count)), "all that was not given away, in order"
    # libzmq had received more than the first program took: those died with it.
    assert 0 < second[0] <= count - 1
    assert first[-1] + 1 - second[0] <= max(1, RECORD // size), "what comes twice is one record"
    assert again.wait() == 0
    assert _segments(tmp_path / "s") == []


def test_a_stop_signal_keeps_what_nobody_took_for_the_next_start(start, zmq_push, zmq_pull, tmp_path, wait_until):
    child, urls = _start(start, tmp_path / "s", "--summary", str(tmp_path / "summary.json"))
    push = zmq_push(urls["in"])
    for number in range(50):
        push.send(b"%d" % number)
    wait_until(lambda: _status(urls["status"])["received"]["messages"] == 50, 60, "all messages")
    child.signal(signal.SIGTERM)
    assert child.wait() == 143
    push.close()
    assert "50 messages (90 bytes) wait in" in child.output()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["state"], summary["held"]["messages"], summary["lost"]["messages"]) == ("failed", 50, 0)
    again, urls = _start(start, tmp_path / "s", "--producers", "0")
    pull = zmq_pull(urls["out"])
    assert [pull.recv() for _ in range(50)] == [b"%d" % number for number in range(50)]
    assert again.wait() == 0


def test_a_stop_inside_a_record_keeps_only_what_nobody_has_had(
    run_buffer, zmq_push, raw, pull_greeting, zmq_pull, tmp_path, wait_until
):
    first = run_buffer(spill=str(tmp_path / "s"), drain=0.3, send_buffer="64KiB")
    push = zmq_push(first.inp)
    for number in range(100):
        push.send(b"%03d" % number + bytes(100_000))
    wait_until(lambda: first.amounts()[0] == 100, 60, "all messages")
    wait_until(lambda: first.buffer.pool.used == 0, 60, "empty memory")
    consumer = raw(first.out, pull_greeting)  # takes what its socket holds, and reads nothing
    assert consumer.recv(1, socket.MSG_PEEK)
    first.buffer.stop()
    assert first.wait() == "failed"
    _, sent, held, lost = first.amounts()
    assert sent + lost > 0
    second = run_buffer(spill=str(tmp_path / "s"), producers=0)
    assert second.buffer.recovered == held
    pull = zmq_pull(second.out)
    assert [int(pull.recv()[:3]) for _ in range(held)] == list(range(sent + lost, 100))
    assert second.wait() == "done"


def test_a_record_that_was_not_written_wholly_is_not_offered(start, zmq_push, zmq_pull, tmp_path, wait_until):
    child, urls = _start(start, tmp_path / "s")
    push = zmq_push(urls["in"])
    for number in range(2):
        push.send(b"%d" % number + bytes(900_000))
        wait_until(lambda number=number: _status(urls["status"])["disk_bytes"] > 900_000 * (number + 1), 60, "on disk")
    child.signal(signal.SIGKILL)
    child.process.wait(60)
    push.close()
    (path,) = (tmp_path / "s").glob("*.segment")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    again, urls = _start(start, tmp_path / "s", "--producers", "0")
    pull = zmq_pull(urls["out"])
    assert pull.recv()[:1] == b"0"
    assert again.wait() == 0
    assert "were not written wholly" in again.output()


def test_messages_on_disk_take_no_files_of_the_process(start, zmq_push, zmq_pull, tmp_path, wait_until):
    few = ("sh", "-c", 'ulimit -n 40; exec nngstream "$@"', "sh")
    child, urls = _start(start, tmp_path / "s", "--capacity", "8MiB", "--sentinel", "1", command=few)
    push = zmq_push(urls["in"])
    count, size = 150, 600_000  # each is a record of its own
    sender = threading.Thread(target=lambda: [push.send(b"%012d" % number + bytes(size)) for number in range(count)])
    sender.start()
    wait_until(lambda: _status(urls["status"])["received"]["messages"] == count, 60, "all messages")
    wait_until(lambda: _status(urls["status"])["disk_bytes"] > count * size, 60, "all on disk")
    sender.join(60)
    pull = zmq_pull(urls["out"])
    assert [int(pull.recv()[:12]) for _ in range(count)] == list(range(count))
    push.close()
    assert pull.recv() == b""
    assert child.wait() == 0
    assert "cannot write" not in child.output()
    assert _segments(tmp_path / "s") == []


def test_two_buffers_cannot_share_a_folder(start, run_buffer, tmp_path):
    run_buffer(spill=str(tmp_path))
    second = start("nngstream", "--in", "tcp://127.0.0.1:0", "--out", "tcp://127.0.0.1:0", "--spill", str(tmp_path))
    assert second.wait() == 2
    assert "another buffer uses it" in second.output()
