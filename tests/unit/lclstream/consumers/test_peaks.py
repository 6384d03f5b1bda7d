"""The peak finder on images whose peaks are known."""

from __future__ import annotations

import numpy as np
import pytest

from lclstream.consumers.peaks import find_peaks


def noisy(shape, *, level=50.0, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(level, shape).astype(np.uint16)


def with_peaks(image: np.ndarray, places, height=400) -> np.ndarray:
    spot = height * np.array([[0.2, 0.5, 0.2], [0.5, 1.0, 0.5], [0.2, 0.5, 0.2]])
    for panel, row, column in places:
        image[panel, row - 1 : row + 2, column - 1 : column + 2] += spot.astype(image.dtype)
    return image


PLACES = [(0, 40, 40), (0, 40, 60), (0, 31, 32), (1, 100, 7), (1, 5, 120)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32, np.float64])
def test_planted_peaks_are_found_where_they_are_and_no_others(dtype):
    peaks = find_peaks(with_peaks(noisy((2, 128, 130)), PLACES).astype(dtype))
    assert sorted(zip(peaks.panel, peaks.row, peaks.column, strict=True)) == sorted(PLACES)
    assert (peaks.significance > 8).all()


def test_pure_noise_has_no_peaks():
    assert len(find_peaks(noisy((1, 512, 1024)))) == 0


def test_a_smooth_ring_is_background_not_peaks():
    rows, columns = np.mgrid[:256, :256]
    ring = 3000 * np.exp(-(((np.hypot(rows, columns) - 150) / 25) ** 2))
    image = np.random.default_rng(1).poisson(50 + ring)[None].astype(np.uint16)
    assert len(find_peaks(image)) == 0


def test_a_single_hot_pixel_is_no_peak():
    image = noisy((1, 64, 64))
    image[0, 20, 20] = 5000
    assert len(find_peaks(image)) == 0


def test_a_flat_top_counts_once():
    image = noisy((1, 64, 64))
    image[0, 20:22, 20:22] = 3000
    peaks = find_peaks(image)
    assert len(peaks) == 1


def test_peaks_at_edges_and_in_unfinished_blocks_are_found():
    image = noisy((1, 70, 70))
    image[0, 0:2, 0:2] += np.array([[900, 500], [500, 300]], np.uint16)
    image[0, 68:, 68:] += np.array([[300, 500], [500, 900]], np.uint16)
    peaks = find_peaks(image)
    assert sorted(zip(peaks.row, peaks.column, strict=True)) == [(0, 0), (69, 69)]


def test_pixels_without_a_value_are_no_peaks_and_hide_none():
    image = with_peaks(noisy((1, 64, 64)), [(0, 30, 30)]).astype(np.float32)
    image[0, 28, 30] = np.nan
    image[0, 50:, 50:] = np.nan
    peaks = find_peaks(image)
    assert list(zip(peaks.row, peaks.column, strict=True)) == [(30, 30)]


def test_a_large_pedestal_does_not_change_what_is_found():
    image = with_peaks(noisy((2, 128, 130)), PLACES)
    assert len(find_peaks(image + np.uint16(12_000))) == len(PLACES)


def test_pulses_of_a_trace_are_found():
    trace = np.random.default_rng(2).normal(0, 1, 4000)
    for at in (500, 2000, 3990):
        trace[at - 1 : at + 2] += (20, 40, 20)
    assert list(find_peaks(trace).column) == [500, 2000, 3990]
