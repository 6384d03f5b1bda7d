"""The live view: the right sentence for each situation, and every number in its place."""

from __future__ import annotations

import io
import socket
import threading
from typing import Any

import pytest
from rich.console import Console

from nngstream.top import Source, amount, view, waits_for


def status(**changes: Any) -> dict[str, Any]:
    nothing = {"messages": 0, "bytes": 0}
    return {
        "name": "run7", "state": "streaming", "producers": 1, "producers_waiting": 0, "consumers": 1,
        "received": nothing, "sent": nothing, "held": nothing, "lost": nothing, "high_water_bytes": 0,
        "capacity_bytes": 1000, "disk_bytes": 0, "rate_in_bytes_s": 0.0, "rate_out_bytes_s": 0.0, "oldest_age_s": 0.0,
        "groups": [], "refused": 0, "last_refusal": None, "peers": [], "time": 100.0, **changes,
    }  # fmt: skip


HELD = {"held": {"messages": 5, "bytes": 500}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"state": "waiting"}, "the first producer"),
        ({"state": "done"}, "nothing: it has ended"),
        ({**HELD, "consumers": 0}, "a consumer"),
        ({**HELD, "producers_waiting": 1}, "consumers, which are slower than the producers: the memory is full"),
        ({**HELD, "oldest_age_s": 3.0}, "consumers, which take their time"),
        ({"producers": 0}, "more producers, or the end of the grace"),
        ({"rate_in_bytes_s": 5.0}, "nothing: data flow"),
        ({}, "data"),
        ({"groups": [{"out": "tcp://h:1", "consumers": 0, "queued": {"messages": 1}}]}, "a consumer at tcp://h:1"),
    ],
)
def test_it_says_what_the_data_wait_for(changes, sentence):
    assert waits_for(status(**changes)) == sentence


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.34e9, "2.34 GB"), (1e18, "1e+03 PB"), (None, "-")],
)
def test_bytes_are_written_for_people(number, text):
    assert amount(number) == text


def test_peers_are_shown_with_their_rates_and_losses():
    source = Source("http://127.0.0.1:1", None)
    peer = {
        "side": "in", "protocol": "nng", "address": "10.0.0.7:1", "buffer": None, "subject": None, "connected": 1.0,
        "messages": 10, "bytes": 1_000_000, "lost_messages": 0, "ended": None,
    }  # fmt: skip
    dead = {**peer, "side": "out", "protocol": "zmq", "address": "10.0.0.8:2", "lost_messages": 3, "ended": "reset"}
    source.before = status(peers=[peer])
    source.status = status(peers=[{**peer, "bytes": 3_000_000}, dead], time=102.0, refused=1, last_refusal="x: why")
    console = Console(width=140, file=io.StringIO())
    console.print(view(source))
    text = console.file.getvalue()
    assert "1 MB/s" in text
    assert "10.0.0.8:2" in text
    assert "reset" in text
    assert "refused 1: x: why" in text


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTT", b""]
)
def test_a_buffer_that_ends_while_it_answers_is_one_that_does_not_answer(said):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        source = Source(f"http://127.0.0.1:{server.getsockname()[1]}", None)
        assert not source.fetch()
        thread.join(60)
    assert source.error
