"""What a run summary adds up, and the documents it writes."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from lclstream.client import MessageError, Statistics
from lclstream.client.batch import decode
from lclstream.consumers.fields import FieldError
from lclstream.consumers.run_summary import RunSummary, Settings
from lclstream.consumers.summary_figure import arranged, draw
from lclstream.consumers.summary_file import ResultDocument, ResultFile, document, write_document

SPOT = np.array([[100, 300, 100], [300, 600, 300], [100, 300, 100]], np.uint16)


class Rows:
    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}

    def append(self, rows: dict[str, np.ndarray]) -> None:
        for name, values in rows.items():
            self.rows.setdefault(name, []).extend(values.tolist())


def frames(count: int, *, seed: int = 0, shape=(1, 64, 96), peaks: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    images = random.poisson(30, (count, *shape)).astype(np.uint16)
    for image in images:
        for number in range(peaks):
            row, column = 8 + 16 * (number // 5), 10 + 16 * (number % 5)
            image[0, row - 1 : row + 2, column - 1 : column + 2] += SPOT
    return images


def fed(*messages: bytes, settings: Settings | None = None) -> tuple[RunSummary, Rows, Statistics]:
    rows, statistics = Rows(), Statistics()
    summary = RunSummary(settings or Settings(), rows)
    for message in messages:
        statistics.count(len(message))
        summary.add(decode(message), statistics.last_unix_s or 0.0)
    return summary, rows, statistics


def test_sums_maxima_peaks_hits_and_energies_are_those_of_the_events(message):
    quiet, hits = frames(6, seed=1), frames(4, seed=2, peaks=12)
    energies = np.linspace(1.0, 2.0, 10)
    summary, rows, statistics = fed(message(0, quiet, energies[:6]), message(6, hits, energies[6:]))
    images = np.concatenate([quiet, hits])
    np.testing.assert_array_equal(summary.sum_image, images.astype(np.float64).sum(axis=0))
    np.testing.assert_array_equal(summary.max_image, images.max(axis=0))
    assert rows.rows["peaks"] == [0] * 6 + [12] * 4
    result = document(summary, statistics, complete=True, reason=None)
    assert (result.events, result.events_unique, result.messages) == (10, 10, 2)
    assert (result.hits, result.hit_rate, result.peaks_total, result.peaks_mean) == (4, 0.4, 48, 4.8)
    assert result.energy_mean == pytest.approx(1.5)
    assert (result.experiment, result.run, result.image_shape) == ("mfxtest01", 12, [1, 64, 96])
    assert result.timestamps == "exact nanoseconds"
    assert (result.energy, result.energy_units, result.image_units) == ("/data/gmd", "mJ", "ADU")
    assert summary.course.entries.sum() == 10


def test_events_that_come_twice_show_in_the_unique_count(message):
    one = message(0, frames(5))
    summary, _, _ = fed(one, message(5, frames(5)), one)
    assert summary.events == 15
    assert summary.events_unique == 10


def test_gain_bits_are_masked_and_counted_when_the_detector_is_a_jungfrau(message):
    images = frames(3)
    images[:, 0, 0, 0] |= 1 << 14
    images[0, 0, 0, 1] |= 3 << 14
    summary, _, statistics = fed(message(0, images, path="/data/jungfrau"))
    np.testing.assert_array_equal(summary.sum_image, (images & 0x3FFF).astype(float).sum(axis=0))
    result = document(summary, statistics, complete=True, reason=None)
    assert result.gain_bits == "masked"
    assert result.gain_switched_pixels_mean == pytest.approx(4 / 3)
    assert "Jungfrau" in (result.gain_bits_reason or "")


def test_events_without_an_image_or_a_value_are_left_out_of_means(message):
    images = frames(4, peaks=12)
    images[1] = 0
    missing = {"/data/image_missing": np.array([0, 1, 0, 0], np.uint8)}
    summary, rows, statistics = fed(message(0, images, np.array([1.0, np.nan, 3.0, np.nan]), extra=missing))
    result = document(summary, statistics, complete=True, reason=None)
    assert rows.rows["peaks"] == [12, -1, 12, 12]
    assert (result.events, result.peaks_mean, result.hit_rate) == (4, 12, 1.0)
    assert (result.energy_mean, result.energy_events) == (2.0, 2)
    np.testing.assert_array_equal(summary.sum_image, images[[0, 2, 3]].astype(float).sum(axis=0))


def test_values_that_are_missing_are_in_no_mean_whatever_stands_for_them(message):
    extra = {"/data/count": np.array([1, -999, 3], np.int32), "/data/count_missing": np.array([0, 1, 0], np.uint8)}
    summary, rows, statistics = fed(message(0, frames(3), extra=extra), settings=Settings(scalar="/data/count"))
    result = document(summary, statistics, complete=True, reason=None)
    assert (result.energy_mean, result.energy_events) == (2.0, 2)
    assert np.isnan(rows.rows["energy"][1])


def test_what_stands_for_a_missing_image_is_not_the_brightest_of_any_pixel(message):
    images = np.full((3, 1, 64, 96), -2000, np.int16)
    images[2] = -1500
    images[0] = -999
    missing = {"/data/image_missing": np.array([1, 0, 0], np.uint8)}
    summary, _, _ = fed(message(0, images, extra=missing))
    np.testing.assert_array_equal(summary.max_image, images[2])
    np.testing.assert_array_equal(summary.sum_image, images[1:].astype(float).sum(axis=0))


def test_a_run_without_a_single_image_has_results(message, tmp_path):
    missing = {"/data/image_missing": np.ones(2, np.uint8)}
    summary, _, statistics = fed(message(0, np.zeros((2, 1, 64, 96), np.uint16), extra=missing))
    result = document(summary, statistics, complete=True, reason=None)
    assert (result.events, result.image_shape, result.hit_rate) == (2, None, None)
    draw(summary, result, tmp_path / "result.png")


def test_ragged_data_are_left_alone(message):
    extra = {
        "/data/hits_times": np.linspace(0, 1, 7),
        "/data/hits_times_offsets": np.array([0, 3, 3, 7], np.uint64),
    }
    summary, _, statistics = fed(message(0, frames(3), np.ones(3), extra=extra))
    result = document(summary, statistics, complete=True, reason=None)
    assert (result.events, result.events_unique, result.energy) == (3, 3, "/data/gmd")


def test_a_detector_that_changes_its_shape_is_told(message):
    with pytest.raises(MessageError, match=r"was .* and is now"):
        fed(message(0, frames(2)), message(2, frames(2, shape=(1, 32, 32))))


def test_a_dataset_that_is_not_there_is_told(message):
    with pytest.raises(FieldError, match="--image /nope"):
        fed(message(0, frames(2)), settings=Settings(image="/nope"))


def test_the_hdf5_result_holds_images_rows_and_histograms_with_units(message, tmp_path):
    images, energies = frames(5, peaks=12), np.arange(5.0)
    path = tmp_path / "result.h5"
    statistics = Statistics()
    with ResultFile(path) as table:
        summary = RunSummary(Settings(), table)
        summary.add(decode(message(0, images, energies)), 1_700_000_000.0)
        assert not path.exists()
        table.finish(summary, document(summary, statistics, complete=True, reason=None))
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["image/sum"][...], images.astype(float).sum(axis=0))
        assert file["image/max"].dtype == np.uint16
        assert list(file["events/peaks"]) == [12] * 5
        assert list(file["events/energy"]) == list(energies)
        assert np.diff(file["events/timestamp_ns"][...]).tolist() == [8_333_333] * 4
        assert file["peaks_histogram/entries"][...].sum() == 5
        assert file["time_series/events"][...].sum() == 5
        assert file.attrs["complete"]
        datasets: list[h5py.Dataset] = []
        file.visititems(lambda _, item: datasets.append(item) if isinstance(item, h5py.Dataset) else None)
        assert all("units" in item.attrs and "description" in item.attrs for item in datasets)
    assert [each.name for each in tmp_path.iterdir()] == ["result.h5"]


def test_an_unfinished_hdf5_result_leaves_no_file(tmp_path):
    with ResultFile(tmp_path / "result.h5"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_document_can_be_read_back(message, tmp_path):
    summary, _, statistics = fed(message(0, frames(3)))
    result = document(summary, statistics, complete=False, reason="the buffer broke")
    write_document(result, tmp_path / "result.json")
    assert ResultDocument.model_validate(json.loads((tmp_path / "result.json").read_text())) == result
    assert (result.energy, result.energy_mean) == (None, None)


def trace(count: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 1, (count, 2000)).astype(np.float32)


@pytest.mark.parametrize(
    "images",
    [frames(3, peaks=12), frames(3, shape=(8, 64, 96)), trace(3), np.zeros((3, 1, 64, 96), np.uint16)],
    ids=["one panel", "eight panels", "trace", "dark"],
)
def test_a_picture_is_drawn_of_any_detector(message, tmp_path, images):
    summary, _, statistics = fed(message(0, images, np.array([1.0, 2.0, np.nan])))
    draw(summary, document(summary, statistics, complete=True, reason=None), tmp_path / "result.png")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert [each.name for each in tmp_path.iterdir()] == ["result.png"]


def test_panels_do_not_overlap_and_say_where_they_begin():
    image = np.arange(1, 9)[:, None, None] * np.ones((8, 20, 30))
    picture, begins = arranged(image)
    for number, (row, column) in enumerate(begins):
        assert (picture[row : row + 20, column : column + 30] == number + 1).all()
    assert np.isnan(picture).any()
