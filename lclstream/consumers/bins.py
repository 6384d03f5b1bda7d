"""Histograms and time series of bounded size for data whose range is not known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class ExpandingBins:
    """Equal bins that double their width, joining in pairs, whenever a value falls outside.

    Nothing is ever lost or clipped: the number of entries is exact, only the resolution halves.

    Args:
        bins: number of bins; even.
        width: first width of a bin; None: taken from the spread of the first values.
        origin: lower edge of the first bin; None: taken from the first values.
        sums: names of quantities that are added up in each bin beside the number of entries.
    """

    def __init__(
        self, bins: int, *, width: float | None = None, origin: float | None = None, sums: tuple[str, ...] = ()
    ) -> None:
        self._bins = bins
        self._width = width
        self._origin = origin
        self._started = False
        self.entries = np.zeros(bins, np.int64)
        self.sums = {name: np.zeros(bins) for name in sums}

    def add(self, values: Array, **weights: Array) -> None:
        """Count values; one weight array (same length) for each of `sums`. Values that are not finite are skipped."""
        known = np.isfinite(values)
        values = np.asarray(values, np.float64)[known]
        if not len(values):
            return
        if not self._started:
            self._start(values)
        assert self._width is not None
        assert self._origin is not None
        while values.max() >= self._origin + self._bins * self._width:
            self._widen(left=False)
        while values.min() < self._origin:
            self._widen(left=True)
        index = np.clip(((values - self._origin) / self._width).astype(np.int64), 0, self._bins - 1)
        self.entries += np.bincount(index, minlength=self._bins)
        for name, weight in weights.items():
            self.sums[name] += np.bincount(index, np.asarray(weight, np.float64)[known], minlength=self._bins)

    def _start(self, values: Array) -> None:
        low, high = float(values.min()), float(values.max())
        if self._width is None:
            spread = high - low
            self._width = 4 * spread / self._bins if spread > 0 else abs(low) / self._bins or 1.0 / self._bins
        if self._origin is None:
            self._origin = np.floor((low + high) / 2 / self._width - self._bins / 2) * self._width
        self._started = True

    def _widen(self, *, left: bool) -> None:
        """Join the bins in pairs; the free half lies on the left or on the right."""
        assert self._width is not None
        assert self._origin is not None
        half = self._bins // 2
        for counts in (self.entries, *self.sums.values()):
            joined = counts.reshape(half, 2).sum(axis=1)
            counts[:] = 0
            counts[half if left else 0 :][:half] = joined
        if left:
            self._origin -= self._bins * self._width
        self._width *= 2

    def shown(self, most: int) -> tuple[Array, Array, dict[str, Array]]:
        """The occupied range in at most `most` bins.

        Returns:
            Edges (one more than bins), entries, and the sums by name; all empty when nothing was added.
        """
        if not self.entries.any():
            return np.empty(0), np.empty(0, np.int64), {name: np.empty(0) for name in self.sums}
        assert self._width is not None
        assert self._origin is not None
        occupied = np.nonzero(self.entries)[0]
        first, last = int(occupied[0]), int(occupied[-1])
        join = -(-(last - first + 1) // most)
        count = -(-(last - first + 1) // join)

        def joined(values: Array) -> Array:
            padded = np.zeros(count * join, values.dtype)
            part = values[first : first + count * join]
            padded[: len(part)] = part
            return np.asarray(padded.reshape(count, join).sum(axis=1))

        edges = self._origin + self._width * (first + join * np.arange(count + 1))
        return edges, joined(self.entries), {name: joined(values) for name, values in self.sums.items()}


class TimestampLedger:
    """Counts distinct event times exactly, up to a bound on memory.

    Args:
        most: distinct times kept (8 bytes each); beyond it the count is not known any more.
    """

    def __init__(self, most: int = 20_000_000) -> None:
        self._most = most
        self._known = np.empty(0, np.int64)
        self._recent: list[npt.NDArray[np.int64]] = []
        self._waiting = 0
        self._overflown = False

    def add(self, times_ns: npt.NDArray[np.int64]) -> None:
        """Remember these times."""
        if self._overflown:
            return
        self._recent.append(times_ns)
        self._waiting += len(times_ns)
        # Merging costs as much as all that is known: only when as much has come again.
        if self._waiting > max(65536, len(self._known)):
            self._merge()

    def _merge(self) -> None:
        self._known = np.unique(np.concatenate([self._known, *self._recent]))
        self._recent, self._waiting = [], 0
        if len(self._known) > self._most:
            self._overflown = True
            self._known = np.empty(0, np.int64)

    @property
    def unique(self) -> int | None:
        """Number of distinct times; None when there were too many to remember."""
        self._merge()
        return None if self._overflown else len(self._known)
