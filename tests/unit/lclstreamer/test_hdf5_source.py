"""Archived runs in HDF5 files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest

from lclstreamer import config, models
from lclstreamer.engine import Engine
from lclstreamer.errors import SourceError
from lclstreamer.events import Event
from lclstreamer.sources.base import SourceContext
from lclstreamer.sources.hdf5 import HDF5EventSource


def dataset(path: str, **options: Any) -> models.HDF5Dataset:
    return models.HDF5Dataset(type="HDF5Dataset", path=path, **options)


def timestamp(path: str, **options: Any) -> models.HDF5Timestamp:
    return models.HDF5Timestamp(type="HDF5Timestamp", path=path, **options)


def read(
    identifier: str, sources: dict[str, Any], rank: int = 0, size: int = 1, limit: int | None = None, **options: Any
) -> list[Event]:
    source = HDF5EventSource(
        models.HDF5EventSource(type="HDF5EventSource", **options),
        SourceContext(identifier, sources, rank, size, limit),
    )
    source.open()
    try:
        return list(source.events())
    finally:
        source.close()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two files of 7 and 5 events in the NeXus way, compressed in chunks of three events."""
    start = 0
    for name, count in (("run_000.nxs", 7), ("run_001.nxs", 5)):
        with h5py.File(tmp_path / name, "w") as file:
            file.attrs["experiment"], file.attrs["run"] = "mfx100", 12
            images = np.arange(start, start + count, dtype=np.uint16)[:, None, None] * np.ones((4, 5), np.uint16)
            file.create_dataset("entry/data/data", data=images, chunks=(3, 4, 5), **hdf5plugin.Bitshuffle())
            file["entry/time"] = np.arange(start, start + count) * 8_333_333
            file["entry/label"] = [f"shot-{number}".encode() for number in range(start, start + count)]
            file["entry/energy"] = np.linspace(1, 2, count, dtype=np.float32)
            file["entry/energy_missing"] = (np.arange(count) == 2).astype(np.uint8)
        start += count
    return tmp_path


SOURCES = {
    "image": dataset("/entry/data/data"),
    "wide": dataset("entry/data/data", dtype="float64"),
    "label": dataset("/entry/label"),
    "energy": dataset("/entry/energy"),
    "time": timestamp("/entry/time", epoch=1000.0),
}


@pytest.mark.parametrize("text", ["{}", "{}/run_*.nxs", "{0}/run_000.nxs;{0}/run_001.nxs"])
def test_rows_of_all_files_are_events_in_order(archive: Path, text: str) -> None:
    events = read("files=" + text.format(archive), SOURCES)
    assert [int(event.values["image"][0, 0]) for event in events] == list(range(12))
    assert events[3].values["image"].dtype == np.uint16
    assert events[3].values["wide"].dtype == np.float64
    assert str(events[8].values["label"]) == "shot-8"
    assert events[8].timestamp_ns == 8 * 8_333_333 + 1_000_000_000_000
    assert (events[0].run.experiment, events[0].run.run) == ("mfx100", 12)
    assert [event.values["energy"] is None for event in events[:4]] == [False, False, True, False]


@pytest.mark.parametrize(("size", "limit"), [(2, None), (5, None), (3, 9)])
def test_ranks_together_read_every_row_once(archive: Path, size: int, limit: int | None) -> None:
    found = [event.index for rank in range(size) for event in read(f"files={archive}", SOURCES, rank, size, limit)]
    assert sorted(found) == list(range(limit or 12))


