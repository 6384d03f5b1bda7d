"""What a run looks like, added up while it streams: images, peaks, pulse energy, hit rate.

Memory does not grow with the run: two images, histograms of fixed size, and the exact event times up to a bound. The
table of single events goes to a file as it arrives (:mod:`lclstream.consumers.summary_file`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lclstream.client.batch import Batch
from lclstream.client.errors import MessageError
from lclstream.consumers import fields, gain
from lclstream.consumers.bins import ExpandingBins, TimestampLedger
from lclstream.consumers.peaks import METHOD, Peaks, find_peaks

Array = npt.NDArray[Any]
_STRONGEST = 200


class EventTable(Protocol):
    """Where the rows of single events go."""

    def append(self, rows: dict[str, Array]) -> None:
        """Take a column for each name; all of the same length."""


@dataclass(frozen=True)
class Settings:
    """What the user decides.

    Attributes:
        image, scalar, timestamp: dataset paths; None: found by themselves.
        gain_bits: what to do with the gain bits of raw Jungfrau data.
        threshold: peak threshold in sigma of the local background.
        hit_peaks: peaks from which an event is a hit.
    """

    image: str | None = None
    scalar: str | None = None
    timestamp: str | None = None
    gain_bits: gain.GainBits = gain.GainBits.AUTO
    threshold: float = 8.0
    hit_peaks: int = 10


@dataclass
class StrongestPeaks:
    """The most significant peaks of the run, for the picture; bounded."""

    panel: Array = field(default_factory=lambda: np.empty(0, np.int64))
    row: Array = field(default_factory=lambda: np.empty(0, np.int64))
    column: Array = field(default_factory=lambda: np.empty(0, np.int64))
    significance: Array = field(default_factory=lambda: np.empty(0, np.float32))

    def add(self, peaks: Peaks) -> None:
        """Keep the strongest of what was known and what came."""
        significance = np.concatenate([self.significance, peaks.significance])
        order = np.argsort(significance)[::-1][:_STRONGEST]
        self.significance = significance[order]
        for name in ("panel", "row", "column"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(peaks, name)])[order])


class RunSummary:
    """Adds up batches; every attribute can be read at any time.

    Attributes:
        fields: which datasets are used; None before the first batch.
        sum_image: float64, shape of one event: sum over events; None before the first image.
        max_image: the brightest value of each pixel, in the detector's dtype.
        image_events: events that had an image.
        peaks: histogram of peaks an event; `energy`: of the scalar; `course`: events, peaks, hits and energy against
            time in seconds since the first event.
    """

    def __init__(self, settings: Settings, table: EventTable) -> None:
        self.settings = settings
        self._table = table
        self.fields: fields.Fields | None = None
        self.gain: gain.GainDecision | None = None
        self.experiment: str = ""
        self.run: int | None = None
        self.source: str = ""
        self.image_units = ""
        self.scalar_units = ""
        self.events = 0
        self.image_events = 0
        self.scalar_events = 0
        self.scalar_sum = 0.0
        self.peaks_total = 0
        self.hits = 0
        self.switched_pixels = 0
        self.sum_image: npt.NDArray[np.float64] | None = None
        self.max_image: Array | None = None
        self.strongest = StrongestPeaks()
        self.peaks = ExpandingBins(1024, width=1.0, origin=0.0)
        self.energy = ExpandingBins(512)
        self.course = ExpandingBins(
            2048, width=0.01, origin=0.0, sums=("peaks", "hits", "imaged", "energy", "measured")
        )
        self.first_time_ns: int | None = None
        self._ledger = TimestampLedger()

    @property
    def events_unique(self) -> int | None:
        """Events with different times; None without timestamps, or when there were too many to remember."""
        return None if self.fields is None or self.fields.timestamp is None else self._ledger.unique

    @property
    def peak_method(self) -> str:
        """What a peak is, in words."""
        return f"{METHOD}; threshold {self.settings.threshold:g} sigma"

    def add(self, batch: Batch, received_unix_s: float) -> None:
        """Take in one message.

        Args:
            batch: the decoded message.
            received_unix_s: wall time when it arrived.

        Raises:
            FieldError: a dataset named in the settings is not there.
            MessageError: the message is unlike the ones before it.
        """
        if self.fields is None:
            self._begin(batch)
        assert self.fields is not None
        count = batch.events
        times = self._times(batch, count, received_unix_s)
        peaks = self._images(batch, count)
        energy = self._energies(batch, count)
        self.events += count
        imaged = peaks >= 0
        hits = peaks >= self.settings.hit_peaks
        self.peaks_total += int(peaks[imaged].sum())
        self.hits += int(hits.sum())
        self.peaks.add(peaks[imaged].astype(float))
        self.energy.add(energy)
        measured = np.isfinite(energy)
        self.scalar_events += int(measured.sum())
        self.scalar_sum += float(energy[measured].sum())
        if self.first_time_ns is None and count:
            self.first_time_ns = int(times.min())
        self.course.add(
            (times - (self.first_time_ns or 0)) * 1e-9,
            peaks=np.where(imaged, peaks, 0),
            hits=hits,
            imaged=imaged,
            energy=np.where(measured, energy, 0.0),
            measured=measured,
        )
        self._table.append(
            {
                "timestamp_ns": times,
                "peaks": peaks.astype(np.int32),
                "energy": energy,
                "received_unix_s": np.full(count, received_unix_s),
            }
        )

    def _begin(self, batch: Batch) -> None:
        wanted = self.settings
        self.fields = fields.choose(batch, image=wanted.image, scalar=wanted.scalar, timestamp=wanted.timestamp)
        self.experiment = str(batch.attributes.get("experiment", ""))
        run = batch.attributes.get("run")
        self.run = None if run is None else int(run)
        self.source = str(batch.attributes.get("source_identifier", ""))
        if self.fields.image is not None:
            image = batch[self.fields.image]
            self.gain = gain.decide(wanted.gain_bits, self.fields.image, image)
            default = "ADU" if image.dtype.kind in "iu" else "arb. units"
            self.image_units = fields.units_of(self.fields.image, batch.field_attributes, default=default)
        if self.fields.scalar is not None:
            self.scalar_units = fields.units_of(self.fields.scalar, batch.field_attributes, default="arb. units")

    def _times(self, batch: Batch, count: int, received_unix_s: float) -> npt.NDArray[np.int64]:
        assert self.fields is not None
        path = self.fields.timestamp
        if path is None or path not in batch:
            return np.full(count, int(received_unix_s * 1e9), np.int64)
        times = fields.nanoseconds(batch[path])
        self._ledger.add(times)
        return times

    def _energies(self, batch: Batch, count: int) -> npt.NDArray[np.float64]:
        assert self.fields is not None
        path = self.fields.scalar
        if path is None or path not in batch:
            return np.full(count, np.nan)
        energy = batch[path].astype(np.float64)
        # What stands for a missing integer, such as -999, looks like a value.
        energy[batch.missing(path)] = np.nan
        return energy

    def _images(self, batch: Batch, count: int) -> npt.NDArray[np.int64]:
        """Add the images; returns the number of peaks of each event, -1 where there is no image."""
        assert self.fields is not None
        path = self.fields.image
        if path is None or path not in batch:
            return np.full(count, -1, np.int64)
        images = batch[path]
        if self.sum_image is not None and images.shape[1:] != self.sum_image.shape:
            raise MessageError(f"{path} was {self.sum_image.shape} an event and is now {images.shape[1:]}")
        if self.gain is not None and self.gain.masked:
            images, switched = gain.split(images)
            self.switched_pixels += switched
        present = ~batch.missing(path)
        peaks = np.full(count, -1, np.int64)
        for number in np.nonzero(present)[0]:
            image = images[number]
            if self.sum_image is None or self.max_image is None:
                self.sum_image, self.max_image = np.zeros(image.shape), image.copy()
            self.sum_image += np.nan_to_num(image) if image.dtype.kind == "f" else image
            np.fmax(self.max_image, image, out=self.max_image)
            found = find_peaks(image, threshold=self.settings.threshold)
            self.strongest.add(found)
            peaks[number] = len(found)
        self.image_events += int(present.sum())
        return peaks
