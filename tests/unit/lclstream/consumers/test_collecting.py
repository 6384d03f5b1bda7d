from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from lclstream.client.batch import Batch
from lclstream.consumers.collecting import CollectError, app, collect
from lclstreamer import models
from lclstreamer.events import Event, Ragged, RunInfo
from lclstreamer.serializers.base import SerializerContext
from lclstreamer.serializers.hdf5 import HDF5BinarySerializer

START_NS = 1_700_000_000_123_456_789


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
    with pytest.raises(CollectError, match=r"r0_0.h5: extra is not there, in r0_1.h5 it is"):
        collect(tmp_path, tmp_path / "run.h5")
    (tmp_path / "r0_1.h5").write_bytes(b"half a file")
    with pytest.raises(CollectError, match=r"r0_1.h5: not a complete HDF5 file"):
        collect(tmp_path, tmp_path / "run.h5")
    part(tmp_path / "r0_1.h5", 2, 2, single=np.float64(3))
    told = CliRunner().invoke(app, [str(tmp_path), "--output", str(tmp_path / "run.h5")])
    assert told.exit_code == 1
    assert "use a BatchProcessingPipeline" in told.output
    assert not (tmp_path / "run.h5").exists()


def engine_parts(folder: Path, fields: dict[str, str], *parts: list[dict[str, Any]], **options: Any) -> None:
    """A file for each list of events, as one rank of the engine writes them."""
    context = SerializerContext("exp=mfx100,run=7", "ab" * 32, "1.0", 0, 1, frozenset({"timestamp"}))
    settings = models.HDF5BinarySerializer(
        type="HDF5BinarySerializer", fields=fields, **{"compression": None} | options
    )
    writer = HDF5BinarySerializer(settings, context)
    count = 0
    for number, events in enumerate(parts):
        made: list[Any] = []
        for values in events:
            made += writer.add(Event(values, count, RunInfo("mfx100", 7), START_NS + count))
            count += 1
        made += writer.end_batch()
        (message,) = made
        (folder / f"p_r0_{number}.h5").write_bytes(bytes(message))
        message.release()
    writer.close()


def collected(folder: Path) -> tuple[Batch, dict[str, Any]]:
    """What is in the one file, to be read as a message is, and what the command tells of it."""
    facts = collect(folder, folder / "all.h5", prefix="p_")
    arrays: dict[str, Any] = {}
    about: dict[str, dict[str, Any]] = {}

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[f"/{name}"] = item.asstr()[:] if h5py.check_string_dtype(item.dtype) else item[:]
            about[f"/{name}"] = dict(item.attrs)

    with h5py.File(folder / "all.h5") as file:
        attributes = dict(file.attrs)
        file.visititems(take)
    return Batch(arrays, attributes, about), facts


def read(batch: Batch, path: str) -> list[Any]:
    """The value of each event, as the engine was given it."""
    values = [batch.value(path, event) for event in range(batch.events)]
    return [value.tolist() if isinstance(value, np.ndarray | np.generic) else value for value in values]


def test_a_value_that_is_missing_from_the_second_file_on_is_missing_there_alone(tmp_path: Path) -> None:
    given = [np.array(1.5), np.array(2.5), None, np.array(4.5)]
    engine_parts(tmp_path, {"x": "/data/x"}, [{"x": one} for one in given[:2]], [{"x": one} for one in given[2:]])
    batch, facts = collected(tmp_path)
    assert facts["events"] == batch.events == 4
    assert read(batch, "/data/x") == [1.5, 2.5, None, 4.5]


def test_strings_that_get_longer_are_kept_whole(tmp_path: Path) -> None:
    engine_parts(tmp_path, {"s": "/s"}, [{"s": np.array("ab")}], [{"s": np.array("Ωabc")}, {"s": np.array("")}])
    assert read(collected(tmp_path)[0], "/s") == ["ab", "Ωabc", ""]