def test_experiment_and_run_may_be_given(archive: Path) -> None:
    events = read(f"files={archive}", SOURCES, experiment="other", run=3)
    assert (events[0].run.experiment, events[0].run.run) == ("other", 3)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"x": dataset("/entry/data/dat")}, "has no dataset '/entry/data/dat' .*did you mean /entry/data/data"),
        ({"x": dataset("/entry")}, "has no dataset '/entry'"),
        ({"x": models.IntValue(type="IntValue", value=1)}, "at least one HDF5Dataset"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(archive: Path, sources: dict[str, Any], expected: str) -> None:
    with pytest.raises(SourceError, match=expected):
        read(f"files={archive}", sources)


def test_datasets_of_different_lengths_are_refused(archive: Path) -> None:
    with h5py.File(archive / "run_000.nxs", "a") as file:
        file["entry/short"] = np.arange(3)
    with pytest.raises(SourceError, match="different numbers of rows: image 7, short 3"):
        read(f"files={archive}", {"image": SOURCES["image"], "short": dataset("/entry/short")})


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no file"):
        read(f"files={tmp_path}", SOURCES)
    (tmp_path / "a.h5").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="cannot be read as HDF5"):
        read(f"files={tmp_path}", SOURCES)


def test_what_the_engine_wrote_can_be_streamed_again(internal: dict[str, Any], tmp_path: Path, datasets: Any) -> None:
    internal["data_handlers"][0]["write_directory"] = str(tmp_path / "first")
    engine = Engine(config.from_mapping(internal))
    engine.open()
    engine.run()
    internal |= {"source_identifier": f"files={tmp_path}/first", "event_source": {"type": "HDF5EventSource"}}
    internal["data_sources"] = {
        "random": {"type": "HDF5Dataset", "path": "/data/random"},
        "number": {"type": "HDF5Dataset", "path": "/data/number"},
    }
    internal["data_handlers"][0]["write_directory"] = str(tmp_path / "second")
    engine = Engine(config.from_mapping(internal))
    engine.open()
    assert engine.run().events == 25
    for name in ("r0_0.h5", "r0_2.h5"):
        before, after = (datasets((tmp_path / folder / name).read_bytes()) for folder in ("first", "second"))
        assert np.array_equal(before["/data/random"], after["/data/random"])


def stream(folder: Path, out: Path, sources: dict[str, Any], *, batch: int = 10, skip: bool = False) -> list[bytes]:
    """The messages that the engine makes of the files in a folder, every data source at `/NAME`."""
    content = {
        "source_identifier": f"files={folder}",
        "skip_incomplete_events": skip,
        "event_source": {"type": "HDF5EventSource"},
        "data_sources": {name: one.model_dump() for name, one in sources.items()},
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": batch},
        "data_serializer": {"type": "HDF5BinarySerializer", "fields": {name: f"/{name}" for name in sources}},
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(out)}],
    }
    engine = Engine(config.from_mapping(content))
    engine.open()
    engine.run()
    return [(out / f"r0_{number}.h5").read_bytes() for number in range(len(list(out.iterdir())))]


@pytest.fixture
def two_clocks(tmp_path: Path) -> Path:
    """Four rows with two times each, of which the second row lacks the first time, and the third row the second."""
    folder = tmp_path / "clocks"
    folder.mkdir()
    with h5py.File(folder / "a.h5", "w") as file:
        file["x"] = np.arange(4)
        file["t"] = 1_700_000_000_000_000_001 + np.arange(4)
        file["t_missing"] = np.array([0, 1, 0, 0], np.uint8)
        file["camera"] = np.array([1.5, 2.5, np.nan, 4.5])
    return folder


CLOCKS = {"t": timestamp("/t"), "camera": timestamp("/camera", unit="s"), "x": dataset("/x")}


def test_a_time_marked_as_missing_is_missing_and_not_1970(two_clocks: Path) -> None:
    events = read(f"files={two_clocks}", CLOCKS)
    assert [event.values["t"] is None for event in events] == [False, True, False, False]
    assert [event.values["camera"] is None for event in events] == [False, False, True, False]
    assert [event.timestamp_ns for event in events] == [
        1_700_000_000_000_000_001,
        None,
        1_700_000_000_000_000_003,
        1_700_000_000_000_000_004,
    ]


