from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_other_processes_until_a_signal(start: Any, tmp_path: Path, wait_until: Any, number: int) -> None:
    port_file = tmp_path / "kafka.address"
    child = start(
        sys.executable,
        "-m",
        "lclstream.kafka.cli",
        "--port-file",
        str(port_file),
        "--topics",
        "a,b",
        "--partitions",
        "2",
    )
    wait_until(port_file.exists, 60, "port file")
    address = port_file.read_text().strip()
    assert address in child.output()
    topics = Producer({"bootstrap.servers": address}).list_topics(timeout=60).topics
    assert [len(topics[name].partitions) for name in "ab"] == [2, 2]
    child.signal(number)
    assert child.wait() == 0
    assert not port_file.exists()


def test_a_port_file_that_cannot_be_written_is_said(start: Any, tmp_path: Path) -> None:
    child = start(sys.executable, "-m", "lclstream.kafka.cli", "--port-file", str(tmp_path / "none" / "file"))
    assert child.wait() == 2
    assert "No such file or directory" in child.output()
