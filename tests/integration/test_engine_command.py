"""The command `lclstreamer` as users start it: alone, under mpiexec, with signals, and with all that goes wrong."""

from __future__ import annotations

import io
import json
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 - registers the codecs
import pynng
import pytest
import yaml
import zmq

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_spec("mpi4py") is None, reason="mpi4py is not installed"),
]

ENDLESS = 10**9


class Sink(threading.Thread):
    """Pulls messages from any number of ranks and counts their events."""

    def __init__(self, library: str, url: str) -> None:
        super().__init__(daemon=True)
        self.library, self.ended = library, threading.Event()
        self.messages = self.events = 0
        self.sequences: set[tuple[int, int]] = set()
        self.numbers: list[int] = []
        if library == "nng":
            self.nng = pynng.Pull0(listen=url, recv_max_size=0, recv_timeout=50)
        else:
            self.context = zmq.Context()
            self.zmq = self.context.socket(zmq.PULL)
            self.zmq.RCVTIMEO = 50
            self.zmq.bind(url)
        self.start()

    def ranks(self) -> set[int]:
        """Those a message came from; of a copy, since more come while it is looked through."""
        return {rank for rank, _ in list(self.sequences)}

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                content = self.nng.recv() if self.library == "nng" else self.zmq.recv()
            except (pynng.Timeout, zmq.Again):
                continue
            with h5py.File(io.BytesIO(content)) as file:
                self.sequences.add((int(file.attrs["rank"]), int(file.attrs["sequence"])))
                self.events += len(file["data/number"])
                if "data/time_ns" in file:
                    self.numbers += file["data/time_ns"][:].tolist()
            self.messages += 1

    def close(self) -> None:
        self.ended.set()
        self.join(30)
        if self.library == "nng":
            self.nng.close()
        else:
            self.zmq.close(0)
            self.context.term()


@pytest.fixture
def sink(free_port: Callable[[], int]) -> Iterator[Callable[[str], tuple[Sink, str]]]:
    made: list[Sink] = []

    def make(library: str) -> tuple[Sink, str]:
        url = f"tcp://127.0.0.1:{free_port()}"
        made.append(Sink(library, url))
        return made[-1], url

    yield make
    for one in made:
        if not one.ended.is_set():
            one.close()


def configuration(folder: Path, events: int, url: str | None = None, **handler: Any) -> Path:
    content: dict[str, Any] = {
        "source_identifier": "",
        "skip_incomplete_events": False,
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": events},
        "data_sources": {
            "random": {"type": "GenericRandomNumpyArray", "array_shape": "50,60", "array_dtype": "float32"},
            "number": {"type": "IntValue", "value": 3},
        },
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 10},
        "data_serializer": {
            "type": "HDF5BinarySerializer",
            "fields": {"random": "/data/random", "number": "/data/number"},
        },
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(folder / "out")}],
    }
    if url is not None:
        content["data_handlers"] = [
            {"type": "BinaryDataStreamingDataHandler", "urls": [url], "role": "client", "library": "nng", **handler}
        ]
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def ranks(count: int) -> list[str]:
    return [] if count == 1 else ["mpiexec", "-n", str(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("library", ["nng", "zmq"])
def test_every_event_arrives_once_whatever_the_number_of_ranks(
    start: Any, sink: Any, tmp_path: Path, wait_until: Any, count: int, library: str
) -> None:
    peer, url = sink(library)
    path = configuration(tmp_path, 203, url, library=library)
    child = start(*ranks(count), "lclstreamer", "--config", path)
    assert child.wait(60) == 0, child.output()
    wait_until(lambda: peer.events == 203, 60, f"203 events (not {peer.events})")
    assert len(peer.sequences) == peer.messages
    assert peer.ranks() == set(range(count))
    assert "sent 203 events" in child.output()


def test_num_events_is_over_all_ranks(start: Any, tmp_path: Path) -> None:
    path = configuration(tmp_path, 100)
    child = start("mpiexec", "-n", "2", "lclstreamer", "--config", path, "--num-events", "25")
    assert child.wait(60) == 0, child.output()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["r0_0.h5", "r0_1.h5", "r1_0.h5", "r1_1.h5"]
    assert "sent 25 events" in child.output()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_sends_what_was_made_and_says_so(
    start: Any, sink: Any, tmp_path: Path, wait_until: Any, count: int, number: int, code: int
) -> None:
    peer, url = sink("nng")
    path = configuration(tmp_path, ENDLESS, url)
    child = start(*ranks(count), "lclstreamer", "--config", path)
    wait_until(lambda: len(peer.ranks()) == count, 60, "messages of every rank")
    child.signal(number)
    assert child.wait() == code, child.output()
    said = child.output().rpartition("\nsent ")[2]
    sent = int(said.split()[0])
    wait_until(lambda: peer.events == sent, 60, f"{sent} events (not {peer.events})")
    assert "stopped by a signal before the data had ended" in child.output()


def test_a_killed_rank_ends_the_others(start: Any, sink: Any, tmp_path: Path, wait_until: Any) -> None:
    import psutil

    peer, url = sink("nng")
    path = configuration(tmp_path, ENDLESS, url)
    child = start("mpiexec", "-n", "2", "lclstreamer", "--config", path)
    wait_until(lambda: len(peer.ranks()) == 2, 60, "messages of both ranks")
    family = [
        one for one in psutil.Process(child.pid).children(recursive=True) if "lclstreamer" in " ".join(one.cmdline())
    ]
    assert len(family) == 2
    family[1].kill()
    assert child.wait() != 0
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_a_sink_that_goes_away_ends_the_run_with_a_clear_error(
    start: Any, sink: Any, tmp_path: Path, wait_until: Any
) -> None:
    peer, url = sink("nng")
    path = configuration(tmp_path, ENDLESS, url, connect_timeout_s=3.0)
    child = start("mpiexec", "-n", "2", "lclstreamer", "--config", path)
    wait_until(lambda: peer.messages > 5, 60, "some messages")
    peer.close()
    assert child.wait() == 1, child.output()
    assert "all sinks have left since" in child.output()
    assert "connect_timeout_s" in child.output()


def test_no_sink_at_all_is_told_after_the_time_allowed(start: Any, tmp_path: Path, free_port: Any) -> None:
    path = configuration(tmp_path, 1000, f"tcp://127.0.0.1:{free_port()}", connect_timeout_s=2.0)
    child = start("lclstreamer", "--config", path)
    assert child.wait() == 1
    assert "no sink is there" in child.output()
    assert "Connection refused" in child.output()


def test_an_address_in_use_is_exit_code_3(start: Any, sink: Any, tmp_path: Path) -> None:
    _, url = sink("nng")
    child = start("lclstreamer", "--config", configuration(tmp_path, 10, url, role="server"))
    assert child.wait() == 3
    assert "cannot listen at tcp://" in child.output()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("batch_size: 10", "batch_size: ten", "processing_pipeline.batch_size: 'ten'"),
        ("batch_size: 10", "batch-size: 10", "processing_pipeline.batch-size: unknown key"),
        ("type: IntValue", "type: IntVal", "did you mean IntValue?"),
        ("array_dtype: float32", "array_dtype: str", "only integer and floating types can be random"),
    ],
)
def test_a_wrong_configuration_is_exit_code_2_and_told_once(
    start: Any, tmp_path: Path, old: str, new: str, expected: str, count: int
) -> None:
    path = configuration(tmp_path, 10)
    path.write_text(path.read_text().replace(old, new))
    child = start(*ranks(count), "lclstreamer", "--config", path)
    assert child.wait() == 2
    assert child.output().count(expected) == 1
    assert "Traceback" not in child.output()


