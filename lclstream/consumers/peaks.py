"""Counting bright spots in detector images, fast enough for a stream.

The method, for each panel of an image:

1. *Local background*: in blocks of 32 x 32 pixels the mean and standard deviation (sigma), taken again without the
   pixels above mean + 3 sigma, so that peaks do not raise their own threshold.
2. *Threshold*: a pixel is a candidate above background + `threshold` sigma of its block.
3. *Local maximum*: no pixel within two rows and columns is brighter.
4. *More than a pixel*: at least one of its eight neighbours is above background + half the threshold; a hot or stuck
   pixel stands alone, while a Bragg peak spreads.

It is meant for hit rates and monitoring, not for indexing: there is no calibration and no connected-pixel analysis.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
METHOD = (
    "local maximum (5x5) above local background + threshold * sigma of 32x32 blocks, sigma-clipped once at 3 sigma, "
    "with a neighbour above half the threshold"
)
_BLOCK = 32
_TRACE_BLOCK = 256
_CLIP = 3.0
#: Smallest sigma of integer data: a block of equal counts still has the rounding error.
_ROUNDING_SIGMA = 12**-0.5
_RADIUS = 2


@dataclass(frozen=True)
class Peaks:
    """Peaks of one event.

    Attributes:
        panel, row, column: int64 arrays, one entry a peak; panels count the leading axes of the image in C order.
        significance: float32 array, height above the background in sigma of the block.
    """

    panel: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    significance: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.row)


def find_peaks(image: Array, *, threshold: float = 8.0) -> Peaks:
    """The peaks of one image.

    Args:
        image: (…, rows, columns) or (samples,), any real dtype; not changed. NaN pixels are never peaks.
        threshold: in sigma of the local background.
    """
    panels = _panels(image)
    height, width = panels.shape[1:]
    grid = _Grid(height, 1 if height == 1 else _BLOCK, width, _TRACE_BLOCK if height == 1 else _BLOCK)
    floor = _ROUNDING_SIGMA if image.dtype.kind in "biu" else float(np.finfo(np.float32).tiny)
    background, sigma = _local_background(panels, grid, floor)
    rows, columns = grid.row_block, grid.column_block
    # Thresholds are spread over the columns once per row of blocks, not over the whole image: that stays in the cache.
    limits = (background + threshold * sigma).astype(np.float32)[:, :, columns]
    found: list[npt.NDArray[np.int64]] = []
    for number, (start, end) in enumerate(pairwise([*grid.row_starts, height])):
        panel, row, column = np.nonzero(panels[:, start:end] > limits[:, number, None, :])
        found.append(np.stack([panel, row + start, column]))
    panel, row, column = np.concatenate(found, axis=1)
    keep = _is_maximum(panels, panel, row, column)
    panel, row, column = panel[keep], row[keep], column[keep]
    base, spread = background[panel, rows[row], columns[column]], sigma[panel, rows[row], columns[column]]
    keep = _has_company(panels, panel, row, column, base + threshold / 2 * spread)
    panel, row, column = panel[keep], row[keep], column[keep]
    significance = (panels[panel, row, column] - base[keep]) / spread[keep]
    return Peaks(panel, row, column, significance.astype(np.float32))


def _panels(image: Array) -> npt.NDArray[np.float32]:
    image = image.reshape(1, 1, -1) if image.ndim == 1 else image.reshape(-1, *image.shape[-2:])
    return np.ascontiguousarray(image, dtype=np.float32)


class _Grid:
    """Blocks of nearly equal size: a narrow last block would be filled by a single peak and hide it."""

    def __init__(self, height: int, rows: int, width: int, columns: int) -> None:
        self.row_starts, self.row_block = self._cut(height, rows)
        self.column_starts, self.column_block = self._cut(width, columns)

    @staticmethod
    def _cut(size: int, step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        count = max(1, round(size / step))
        starts = np.arange(count, dtype=np.int64) * size // count
        return starts, np.searchsorted(starts, np.arange(size), side="right") - 1

    def sums(self, values: Array) -> npt.NDArray[np.float64]:
        rows = np.add.reduceat(values, self.row_starts, axis=1, dtype=np.float64)
        return np.asarray(np.add.reduceat(rows, self.column_starts, axis=2, dtype=np.float64))

    def spread(self, blocks: Array) -> Array:
        return np.asarray(blocks[:, self.row_block][:, :, self.column_block])


def _local_background(
    panels: npt.NDArray[np.float32], grid: _Grid, floor: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    # Around the middle value sums of squares keep their digits: raw pedestals are large against their noise.
    middle = np.float32(np.nanmedian(panels[:, ::7, ::7]))
    centred = panels - (middle if np.isfinite(middle) else np.float32(0))
    known = np.isfinite(centred)
    if not known.all():
        centred = np.where(known, centred, np.float32(0))
    mean, sigma = _moments(centred, known, grid)
    known &= centred <= grid.spread((mean + _CLIP * sigma).astype(np.float32))
    mean, sigma = _moments(np.where(known, centred, np.float32(0)), known, grid)
    return mean + float(middle), np.maximum(sigma, floor)


def _moments(
    values: npt.NDArray[np.float32], known: npt.NDArray[np.bool_], grid: _Grid
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    count = np.maximum(grid.sums(known), 1)
    mean = grid.sums(values) / count
    variance = grid.sums(values * values) / count - mean**2
    return mean, np.sqrt(np.maximum(variance, 0))


def _is_maximum(panels: Array, panel: Array, row: Array, column: Array) -> npt.NDArray[np.bool_]:
    value = panels[panel, row, column]
    keep = np.ones(len(value), bool)
    for down in range(-_RADIUS, _RADIUS + 1):
        for right in range(-_RADIUS, _RADIUS + 1):
            if not (down or right):
                continue
            other = _neighbour(panels, panel, row + down, column + right)
            # Of equal neighbours only the first one counts.
            keep &= (value > other) if (down, right) < (0, 0) else (value >= other)
    return keep


def _has_company(panels: Array, panel: Array, row: Array, column: Array, limit: Array) -> npt.NDArray[np.bool_]:
    company = np.zeros(len(row), bool)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            if down or right:
                company |= _neighbour(panels, panel, row + down, column + right) > limit
    return company


def _neighbour(panels: Array, panel: Array, row: Array, column: Array) -> Array:
    """Pixel values; outside the panel, and where there is none (NaN), minus infinity."""
    height, width = panels.shape[1:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    values = panels[panel, np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
    return np.where(inside & ~np.isnan(values), values, np.float32(-np.inf))
