"""`lclstream pull`, `push` and `consume run-summary` as processes."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from lclstream.client import push

pytestmark = pytest.mark.integration
LCLSTREAM = str(Path(sys.executable).parent / "lclstream")


def files_in(folder: Path, count: int, size: int = 50_000) -> list[bytes]:
    folder.mkdir()
    contents = [bytes([number]) * (size + number) for number in range(count)]
    for number, content in enumerate(contents):
        (folder / f"m{number}.h5").write_bytes(content)
    return contents


def message(first: int, count: int) -> bytes:
    random = np.random.default_rng(first)
    images = random.poisson(30, (count, 1, 64, 96)).astype(np.uint16)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs.update({"experiment": "mfxtest01", "run": 3})
        file["/data/image"] = images
        file["/data/timestamp_ns"] = 1_700_000_000_000_000_000 + 8_000_000 * np.arange(first, first + count)
        file["/data/energy"] = random.normal(2, 0.1, count)
    return buffer.getvalue()


@pytest.mark.parametrize("library", ["nng", "zmq"])
def test_what_push_reads_from_a_folder_pull_writes_to_tar_in_natural_order(tmp_path, free_port, start, library):
    contents = files_in(tmp_path / "in", 12)
    url = f"tcp://127.0.0.1:{free_port()}"
    pusher = start("lclstream", "push", str(tmp_path / "in"), "--addr", url, "--library", library)
    pulled = subprocess.run(
        [LCLSTREAM, "pull", "--dial", url, "--names", "x%03d.h5", "--library", library],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert pulled.returncode == 0, pulled.stderr.decode()
    assert pusher.wait() == 0, pusher.output()
    with tarfile.open(fileobj=io.BytesIO(pulled.stdout)) as tar:
        names = tar.getnames()
        received = [tar.extractfile(name).read() for name in names]
    assert names == [f"x{number:03d}.h5" for number in range(12)]
    assert received == contents
    assert b"received 12 messages" in pulled.stderr


def test_push_dials_paces_and_loops_and_pull_listens_into_a_folder(tmp_path, free_port, start):
    contents = files_in(tmp_path / "in", 5, size=10)
    url = f"tcp://127.0.0.1:{free_port()}"
    puller = start("lclstream", "pull", "--listen", url, "--output-dir", str(tmp_path / "out"))
    puller.wait_for_output("pulling from")
    options = ("--addr", url, "--ndial", "1", "--loop", "3", "--rate", "20")
    pusher = start("lclstream", "push", *map(str, sorted((tmp_path / "in").iterdir())), *options)
    assert pusher.wait() == 0, pusher.output()
    assert puller.wait() == 0, puller.output()
    written = sorted((tmp_path / "out").iterdir())
    assert [path.read_bytes() for path in written] == contents * 3
    # 15 messages at 20 a second: the last begins 0.7 s after the first, or a little less when the first was late.
    seconds = float(pusher.output().rsplit(" s (", 1)[0].rsplit(" ", 1)[1])
    assert seconds >= 0.65


def test_pull_without_a_stream_ends_with_code_3_and_wrong_options_with_2(free_port):
    url = f"tcp://127.0.0.1:{free_port()}"
    for options, code, words in (
        (["--dial", url, "--connect-timeout", "0.3"], 3, b"nobody to connect to"),
        (["--dial", url, "--listen", url], 2, b"either --dial URL or --listen URL"),
        (["--listen", url, "--ndial", "2"], 2, b"--ndial is for --dial"),
        (["--dial", "http://x"], 2, b"tcp://"),
        (["--dial", url, "--names", "same.h5"], 2, b"--names"),
        (["--dial", url, "--names", "../%d.h5"], 2, b"--names"),
    ):
        done = subprocess.run([LCLSTREAM, "pull", *options], capture_output=True, timeout=120, check=False)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr.decode()


def test_push_of_nothing_is_a_wrong_command_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "missing"):
        done = subprocess.run([LCLSTREAM, "push", str(tmp_path / path)], capture_output=True, timeout=120, check=False)
        assert done.returncode == 2
        assert str(tmp_path / path).encode() in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_pull_and_push_at_once_and_keeps_what_came(tmp_path, free_port, start, wait_until, number, code):
    files_in(tmp_path / "in", 2)
    url = f"tcp://127.0.0.1:{free_port()}"
    pusher = start("lclstream", "push", str(tmp_path / "in"), "--addr", url, "--loop", "0", "--rate", "50")
    puller = start("lclstream", "pull", "--dial", url, "--output-dir", str(tmp_path / "out"))
    puller.wait_for_output("pulling from")
    first = tmp_path / "out" / "00003.h5"
    wait_until(first.exists, what="fourth message")
    puller.signal(number)
    assert puller.wait() == code
    assert "stopped by" in puller.output()
    pusher.signal(number)
    assert pusher.wait() == code
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_run_summary_writes_its_three_results(tmp_path, free_port, start):
    url = f"tcp://127.0.0.1:{free_port()}"
    consumer = start(
        "lclstream", "consume", "run-summary", "--url", url, "--listen", "--output-dir", str(tmp_path / "r")
    )
    consumer.wait_for_output("pulling from")
    with push(url) as pusher:
        for first in range(0, 40, 10):
            pusher.send(message(first, 10))
    assert consumer.wait() == 0, consumer.output()
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert (result["complete"], result["events"], result["events_unique"], result["messages"]) == (True, 40, 40, 4)
    assert (result["experiment"], result["run"]) == ("mfxtest01", 3)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["result.h5", "result.json", "result.png"]


def test_a_stopped_run_summary_keeps_what_it_has_and_says_that_it_is_incomplete(tmp_path, free_port, start):
    url = f"tcp://127.0.0.1:{free_port()}"
    with push(url, listen=True, timeout_s=60, connect_timeout_s=90) as pusher:
        consumer = start("lclstream", "consume", "run-summary", "--url", url, "--output-dir", str(tmp_path))
        pusher.send(message(0, 10))
        pusher.send(message(10, 10))
        consumer.wait_for_output("pulling from")
        consumer.signal(signal.SIGTERM)
        assert consumer.wait() == 143, consumer.output()
        pusher.abort()  # it need not have read both messages when it was told to stop
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] is False
    assert "SIGTERM" in result["reason"]


def test_a_message_that_is_no_hdf5_ends_a_run_summary_with_the_events_before_it(tmp_path, free_port, start):
    url = f"tcp://127.0.0.1:{free_port()}"
    consumer = start("lclstream", "consume", "run-summary", "--url", url, "--listen", "--output-dir", str(tmp_path))
    consumer.wait_for_output("pulling from")
    with push(url) as pusher:
        pusher.send(message(0, 10))
        pusher.send(b"garbage")
    assert consumer.wait() == 1, consumer.output()
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["complete"], result["events"]) == (False, 10)
    assert "message 1 (7 bytes" in result["reason"]
    with h5py.File(tmp_path / "result.h5") as file:
        assert not file.attrs["complete"]
        assert len(file["events/peaks"]) == 10


def test_run_summary_without_a_stream_says_so_with_code_3(tmp_path, free_port, start):
    url = f"tcp://127.0.0.1:{free_port()}"
    options = ("--connect-timeout", "0.3", "--output-dir", str(tmp_path))
    consumer = start("lclstream", "consume", "run-summary", "--url", url, *options)
    assert consumer.wait() == 3, consumer.output()
    assert json.loads((tmp_path / "result.json").read_text())["events"] == 0


def test_push_and_pull_encrypt_with_the_certificates_they_are_given(tmp_path, free_port, start, sites):
    contents = files_in(tmp_path / "in", 3, size=100_000)
    alice = str(sites["s3df"].member("alice").folder)
    url = f"tls+tcp://127.0.0.1:{free_port()}"
    puller = start("lclstream", "pull", "--listen", url, "--output-dir", str(tmp_path / "out"), "--credentials", alice)
    puller.wait_for_output("pulling from")
    options = ("--addr", url, "--ndial", "1", "--reconnect", "5", "--credentials", alice)
    pusher = start("lclstream", "push", str(tmp_path / "in"), *options)
    assert [pusher.wait(), puller.wait()] == [0, 0], pusher.output() + puller.output()
    assert [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())] == contents


def test_pull_with_sentinel_calls_a_stream_without_one_broken_and_keeps_its_files(tmp_path, free_port, start):
    files_in(tmp_path / "in", 3)
    url = f"tcp://127.0.0.1:{free_port()}"
    start("lclstream", "push", str(tmp_path / "in"), "--addr", url, "--library", "zmq")
    options = ("--library", "zmq", "--sentinel", "--reconnect", "0.5", "--timeout", "20", "--producers", "1")
    puller = start("lclstream", "pull", "--dial", url, "--output-dir", str(tmp_path / "out"), *options)
    assert puller.wait() == 1, puller.output()
    assert "without an end-of-stream" in puller.output()
    assert len(list((tmp_path / "out").iterdir())) == 3
