"""Pipelines that reduce: crop, bin, mask, zero suppression, hit filter, feature extraction, electron counting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lclstreamer import config, models, pipeline_models
from lclstreamer.engine import Engine
from lclstreamer.errors import ComponentError, ConfigurationError
from lclstreamer.events import Channels, Event, Ragged, RunInfo
from lclstreamer.pipelines.base import Chain, make_chain
from lclstreamer.pipelines.fex import parabola, rise
from lclstreamer.pipelines.hits import count_peaks
from lclstreamer.serializers.base import SerializerContext
from lclstreamer.serializers.hdf5 import HDF5BinarySerializer


def chain(kind: str, **options: Any) -> Chain:
    return make_chain([getattr(pipeline_models, kind)(type=kind, data_source="a", **options)])


def through(pipelines: Chain, *values: Any) -> list[Any]:
    return [
        event.values["a"]
        for index, value in enumerate(values)
        for event in pipelines.process(Event({"a": value}, index))
    ]


IMAGE = np.arange(60, dtype=np.uint16).reshape(1, 6, 10)


def test_crop_keeps_rows_and_columns_of_every_segment() -> None:
    (found,) = through(chain("CropPipeline", rows=[1, 4], columns=[2, 9]), IMAGE)
    assert np.array_equal(found, IMAGE[:, 1:4, 2:9])
    assert found.dtype == np.uint16


@pytest.mark.parametrize("rows", [[0, 7], [3, 8]])
def test_a_crop_outside_the_image_is_an_error(rows: list[int]) -> None:
    with pytest.raises(ComponentError, match="6 rows and 10 columns"):
        through(chain("CropPipeline", rows=rows, columns=[0, 5]), IMAGE)


def test_bins_are_summed_without_overflow_or_averaged() -> None:
    bright = np.full((5, 8), 60_000, np.uint16)
    (total,) = through(chain("BinningPipeline", rows=2, columns=4), bright)
    assert total.tolist() == [[480_000, 480_000], [480_000, 480_000]]
    (mean,) = through(chain("BinningPipeline", rows=2, columns=4, operation="mean"), bright)
    assert (mean.dtype, mean.tolist()) == (np.float32, [[60_000.0] * 2] * 2)


def test_masked_pixels_get_the_value_and_the_dtype_stays(tmp_path: Path) -> None:
    mask = np.zeros((6, 10), np.uint8)
    mask[2, 3] = 1
    np.save(tmp_path / "mask.npy", mask)
    (found,) = through(chain("MaskPipeline", mask=tmp_path / "mask.npy", value=7), IMAGE)
    assert found[0, 2, 3] == 7
    assert found.dtype == np.uint16
    found[0, 2, 3] = IMAGE[0, 2, 3]
    assert np.array_equal(found, IMAGE)


def test_a_mask_that_does_not_fit_or_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"mask\.npy cannot be read"):
        chain("MaskPipeline", mask=tmp_path / "mask.npy")
    np.save(tmp_path / "mask.npy", np.zeros((3, 3)))
    with pytest.raises(ComponentError, match=r"has the shape \(3, 3\)"):
        through(chain("MaskPipeline", mask=tmp_path / "mask.npy"), IMAGE)


def test_what_is_below_the_threshold_is_suppressed() -> None:
    (found,) = through(chain("ThresholdPipeline", threshold=50), IMAGE)
    assert np.count_nonzero(found) == 10
    assert found.dtype == np.uint16


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (-1.0, "uint16"),
        (np.nan, "uint16"),
        (np.inf, "int32"),
        (65536.0, ">u2"),
        (2.0**63, "int64"),
        (1e39, "float32"),
        (7e4, "float16"),
    ],
)
@pytest.mark.parametrize("kind", ["MaskPipeline", "ThresholdPipeline"])
def test_a_value_that_the_images_type_cannot_hold_is_an_error_that_names_both(
    kind: str, value: float, dtype: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "mask.npy", np.eye(3))
    options = {"mask": tmp_path / "mask.npy"} if kind == "MaskPipeline" else {"threshold": 3}
    name = np.dtype(dtype).name
    with pytest.raises(ComponentError, match=rf"{kind}: value {re.escape(str(value))} .* a is {name}"):
        through(chain(kind, value=value, **options), np.ones((3, 3), dtype))


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, "float32"), (np.inf, "float16"), (-1.0, "int8"), (65535.0, ">u2")]
)
def test_a_value_that_the_images_type_holds_is_put_in(value: float, dtype: str) -> None:
    (found,) = through(chain("ThresholdPipeline", threshold=3, value=value), np.ones((3, 3), dtype))
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(found, np.full((3, 3), value), equal_nan=True)


@pytest.mark.parametrize("kind", ["CropPipeline", "ThresholdPipeline"])
def test_missing_values_stay_missing(kind: str) -> None:
    options = {"rows": [0, 1], "columns": [0, 1]} if kind == "CropPipeline" else {"threshold": 1}
    assert through(chain(kind, **options), None) == [None]


def peaks(*places: tuple[int, int]) -> np.ndarray[Any, Any]:
    image = np.zeros((20, 30))
    for row, column in places:
        image[row, column] += 100
        image[row, column + 1] += 40
    return image


def test_peaks_are_counted_once_also_with_flat_tops() -> None:
    assert count_peaks(peaks((5, 5), (10, 20), (15, 8)), 50) == 3
    flat = np.zeros((9, 9))
    flat[3:6, 3:6] = 10
    assert count_peaks(flat, 5) == 1
    assert count_peaks(np.zeros((9, 9)), 5) == 0


def test_only_hits_are_kept_and_both_are_counted() -> None:
    pipelines = chain("HitFilterPipeline", minimum_peaks=2, peak_threshold=50)
    kept = through(pipelines, peaks((5, 5)), peaks((5, 5), (10, 20)), None, peaks((3, 3), (9, 9), (15, 15)))
    assert len(kept) == 2
    assert pipelines.report() == {"hits": 2, "misses": 2}


def test_the_region_decides() -> None:
    pipelines = chain("HitFilterPipeline", minimum_sum=100, rows=[0, 10], columns=[0, 10])
    assert len(through(pipelines, peaks((5, 5)), peaks((15, 5)), peaks((5, 20)))) == 1


# ---------------------------------------------------------------------------------------------------------------- FEX


def pulse(length: int, *tops: tuple[float, float], level: float = 100.0) -> np.ndarray[Any, Any]:
    samples = np.arange(length)
    return np.full(length, level) + sum(
        height * np.exp(-0.5 * ((samples - place) / 3.0) ** 2) for place, height in tops
    )


def features(value: Any, **options: Any) -> dict[str, Any]:
    (event,) = chain("FexPipeline", **options).process(Event({"a": value, "other": 1}, 0))
    assert "a" not in event.values
    return {name: one.values for name, one in event.values.items() if isinstance(one, Ragged)}


def test_raw_waveforms_of_channels_of_different_length_are_one_after_the_other() -> None:
    first, second = np.arange(5, dtype=np.uint16), np.arange(3, dtype=np.uint16)
    found = features(Channels((first, second), (0, 4)), form="waveform")
    assert found["a_samples"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert found["a_samples"].dtype == np.uint16
    assert found["a_lengths"].tolist() == [5, 3]
    assert found["a_channels"].tolist() == [0, 4]


def test_pieces_above_the_threshold_are_cut_out_with_their_first_sample() -> None:
    waveform = np.full((2, 40), 10, np.int16)
    waveform[0, 8:11] = 50
    waveform[0, 30:32] = 60
    waveform[1, 0:3] = 70
    found = features(waveform, form="pieces", threshold=20, margin=1)
    assert found["a_starts"].tolist() == [7, 29, 0]
    assert found["a_lengths"].tolist() == [5, 4, 4]
    assert found["a_channels"].tolist() == [0, 0, 1]
    assert found["a_samples"].tolist() == [10, 50, 50, 50, 10, 10, 60, 60, 10, 70, 70, 70, 10]


@pytest.mark.parametrize("polarity", ["positive", "negative"])
def test_arrival_times_are_finer_than_a_sample(polarity: str) -> None:
    waveform = pulse(200, (60.3, 500.0), (141.7, 300.0))
    if polarity == "negative":
        waveform = 200 - waveform
    found = features(waveform, form="times", threshold=50, polarity=polarity, sample_period=0.25)
    assert found["a_times"] == pytest.approx([60.3 * 0.25, 141.7 * 0.25], abs=0.02)
    assert found["a_heights"] == pytest.approx([500, 300], rel=0.01)
    assert found["a_channels"].tolist() == [0, 0]


def test_the_edge_is_where_the_rise_reaches_the_fraction() -> None:
    waveform = np.zeros(30)
    waveform[10:15] = [0, 25, 50, 75, 100]
    waveform[15:] = 0
    found = features(waveform, form="times", threshold=10, time="edge", fraction=0.5, baseline=0.0)
    height = parabola(waveform, 14)[1]
    assert found["a_times"] == pytest.approx([10 + 0.5 * height / 25])
    assert rise(np.array([5.0, 6.0]), 1, 2.0) == 0.0


def test_what_is_too_narrow_is_left_out() -> None:
    waveform = np.zeros(30)
    waveform[5] = waveform[20:24] = 100
    assert features(waveform, form="pieces", threshold=10, minimum_width=2, baseline=0.0)["a_starts"].tolist() == [20]


def test_a_value_that_is_no_waveform_is_an_error() -> None:
    with pytest.raises(ComponentError, match=r"\(samples,\) or \(channels, samples\)"):
        features(np.zeros((2, 2, 2)), form="waveform")


def test_features_of_a_batch_are_stored_with_offsets(datasets: Any) -> None:
    pipelines = chain("FexPipeline", form="times", threshold=50)
    settings = models.HDF5BinarySerializer(
        type="HDF5BinarySerializer", fields={"a_times": "/tof", "a_channels": "/channel"}, compression="gzip"
    )
    writer = HDF5BinarySerializer(settings, SerializerContext(batch_size=4))
    waveforms = [pulse(100, (30, 200)), pulse(100), pulse(100, (20, 200), (50, 200), (80, 200)), None]
    for index, waveform in enumerate(waveforms):
        for event in pipelines.process(Event({"a": waveform}, index)):
            assert not list(writer.add(event))
    (message,) = writer.end_batch()
    found = datasets(bytes(message))
    assert found["/tof_offsets"].tolist() == [0, 1, 1, 4, 4]
    assert found["/tof"] == pytest.approx([30, 20, 50, 80], abs=0.01)
    assert found["/tof_missing"].tolist() == [0, 0, 0, 1]
    assert found["/channel"].dtype == np.uint16


def test_the_real_hsd_run_gives_its_pulses(real_run: Any, tmp_path: Path, datasets: Any) -> None:
    path = real_run("tmolv9418-r0175-hsd.xtc2")
    content = {
        "source_identifier": f"files={path}",
        "skip_incomplete_events": False,
        "event_source": {"type": "Psana2EventSource"},
        "data_sources": {"hsd": {"type": "Psana2Waveforms", "psana_name": "hsd"}},
        "processing_pipeline": [
            {"type": "FexPipeline", "data_source": "hsd", "form": "pieces", "threshold": 5},
            {"type": "BatchProcessingPipeline", "batch_size": 10},
        ],
        "data_serializer": {
            "type": "HDF5BinarySerializer",
            "fields": {"hsd_samples": "/s", "hsd_starts": "/at", "hsd_lengths": "/n", "hsd_channels": "/c"},
        },
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(tmp_path)}],
    }
    engine = Engine(config.from_mapping(content))
    engine.open()
    assert engine.run().events == 10
    found = datasets((tmp_path / "r0_0.h5").read_bytes())
    assert len(found["/at_offsets"]) == 11
    assert found["/n"].sum() == len(found["/s"]) > 0


# ----------------------------------------------------------------------------------------------------------- counting


def electrons(shape: tuple[int, int], *places: tuple[int, int]) -> np.ndarray[Any, Any]:
    image = np.zeros(shape, np.uint16)
    for row, column in places:
        image[row, column] = 100
    return image


COUNTING = {"background_threshold": 20, "xray_threshold": 2000}


def test_electrons_are_counted_where_they_hit() -> None:
    pytest.importorskip("stempy")
    pipelines = chain("ElectronCountingPipeline", **COUNTING)
    frame = electrons((16, 16), (3, 4), (10, 12))
    frame[7, 7] = 5000
    (event,) = pipelines.process(Event({"a": frame}, 9))
    assert sorted(event.values["a_electrons"].values.tolist()) == [3 * 16 + 4, 10 * 16 + 12]
    assert (int(event.values["a_frame"]), int(event.values["a_sectors"])) == (9, 1)
    assert pipelines.report() == {"frames": 1, "incomplete frames": 0, "electrons": 2, "sectors without a frame": 0}


def test_frames_are_put_together_from_sectors_and_incomplete_ones_are_counted_last() -> None:
    pytest.importorskip("stempy")
    pipelines = chain("ElectronCountingPipeline", sectors=2, frame_number="frame", sector_number="sector", **COUNTING)
    sent = [
        (7, 1, electrons((8, 16), (2, 5))),
        (8, 0, electrons((8, 16), (4, 4))),
        (7, 0, electrons((8, 16), (6, 6))),
    ]
    out = [
        event
        for index, (frame, sector, image) in enumerate(sent)
        for event in pipelines.process(Event({"a": image, "frame": np.array(frame), "sector": np.array(sector)}, index))
    ]
    out += list(pipelines.finish())
    assert [(int(one.values["a_frame"]), int(one.values["a_sectors"])) for one in out] == [(7, 2), (8, 1)]
    assert sorted(out[0].values["a_electrons"].values.tolist()) == [6 * 16 + 6, (8 + 2) * 16 + 5]
    assert out[1].values["a_electrons"].values.tolist() == [4 * 16 + 4]
    assert pipelines.report()["incomplete frames"] == 1


def sector(frame: int | None, number: int | None) -> dict[str, Any]:
    """An event of the sector of a frame."""
    values = {"a": electrons((8, 16), (1, 1)), "frame": frame, "sector": number}
    return {name: value if value is None else np.asarray(value) for name, value in values.items()}


def test_frames_that_lost_a_sector_are_counted_when_so_many_newer_ones_are_open() -> None:
    pytest.importorskip("stempy")
    options = {"sectors": 2, "frame_number": "frame", "sector_number": "sector", "maximum_open_frames": 3, **COUNTING}
    pipelines = chain("ElectronCountingPipeline", **options)
    (counting,) = pipelines.pipelines
    out = []
    for index, (frame, number) in enumerate([(5, 0), (6, 0), (6, 1), (9, 0), (7, 1), (8, 0), (10, 0), (9, 1), (11, 1)]):
        out.append([int(one.values["a_frame"]) for one in pipelines.process(Event(sector(frame, number), index))])
        assert len(counting._open) <= 3  # type: ignore[attr-defined]
    assert out == [[], [], [6], [], [], [5], [9], [], [7]]
    last = [(int(one.values["a_frame"]), int(one.values["a_sectors"])) for one in pipelines.finish()]
    assert last == [(8, 1), (10, 1), (11, 1)]
    assert pipelines.report()["incomplete frames"] == 6
    assert pipelines.report()["sectors without a frame"] == 1


def test_frames_of_the_next_run_are_others_and_what_waits_is_copied() -> None:
    pytest.importorskip("stempy")
    pipelines = chain("ElectronCountingPipeline", sectors=2, frame_number="frame", sector_number="sector", **COUNTING)
    energy = np.zeros(1)
    for run in (1, 2):
        energy[:] = run
        assert not list(pipelines.process(Event(sector(7, 0) | {"energy": energy}, run, RunInfo("x", run))))
    found = [(one.run.run, int(one.values["a_frame"]), one.values["energy"].tolist()) for one in pipelines.finish()]
    assert found == [(1, 7, [1]), (2, 7, [2])]


def test_a_sector_of_a_frame_that_was_counted_without_it_is_left_out_and_counted() -> None:
    pytest.importorskip("stempy")
    options = {"sectors": 2, "frame_number": "frame", "sector_number": "sector", "maximum_open_frames": 1, **COUNTING}
    pipelines = chain("ElectronCountingPipeline", **options)
    out = []
    for index, (frame, number) in enumerate([(1, 0), (2, 0), (1, 1), (2, 1)]):
        out += [int(one.values["a_frame"]) for one in pipelines.process(Event(sector(frame, number), index))]
    out += [int(one.values["a_frame"]) for one in pipelines.finish()]
    assert out == [1, 2]
    assert pipelines.report() | {"electrons": 0} == {
        "frames": 2,
        "incomplete frames": 1,
        "electrons": 0,
        "sectors without a frame": 1,
    }


@pytest.mark.parametrize(("frame", "number"), [(None, 0), (1, None), (None, None)])
def test_a_sector_without_its_numbers_is_left_out_and_counted(frame: int | None, number: int | None) -> None:
    pytest.importorskip("stempy")
    pipelines = chain("ElectronCountingPipeline", sectors=2, frame_number="frame", sector_number="sector", **COUNTING)
    assert not list(pipelines.process(Event(sector(frame, number), 0)))
    assert not list(pipelines.finish())
    assert pipelines.report()["sectors without a frame"] == 1


def test_a_sector_that_comes_twice_is_an_error() -> None:
    pytest.importorskip("stempy")
    pipelines = chain("ElectronCountingPipeline", sectors=2, frame_number="frame", sector_number="sector", **COUNTING)
    values = {"a": electrons((8, 16)), "frame": np.array(1), "sector": np.array(0)}
    list(pipelines.process(Event(dict(values), 0)))
    with pytest.raises(ComponentError, match="sector 0 of frame 1 came twice"):
        list(pipelines.process(Event(dict(values), 1)))


def test_the_dark_reference_is_subtracted(tmp_path: Path) -> None:
    pytest.importorskip("stempy")
    np.save(tmp_path / "dark.npy", np.full((16, 16), 90.0))
    pipelines = chain("ElectronCountingPipeline", dark_reference=tmp_path / "dark.npy", **COUNTING)
    frame = electrons((16, 16), (3, 4)) + np.uint16(90)
    (event,) = pipelines.process(Event({"a": frame}, 0))
    assert event.values["a_electrons"].values.tolist() == [3 * 16 + 4]


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        (
            {"type": "CropPipeline", "data_source": "randm", "rows": [0, 1], "columns": [0, 1]},
            "'randm' is no data source",
        ),
        ({"type": "CropPipeline", "data_source": "random", "rows": [3, 1], "columns": [0, 1]}, "a range is"),
        ({"type": "HitFilterPipeline", "data_source": "random"}, "minimum_peaks or minimum_sum is needed"),
        ({"type": "HitFilterPipeline", "data_source": "random", "minimum_peaks": 3}, "belong together"),
        ({"type": "FexPipeline", "data_source": "random", "form": "times"}, "threshold is needed"),
        (
            {"type": "ElectronCountingPipeline", "data_source": "random", "sectors": 4, **COUNTING},
            "frame_number and sector_number",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_at_start(
    internal: dict[str, Any], pipeline: dict[str, Any], expected: str
) -> None:
    internal["processing_pipeline"] = [pipeline, internal["processing_pipeline"]]
    with pytest.raises(ConfigurationError, match=expected):
        config.from_mapping(internal)


def test_pipelines_of_a_list_are_applied_in_order(internal: dict[str, Any], tmp_path: Path, datasets: Any) -> None:
    internal["processing_pipeline"] = [
        {"type": "CropPipeline", "data_source": "random", "rows": [0, 4], "columns": [0, 2]},
        {"type": "BinningPipeline", "data_source": "random", "rows": 2, "columns": 2},
        {"type": "BatchProcessingPipeline", "batch_size": 5},
    ]
    internal["data_handlers"][0]["write_directory"] = str(tmp_path)
    engine = Engine(config.from_mapping(internal))
    engine.open()
    engine.run()
    assert datasets((tmp_path / "r0_0.h5").read_bytes())["/data/random"].shape == (5, 2, 1)
