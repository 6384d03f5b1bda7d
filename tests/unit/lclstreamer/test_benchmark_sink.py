"""The sink of the engine's benchmark: a figure counts only what really arrived."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest

PROGRAM = Path(__file__).resolve().parents[3] / "benchmarks" / "pull_sink.py"
FRAMES = np.random.default_rng(1).integers(0, 60_000, (4, 100, 100)).astype(np.uint16)


@pytest.fixture
def pull_sink(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("pull_sink", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pull_sink", module)
    spec.loader.exec_module(module)
    return module


def message(frames: Any, compression: dict[str, Any]) -> memoryview:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_dataset("data/frames", data=frames, chunks=(1, *frames.shape[1:]), **compression)
    return memoryview(bytearray(content.getvalue()))


def changed(row: int) -> Any:
    frames = FRAMES[:3].copy()
    frames[row, 0, :5] += 1
    return frames


def cut(compression: dict[str, Any]) -> memoryview:
    return message(FRAMES[:3], compression)[:-1]


@pytest.mark.parametrize("compression", [{}, dict(hdf5plugin.Bitshuffle(cname="lz4"))], ids=["plain", "compressed"])
@pytest.mark.parametrize(
    "spoiled",
    [cut, lambda compression: message(changed(0), compression), lambda _: memoryview(b"no HDF5 at all" * 100)],
    ids=["cut", "other content", "no file"],
)
def test_spoiled_messages_are_found_among_good_ones(
    pull_sink: Any,
    tmp_path: Path,
    compression: dict[str, Any],
    spoiled: Callable[[dict[str, Any]], memoryview],
) -> None:
    np.save(tmp_path / "frames.npy", FRAMES)
    tally = pull_sink.Tally(warm=0)
    check = pull_sink.Checker(str(tmp_path / "frames.npy"), tally)
    good = message(FRAMES[:3], compression)
    check(good, 1.0)
    check(good, 2.0)
    assert (tally.wrong, tally.events) == (0, 6)
    check(spoiled(compression), 3.0)
    assert tally.wrong == 1


def test_the_last_event_of_a_message_is_looked_at_too(pull_sink: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", FRAMES)
    tally = pull_sink.Tally(warm=0)
    check = pull_sink.Checker(str(tmp_path / "frames.npy"), tally)
    check(message(FRAMES[:3], {}), 1.0)
    check(message(changed(2), {}), 2.0)
    assert tally.wrong == 1
