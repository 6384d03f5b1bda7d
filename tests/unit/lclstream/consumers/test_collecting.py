from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from lclstream.consumers.collecting import CollectError, app, collect


def part(path: Path, first: int, events: int, **more: Any) -> None:
    with h5py.File(path, "w") as file:
        file["data/number"] = np.arange(first, first + events)
        file.create_dataset("data/image", data=np.full((events, 4, 3), first, "u2"), compression="gzip")
        for name, data in more.items():
            file[name] = data


def test_a_run_is_one_file_over_the_parts_in_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "reduced"
    folder.mkdir()
    for first, name in ((0, "run_r0_2"), (5, "run_r0_10"), (7, "run_r1_0"), (90, "other_r0_0")):
        part(folder / f"{name}.h5", first, {0: 5, 5: 2, 7: 3, 90: 1}[first])
    output = folder / "run.h5"
    for _ in range(2):
        told = CliRunner().invoke(
            app, [str(folder), "--prefix", "run_", "--output", str(output), "--result", str(tmp_path / "result.json")]
        )
        assert told.exit_code == 0, told.output
    assert "10 events of 3 files" in told.output
    facts = json.loads((tmp_path / "result.json").read_text())
    assert (facts["file"], facts["events"], facts["files"]) == (str(output), 10, 3)
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.glob("run_*.h5"))
    # The folder can be moved: the parts are named relative to the file.
    moved = tmp_path / "moved"
    folder.rename(moved)
    with h5py.File(moved / "run.h5") as file:
        assert file["data/number"][:].tolist() == list(range(10))
        assert file["data/image"][:, 0, 0].tolist() == [0] * 5 + [5] * 2 + [7] * 3
        assert file["data/image"].is_virtual


def test_parts_that_differ_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CollectError, match="has the engine written any"):
        collect(tmp_path, tmp_path / "run.h5")
    part(tmp_path / "r0_0.h5", 0, 2)
    part(tmp_path / "r0_1.h5", 2, 2, extra=np.arange(2))
    with pytest.raises(CollectError, match=r"r0_1.h5: extra is"):
        collect(tmp_path, tmp_path / "run.h5")
    (tmp_path / "r0_1.h5").write_bytes(b"half a file")
    with pytest.raises(CollectError, match=r"r0_1.h5: not a complete HDF5 file"):
        collect(tmp_path, tmp_path / "run.h5")
    part(tmp_path / "r0_1.h5", 2, 2, single=np.float64(3))
    told = CliRunner().invoke(app, [str(tmp_path), "--output", str(tmp_path / "run.h5")])
    assert told.exit_code == 1
    assert "use a BatchProcessingPipeline" in told.output
    assert not (tmp_path / "run.h5").exists()
