"""Our ends of a stream around the real buffer."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest

from lclstream.client import BrokenStream, StreamError, pull, push

pytestmark = pytest.mark.integration


def messages(count: int, size: int) -> list[bytes]:
    return [number.to_bytes(4, "big") + bytes(size + number) for number in range(count)]


def buffer(start, free_port, tmp_path: Path, *options: str):
    """A running buffer, and the URLs of its two sides."""
    into, out = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    given = ("--in", into, "--out", out, "--grace", "0.3", "--summary", str(tmp_path / "summary.json"))
    process = start("nngstream", *given, *options, name="buffer")
    process.wait_for_output(f"out {out}")
    return process, into, out


def feed(url: str, sent: list[bytes], library: str = "nng") -> threading.Thread:
    def run() -> None:
        with push(url, library=library, timeout_s=60) as pusher:
            for message in sent:
                pusher.send(message)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("producer", ["nng", "zmq"])
@pytest.mark.parametrize("consumer", ["nng", "zmq"])
def test_every_message_passes_the_buffer_and_the_end_is_seen(start, free_port, tmp_path, producer, consumer):
    process, into, out = buffer(start, free_port, tmp_path, "--sentinel", "1")
    sent = messages(40, 300_000)
    feeder = feed(into, sent, producer)
    with pull(out, library=consumer, timeout_s=60, sentinel=consumer == "zmq") as puller:
        assert list(puller) == sent
    feeder.join(60)
    assert process.wait() == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["received"]["messages"], summary["sent"]["messages"]) == (40, 40)
    assert summary["lost"]["messages"] == 0


def test_several_pullers_and_connections_share_the_stream(start, free_port, tmp_path, wait_until):
    process, into, out = buffer(start, free_port, tmp_path)
    sent = messages(60, 50_000)
    received: list[list[bytes]] = [[], []]

    def read(part: int) -> None:
        with pull(out, connections=2, timeout_s=60) as puller:
            ready.wait(60)
            received[part].extend(puller)

    ready = threading.Barrier(3)
    readers = [threading.Thread(target=read, args=(part,)) for part in range(2)]
    for reader in readers:
        reader.start()
    ready.wait(60)
    wait_until(lambda: process.output().count(" connected") == 4, what="four connections")
    feed(into, sent).join(60)
    for reader in readers:
        reader.join(60)
    assert sorted(received[0] + received[1]) == sent
    assert received[0]
    assert received[1]
    assert process.wait() == 0


def test_two_buffers_are_pulled_as_one_stream(start, free_port, tmp_path):
    buffers = [buffer(start, free_port, tmp_path) for _ in range(2)]
    sent = messages(20, 1000)
    with pull([out for _, _, out in buffers], timeout_s=60) as puller:
        feeders = [feed(into, sent[part::2]) for part, (_, into, _) in enumerate(buffers)]
        assert sorted(puller) == sent
    for feeder in feeders:
        feeder.join(60)
    assert [process.wait() for process, _, _ in buffers] == [0, 0]


def test_the_stream_can_be_encrypted_on_both_sides(start, free_port, tmp_path, sites):
    authority = sites["s3df"]
    credentials = authority.member("buffer-of-client-test")
    alice = authority.member("alice")
    into, out = (f"tls+tcp://127.0.0.1:{free_port()}" for _ in range(2))
    files = ("--tls-certificate", str(credentials.certificate), "--tls-key", str(credentials.key))
    files = (*files, "--tls-ca", str(credentials.folder / "known_clients" / "org.crt"))
    process = start("nngstream", "--in", into, "--out", out, "--grace", "0.3", *files, name="buffer")
    process.wait_for_output(f"out {out}")
    sent = messages(20, 300_000)

    def produce() -> None:
        with push(into, timeout_s=60, tls=alice.client_context(into)) as pusher:
            for message in sent:
                pusher.send(message)

    feeder = threading.Thread(target=produce)
    feeder.start()
    with pull(out, timeout_s=60, tls=alice.client_context(out)) as puller:
        assert list(puller) == sent
    feeder.join(60)
    assert process.wait() == 0


def test_a_killed_buffer_breaks_the_stream_for_both_ends(start, free_port, tmp_path):
    process, into, out = buffer(start, free_port, tmp_path, "--capacity", "8MiB")
    failures: list[StreamError] = []
    pusher = push(into, timeout_s=60)

    def produce() -> None:
        try:
            while True:
                pusher.send(bytes(4_000_000))
        except StreamError as error:
            failures.append(error)
            pusher.abort()

    feeder = threading.Thread(target=produce)
    feeder.start()
    with pull(out, timeout_s=60, prefetch=1) as puller:
        assert puller.receive()
        stalled(pusher)
        process.signal(signal.SIGKILL)
        with pytest.raises(BrokenStream):
            drain(puller)
    feeder.join(60)
    assert isinstance(failures[0], BrokenStream)


def stalled(pusher) -> None:
    """Wait until everything between the two ends is full: then the buffer is inside a message on both sides."""
    deadline, seen = time.monotonic() + 60, [-1]
    while len(set(seen[-4:])) > 1 or seen[-1] < 4:
        assert time.monotonic() < deadline
        seen.append(pusher.statistics.messages)
        time.sleep(0.5)


def drain(puller) -> None:
    for _ in puller:
        pass


def test_the_files_of_a_run_replayed_through_the_buffer_come_out_in_order(start, free_port, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    sent = messages(15, 10_000)
    for number, message in enumerate(sent):
        (folder / f"event{number}.h5").write_bytes(message)
    process, into, out = buffer(start, free_port, tmp_path)
    pusher = start("lclstream", "push", str(folder), "--addr", into, "--ndial", "1", "--quiet")
    puller = start("lclstream", "pull", "--dial", out, "--output-dir", str(tmp_path / "out"), "--quiet")
    assert [pusher.wait(), puller.wait(), process.wait()] == [0, 0, 0]
    assert [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())] == sent
    assert pusher.output() == puller.output() == ""