def test_a_missing_configuration_is_exit_code_2(start: Any, tmp_path: Path) -> None:
    child = start("lclstreamer", "--config", tmp_path / "nowhere.yaml")
    assert child.wait() == 2
    assert "nowhere.yaml does not exist" in child.output()


def test_an_unknown_option_is_exit_code_2(start: Any) -> None:
    assert start("lclstreamer", "--confg", "x").wait() == 2


def test_check_says_what_each_rank_would_do_and_does_nothing(start: Any, tmp_path: Path) -> None:
    child = start("mpiexec", "-n", "2", "lclstreamer", "--config", configuration(tmp_path, 11), "--check")
    assert child.wait() == 0, child.output()
    assert "[rank 0] InternalEventSource makes 6 of 11 events" in child.output()
    assert "[rank 1] InternalEventSource makes 5 of 11 events" in child.output()
    assert not (tmp_path / "out").exists()


def test_schema_list_and_help_teach(start: Any) -> None:
    schema = start("lclstreamer", "--schema", name="schema")
    assert schema.wait() == 0
    assert "InternalEventSource" in json.loads(schema.output())["$defs"]
    listing = start("lclstreamer", "--list", name="list")
    assert listing.wait() == 0
    assert "batch_size (int, required)" in listing.output()
    teaching = start("lclstreamer", "--help", name="help")
    assert teaching.wait() == 0
    assert "Exit codes" in teaching.output()


def test_it_runs_without_mpi4py(start: Any, tmp_path: Path) -> None:
    path = configuration(tmp_path, 10)
    code = f"import sys; sys.modules['mpi4py'] = None; sys.argv[1:] = ['--config', {str(path)!r}]; " + (
        "from lclstreamer.cli import main; main()"
    )
    child = start("python", "-c", code)
    assert child.wait() == 0, child.output()
    assert (tmp_path / "out" / "r0_0.h5").exists()


def test_under_mpiexec_without_mpi4py_it_refuses_to_read_everything_twice(start: Any, tmp_path: Path) -> None:
    path = configuration(tmp_path, 10)
    code = f"import sys; sys.modules['mpi4py'] = None; sys.argv[1:] = ['--config', {str(path)!r}]; " + (
        "from lclstreamer.cli import main; main()"
    )
    child = start("mpiexec", "-n", "2", "python", "-c", code)
    assert child.wait() != 0
    assert "install the `mpi` extra" in child.output()