def test_events_of_different_lengths_keep_their_elements_over_all_files(tmp_path: Path) -> None:
    given: list[list[int] | None] = [[1], [2, 3], [], [4, 5, 6], None, [7]]
    events = [{"r": None if one is None else Ragged(np.array(one, np.int32)), "n": np.array(3)} for one in given]
    engine_parts(tmp_path, {"r": "/data/hits", "n": "/n"}, events[:2], events[2:3], events[3:5], events[5:])
    batch, facts = collected(tmp_path)
    assert batch["/data/hits_offsets"].tolist() == [0, 1, 3, 3, 6, 6, 7]
    assert batch["/data/hits_offsets"].dtype == np.uint64
    assert facts["events"] == batch.events == 6
    assert read(batch, "/data/hits") == given


def test_a_run_without_a_single_element_is_collected(tmp_path: Path) -> None:
    engine_parts(tmp_path, {"r": "/r"}, [{"r": Ragged(np.empty(0))}], [{"r": Ragged(np.empty(0))}] * 2)
    batch, facts = collected(tmp_path)
    assert facts["events"] == 3
    assert read(batch, "/r") == [[], [], []]


@pytest.mark.parametrize("absent", [0, 1])
def test_a_data_source_that_gave_nothing_for_a_whole_file_is_missing_in_its_events(tmp_path: Path, absent: int) -> None:
    full = {
        "n": np.array(1),
        "f": np.array([1.5, 2.5], np.float32),
        "i": np.array(7),
        "u": np.array(8, np.uint8),
        "s": np.array("word"),
        "r": Ragged(np.array([1, 2])),
    }
    never = {"z": None}
    nothing = {name: one if name == "n" else None for name, one in full.items()}
    fields = {name: f"/data/{name}" for name in full | never}
    parts = [[full | never] * 2, [full | never]]
    parts[absent] = [nothing | never] * len(parts[absent])
    engine_parts(tmp_path, fields, *parts)
    batch, facts = collected(tmp_path)
    assert facts["events"] == batch.events == 3
    present = [absent != 0, absent != 0, absent != 1]
    for name, value in (("f", [1.5, 2.5]), ("i", 7), ("u", 8), ("s", "word"), ("r", [1, 2])):
        assert read(batch, f"/data/{name}") == [value if there else None for there in present]
    filled = present.index(False)
    assert np.isnan(batch["/data/f"][filled]).all()
    assert (batch["/data/i"][filled], batch["/data/u"][filled], batch["/data/s"][filled]) == (-999, 0, "")
    assert list(batch.attributes["missing"]) == ["z"]


def test_what_all_files_say_of_the_run_and_of_their_datasets_is_in_the_one_file(tmp_path: Path) -> None:
    values = {"timestamp": np.array(1.0), "image": np.ones((16, 16), np.float32)}
    fields = {"timestamp": "/t", "image": "/image"}
    engine_parts(tmp_path, fields, [values] * 2, [values], compression="zfp", zfp_accuracy=0.5)
    batch, _ = collected(tmp_path)
    assert (batch.attributes["experiment"], batch.attributes["run"]) == ("mfx100", 7)
    assert batch.attributes["configuration_sha256"] == "ab" * 32
    assert "sequence" not in batch.attributes
    assert batch.field_attributes["/image"] == {"max_absolute_error": 0.5}
    assert batch.field_attributes["/t_ns"] == {"epoch": "1970-01-01T00:00:00Z", "units": "ns"}
    assert batch["/t_ns"].tolist() == [START_NS, START_NS + 1, START_NS + 2]


def test_a_dataset_that_is_ragged_in_one_file_only_is_refused(tmp_path: Path) -> None:
    engine_parts(tmp_path, {"r": "/r"}, [{"r": Ragged(np.arange(3))}], [{"r": np.array(3)}])
    with pytest.raises(CollectError, match=r"p_r0_1.h5: r is of one value an event, in p_r0_0.h5 it is ragged"):
        collect(tmp_path, tmp_path / "all.h5", prefix="p_")


def test_datasets_of_a_file_that_have_different_numbers_of_events_are_refused(tmp_path: Path) -> None:
    part(tmp_path / "r0_0.h5", 0, 2, extra=np.arange(3))
    with pytest.raises(CollectError, match=r"r0_0.h5: the datasets .* different numbers of events"):
        collect(tmp_path, tmp_path / "run.h5")
