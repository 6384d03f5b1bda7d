"""The engine's memory: a few slots, however long it runs, and whether or not its sink keeps up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
import zmq

pytestmark = pytest.mark.integration

SECONDS = float(os.environ.get("LCLSTREAM_SOAK_SECONDS", "600"))
EVENT, BATCH = 512 << 10, 8
MESSAGE = EVENT * BATCH


class Sink(threading.Thread):
    """Pulls messages into one buffer while it is not `paused`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.messages = 0
        self.paused, self._ended = threading.Event(), threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.RCVTIMEO, self._socket.RCVHWM = 50, 1
        self.url = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.start()

    def run(self) -> None:
        while not self._ended.is_set():
            if self.paused.is_set():
                self._ended.wait(0.01)
                continue
            try:
                self._socket.recv(copy=False)
            except zmq.Again:
                continue
            self.messages += 1

    def close(self) -> None:
        self._ended.set()
        self.join(30)
        self._socket.close(0)
        self._context.term()


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()


def configuration(folder: Path, url: str) -> Path:
    content: dict[str, Any] = {
        "source_identifier": "",
        "skip_incomplete_events": False,
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 10**9},
        "data_sources": {
            "frames": {
                "type": "GenericRandomNumpyArray",
                "array_shape": f"{EVENT // 1024},512",
                "array_dtype": "uint16",
            }
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": BATCH},
        "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"frames": "/data/frames"}},
        "data_handlers": [
            {"type": "BinaryDataStreamingDataHandler", "urls": [url], "role": "client", "library": "zmq"}
        ],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def resident(pid: int) -> int:
    """Bytes of memory a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(400)
def test_a_long_stream_and_a_sink_that_pauses_take_no_more_memory_than_the_first_messages(
    start: Any, sink: Sink, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    child = start("lclstreamer", "--config", configuration(tmp_path, sink.url))
    wait_until(lambda: sink.messages >= 20, 60, "the first messages")
    before = resident(child.pid)
    wait_until(lambda: sink.messages >= 120, 120, "100 more messages")
    sink.paused.set()
    sizes: list[int] = []

    def settled() -> bool:
        sizes.append(resident(child.pid))
        return len(sizes) > 60 and max(sizes[-40:]) == min(sizes[-40:])

    wait_until(settled, 60, "memory that no longer changes while nobody takes messages")
    sink.paused.clear()
    wait_until(lambda: sink.messages >= 150, 60, "messages after the pause")
    sizes.append(resident(child.pid))
    child.signal(signal.SIGTERM)
    assert child.wait(60) == 143, child.output()
    # All slots and then some: keeping one message in twenty would take ten times as much.
    assert max(sizes) - before < 5 * MESSAGE, [size >> 20 for size in (before, *sizes)]


@pytest.mark.soak
@pytest.mark.skipif("LCLSTREAM_SOAK" not in os.environ, reason="ten minutes: set LCLSTREAM_SOAK=1")
@pytest.mark.timeout(SECONDS + 300)
def test_ten_minutes_at_full_rate_keep_the_memory_flat(
    start: Any, sink: Sink, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    child = start("lclstreamer", "--config", configuration(tmp_path, sink.url))
    wait_until(lambda: sink.messages >= 100, 60, "the first messages")
    sizes, first, end = [], sink.messages, time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(SECONDS / 60)
        sizes.append(resident(child.pid))
    sent = sink.messages - first
    child.signal(signal.SIGTERM)
    assert child.wait(60) == 143, child.output()
    print(f"{sent} messages, {sent * MESSAGE / SECONDS / 1e9:.2f} GB/s; MiB {[size >> 20 for size in sizes]}")
    assert sent * MESSAGE > 100 * max(sizes), "far more went through than the engine ever had in memory"
    assert max(sizes[-20:]) - max(sizes[:20]) < 4 << 20, [size >> 20 for size in sizes]