def test_progress_is_told_on_stderr_while_it_works(start: Any, tmp_path: Path, wait_until: Any) -> None:
    path = configuration(tmp_path, ENDLESS)
    child = start("lclstreamer", "--config", path, "--progress", "0.2")
    child.wait_for_output("events/s")
    child.signal(signal.SIGTERM)
    assert child.wait() == 143


@pytest.mark.skipif(find_spec("psana") is None, reason="psana (LCLS-II) is not installed")
def test_a_run_of_several_files_is_streamed_by_two_ranks_without_loss(
    start: Any, sink: Any, tmp_path: Path, wait_until: Any
) -> None:
    run = tmp_path / "experiment"
    simulator = start(
        *("python", "-m", "lclstreamer.sources.psana2_simulator", "--dir", run, "--events", "31", "--rows", "64"),
        *("--segments", "3", "--streams", "2"),
    )
    assert simulator.wait(60) == 0, simulator.output()
    assert len(list(run.glob("*.xtc2"))) == 2
    describe = start("lclstreamer", "--describe", f"files={run}")
    assert describe.wait(60) == 0, describe.output()
    peer, url = sink("nng")
    path = configuration(tmp_path, 1, url)
    content = yaml.safe_load(path.read_text())
    content |= {"source_identifier": f"files={run}", "event_source": {"type": "Psana2EventSource"}}
    content["data_sources"] = {
        "time": {"type": "Psana2Timestamp"},
        "number": {"type": "Psana2DetectorInterface", "psana_name": "jungfrau", "psana_fields": "raw.raw"},
    }
    content["data_serializer"]["fields"] = {"time": "/data/time", "number": "/data/number"}
    path.write_text(yaml.safe_dump(content))
    child = start("mpiexec", "-n", "2", "lclstreamer", "--config", path)
    assert child.wait(60) == 0, child.output()
    wait_until(lambda: peer.events == 31, 60, "31 events")
    assert len(set(peer.numbers)) == 31

    content["data_sources"]["number"]["psana_name"] = "epix"
    path.write_text(yaml.safe_dump(content))
    wrong = start("mpiexec", "-n", "2", "lclstreamer", "--config", path)
    assert wrong.wait(60) == 2
    assert wrong.output().count("it has detectors: gmd, jungfrau") == 1
    content["source_identifier"] = "files=/nowhere.xtc2"
    path.write_text(yaml.safe_dump(content))
    missing = start("lclstreamer", "--config", path)
    assert missing.wait(60) == 2
    assert "file /nowhere.xtc2 does not exist" in missing.output()


def counted(port: int) -> int:
    """Events of a running rank, from its metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=60) as answer:
        return int(json.load(answer)["events"])


def test_every_rank_serves_its_counters(start: Any, tmp_path: Path, free_port: Any, wait_until: Any) -> None:
    port = free_port()
    path = configuration(tmp_path, ENDLESS)
    child = start("lclstreamer", "--config", path, "--metrics", f"http://127.0.0.1:{port}")
    child.wait_for_output("metrics at")
    wait_until(lambda: counted(port) > 0, 60, "events counted")
    child.signal(signal.SIGTERM)
    assert child.wait() == 143


def test_a_sink_that_hangs_does_not_keep_a_stopped_run(
    start: Any, tmp_path: Path, free_port: Any, wait_until: Any
) -> None:
    url, port = f"tcp://127.0.0.1:{free_port()}", free_port()
    # It listens and greets, but nobody takes what it receives.
    with pynng.Pull0(listen=url, recv_max_size=0, recv_buffer_size=1):
        path = configuration(tmp_path, ENDLESS, url)
        path.write_text(path.read_text().replace("50,60", "1000,1000"))
        child = start("lclstreamer", "--config", path, "--metrics", f"http://127.0.0.1:{port}")
        child.wait_for_output("sink connected")
        seen: list[int] = []

        def stuck() -> bool:
            seen.append(counted(port))
            return len(seen) > 150 and seen[-1] == seen[-150] > 0

        wait_until(stuck, 60, "run that waits for its sink")
        child.signal(signal.SIGTERM)
        assert child.wait() == 1
    assert "never taken by a sink" in child.output()


@pytest.mark.timeout(300)
def test_the_benchmark_measures_and_writes_its_figures(start: Any, tmp_path: Path) -> None:
    program = Path(__file__).resolve().parents[2] / "benchmarks" / "engine.py"
    child = start("python", program, "--quick", "--only", "4", "--json", tmp_path / "figures.json")
    assert child.wait(280) == 0, child.output()
    figures = json.loads((tmp_path / "figures.json").read_text())
    (row,) = figures["rows"]
    assert row["ours_gbs"] > 0
    assert {"frame", "dtype", "batch_size", "ranks", "reference_gbs", "ratio", "limit_gbs", "share_of_limit"} <= set(
        row
    )
    assert figures["machine"]["cores"] >= 1
