"""The program that compares streaming with files: its arithmetic, its arguments, and a short run of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "stream_vs_file.py"


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    sys.path.insert(0, str(PROGRAM.parent))  # as when it is started: it imports what lies beside it
    spec = importlib.util.spec_from_file_location("stream_vs_file", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(PROGRAM.parent))
        del sys.modules[spec.name]


def test_whole_scans_have_the_sizes_that_were_published(program: Any) -> None:
    sizes = [program.gigabytes(program.frames_of(side, 1)) for side in program.SIDES]
    # 10, 43, 173 and 695 GB, the first of them cut off.
    assert [round(size) for size in sizes] == [11, 43, 174, 696]
    assert program.frames_of(1024, 0.002) == 2097
    assert program.frames_of(1, 0.002) == 1


def test_a_row_has_the_medians_and_their_ratio(program: Any) -> None:
    file = [program.FileTimes(1.0, 2.0, 3.0), program.FileTimes(10.0, 2.0, 3.0), program.FileTimes(2.0, 3.0, 3.0)]
    row = program.row_of(128, 1000, file, [4.0, 1.0, 2.0])
    assert (row["file_s"], row["stream_s"], row["ratio"]) == (8.0, 2.0, 4.0)
    assert (row["write_s"], row["copy_s"], row["process_s"]) == (2.0, 2.0, 3.0)
    assert row["size_gb"] == 1000 * 576 * 576 * 2 / 1e9
    assert row["rounds"] == {"file_s": [6.0, 15.0, 8.0], "stream_s": [4.0, 1.0, 2.0]}


def test_the_analysis_does_not_depend_on_the_order_of_frames_and_notices_a_wrong_one(program: Any) -> None:
    frames = program.pool()
    ways = [frames, frames[::-1], np.concatenate([frames[5:], frames[:5]])]
    found = []
    for way in ways:
        analysis = program.Analysis()
        for start in range(0, len(way), 7):
            analysis.add(way[start : start + 7])
        found.append(analysis.found())
    assert found[0] == found[1] == found[2]
    changed = frames.copy()
    changed[3, 100, 100] += 1
    changed[3, 100, 101] -= 1
    analysis = program.Analysis()
    analysis.add(changed)
    assert analysis.found() != found[0]
    lost = program.Analysis()
    lost.add(frames[1:])
    assert lost.found()[0] == len(frames) - 1


def test_arguments_have_defaults_and_quick_is_small(program: Any) -> None:
    usual = program.arguments([])
    assert (usual.scale, usual.rounds, usual.sides) == (0.002, 3, [128, 256, 512, 1024])
    quick = program.arguments(["--quick"])
    assert (quick.scale, quick.rounds) == (0.0005, 1)
    assert program.arguments(["--quick", "--scale", "0.01", "--rounds", "2"]).scale == 0.01


@pytest.mark.parametrize("words", [["--scale", "2"], ["--scale", "-1"], ["--rounds", "-1"], ["--sides", "0"]])
def test_arguments_that_make_no_sense_are_refused(
    program: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        program.arguments(words)
    assert caught.value.code == 2
    assert "--scale is above 0" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.timeout(400)
def test_both_ways_give_the_same_analysis_and_leave_no_file(start: Any, tmp_path: Path) -> None:
    folder, copies = tmp_path / "files", tmp_path / "copies"
    folder.mkdir()
    child = start(
        *("python", PROGRAM, "--quick", "--sides", "128,256", "--folder", folder, "--copy-to", copies),
        *("--json", tmp_path / "figures.json"),
    )
    assert child.wait(380) == 0, child.output()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["machine"]["cores"] >= 1
    assert [row["frames"] for row in figures["rows"]] == [8, 33]
    for row in figures["rows"]:
        assert {"size_gb", "file_s", "stream_s", "ratio"} <= set(row)
        assert row["ratio"] == pytest.approx(row["file_s"] / row["stream_s"])
    assert list(folder.iterdir()) == list(copies.iterdir()) == []
