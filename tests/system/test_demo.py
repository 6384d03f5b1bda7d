"""The whole loop with one command: what `lclstream demo` promises, on real parts throughout."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_RUN = REPOSITORY.parent / "shared/data/lcls/mfx101332224-r0007-jungfrau05M.xtc2"


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that mention the demonstration's folder, in their arguments or environment."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            command = process.cmdline()
            words = [*command, *process.environ().values(), process.cwd()]
        except (psutil.Error, OSError):
            continue
        if any(str(folder) in word for word in words):
            found.append(" ".join(command))
    return found


def assert_nothing_left(folder: Path, wait_until: Callable[..., None]) -> None:
    wait_until(lambda: not processes_of(folder), 60, f"end of {processes_of(folder)}")


def listening_sockets() -> set[tuple[int, int]]:
    """Port and inode of everything that listens on this machine: another socket at the same port has another inode."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                found.add((int(words[1].rpartition(":")[2], 16), int(words[9])))
    return found


def listening_ports(folder: Path) -> set[int]:
    """Ports the programs of a demonstration listen at."""
    pids = set(json.loads((folder / "pids.json").read_text()).values())
    ports = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(pid)
            for member in [tree, *tree.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    connections = member.net_connections("tcp")
                    ports |= {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
    return ports


def test_a_synthetic_run_is_streamed_and_analysed_completely(
    start: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    folder = tmp_path / "demo"
    demo = start("lclstream", "demo", "--folder", folder, "--events", "60")
    code = demo.wait(600)
    assert code == 0, demo.output()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["events_expected"] == summary["events_received"] == summary["events_unique"] == 60
    assert summary["dag_run_state"] == "success"
    assert summary["tasks"]["cancel_stream"] == "skipped"
    assert 0 < summary["run_start_to_dag_run_s"] < summary["run_start_to_first_event_s"]
    assert summary["elog_params"]["events"] == 60
    assert Path(summary["result_png"]).read_bytes().startswith(b"\x89PNG")
    assert summary["left_behind"] == []
    assert_nothing_left(folder, wait_until)


@pytest.mark.skipif(not REAL_RUN.exists(), reason=f"no real LCLS-II run at {REAL_RUN}")
def test_a_real_jungfrau_run_arrives_as_psana_reads_it(
    start: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    h5py = pytest.importorskip("h5py")
    from lclstreamer.sources._psana import psana2

    folder = tmp_path / "demo"
    demo = start("lclstream", "demo", "--folder", folder, "--data", REAL_RUN)
    assert demo.wait(600) == 0, demo.output()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["events_received"] == summary["events_unique"] == 2

    psana = psana2()
    run = next(psana.DataSource(files=[str(REAL_RUN)], skip_calib_load="all").runs())
    detector = run.Detector("jungfrau")
    # The summary counts in ADU: the two gain bits of raw Jungfrau pixels are masked.
    frames = [detector.raw.raw(event) & 0x3FFF for event in run.events()]
    with h5py.File(summary["result_h5"]) as result:
        assert (result["image/sum"][...] == sum(frame.astype("float64") for frame in frames)).all()
        assert (result["image/max"][...] == frames[0].clip(min=frames[1])).all()
    assert_nothing_left(folder, wait_until)


@pytest.mark.parametrize("moment", ["starting Airflow", "starts on the logbook"])
def test_ctrl_c_leaves_no_process_and_no_port(
    start: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None], moment: str
) -> None:
    folder = tmp_path / "demo"
    demo = start("lclstream", "demo", "--folder", folder, "--events", "60")
    demo.wait_for_output(moment, 400)
    ports = listening_ports(folder)
    sockets = {one for one in listening_sockets() if one[0] in ports}
    assert sockets, "nothing listened when it was stopped"
    demo.signal(signal.SIGINT)
    assert demo.wait(300) == 130, demo.output()
    assert "stopped by SIGINT" in demo.output()
    assert_nothing_left(folder, wait_until)
    # Somebody else may have been given one of the ports meanwhile.
    assert not sockets & listening_sockets()


def test_a_kafka_that_is_not_there_is_said_and_everything_is_stopped(
    start: Callable[..., Any], tmp_path: Path, free_port: Callable[[], int], wait_until: Callable[..., None]
) -> None:
    folder = tmp_path / "demo"
    nowhere = f"127.0.0.1:{free_port()}"
    demo = start("lclstream", "demo", "--folder", folder, "--kafka", nowhere)
    assert demo.wait(400) == 1, demo.output()
    assert "Kafka" in demo.output()
    assert nowhere in demo.output()
    assert_nothing_left(folder, wait_until)


def test_a_file_that_is_no_run_is_refused_with_its_name(
    start: Callable[..., Any], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    folder, data = tmp_path / "demo", tmp_path / "notes.xtc2"
    data.write_text("these are notes, not a run")
    demo = start("lclstream", "demo", "--folder", folder, "--data", data)
    assert demo.wait(400) == 1, demo.output()
    assert f"{data} cannot be opened" in demo.output()
    assert_nothing_left(folder, wait_until)


def test_a_second_demonstration_in_the_same_folder_is_refused(start: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    first = start("lclstream", "demo", "--folder", folder, "--events", "5")
    first.wait_for_output("making certificates", 120)
    second = start("lclstream", "demo", "--folder", folder)
    assert second.wait(120) == 1
    assert "another demonstration is running" in second.output()
    first.signal(signal.SIGTERM)
    assert first.wait(300) == 143