def test_events_without_their_time_are_left_out_when_incomplete_ones_are(
    two_clocks: Path, tmp_path: Path, datasets: Any
) -> None:
    (message,) = stream(two_clocks, tmp_path / "out", CLOCKS, skip=True)
    assert datasets(message)["/x"].tolist() == [0, 3]


def test_every_time_keeps_its_own_nanoseconds_and_what_is_missing_is_marked(
    two_clocks: Path, tmp_path: Path, datasets: Any
) -> None:
    (message,) = stream(two_clocks, tmp_path / "out", CLOCKS)
    found = datasets(message)
    start = 1_700_000_000_000_000_001
    assert found["/t_ns"].tolist() == [start, -999, start + 2, start + 3]
    assert found["/t_missing"].tolist() == [0, 1, 0, 0]
    assert found["/camera_ns"].tolist() == [1_500_000_000, 2_500_000_000, -999, 4_500_000_000]
    assert found["/camera_missing"].tolist() == [0, 0, 1, 0]
    again = read(f"files={tmp_path / 'out'}", {"t": timestamp("/t_ns"), "camera": timestamp("/camera_ns")})
    assert [event.timestamp_ns for event in again] == [start, None, start + 2, start + 3]
    assert [event.times["camera"] for event in again] == [1_500_000_000, 2_500_000_000, None, 4_500_000_000]


def test_an_experiment_of_a_fixed_length_is_its_text(archive: Path) -> None:
    with h5py.File(archive / "run_000.nxs", "a") as file:
        file.attrs["experiment"] = np.bytes_(b"mfx1")
    assert read(f"files={archive}", SOURCES)[0].run.experiment == "mfx1"


@pytest.fixture
def gaps(tmp_path: Path) -> Path:
    """Six rows of which the engine made three messages: the first lacks `a`, the second all, the third nothing."""
    folder = tmp_path / "gaps"
    folder.mkdir()
    with h5py.File(folder / "a.h5", "w") as file:
        file["a"], file["b"] = np.arange(6), np.arange(6) / 2
        file["t"] = 1000 + np.arange(6)
        file["a_missing"] = np.array([1, 1, 1, 1, 0, 0], np.uint8)
        file["b_missing"] = np.array([0, 0, 1, 1, 0, 0], np.uint8)
    stream(folder, tmp_path / "out", {"a": dataset("/a"), "b": dataset("/b"), "t": timestamp("/t")}, batch=2)
    return tmp_path / "out"


def test_files_in_which_a_data_source_gave_nothing_are_read_with_it_missing(gaps: Path) -> None:
    events = read(f"files={gaps}", {"a": dataset("/a"), "b": dataset("/b"), "t": timestamp("/t_ns")})
    values = [{name: None if value is None else float(value) for name, value in one.values.items()} for one in events]
    assert [one["a"] for one in values] == [None, None, None, None, 4, 5]
    assert [one["b"] for one in values] == [0, 0.5, None, None, 2, 2.5]
    assert [one.timestamp_ns for one in events] == list(range(1000, 1006))


def test_rows_are_counted_also_where_no_data_source_that_is_read_gave_anything(gaps: Path) -> None:
    events = read(f"files={gaps}", {"a": dataset("/a")})
    assert [None if one.values["a"] is None else int(one.values["a"]) for one in events] == [None] * 4 + [4, 5]


def test_rows_of_values_of_another_length_in_every_event_are_counted_by_their_offsets(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["r"], file["r_offsets"] = np.arange(7), np.array([0, 3, 7], np.uint64)
        file.attrs["missing"] = ["a"]
    assert [one.values["a"] for one in read(f"files={tmp_path}", {"a": dataset("/a")})] == [None, None]


def test_a_dataset_that_is_not_there_under_another_name_is_an_error_with_the_remedy(gaps: Path) -> None:
    with pytest.raises(SourceError, match=r"has no dataset '/a'.* gave nothing for this file: a; .* call this one so"):
        read(f"files={gaps}", {"other": dataset("/a"), "b": dataset("/b")})
