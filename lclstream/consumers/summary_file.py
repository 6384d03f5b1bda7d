"""The documents of a run summary: ``result.json`` and ``result.h5``.

Layout of ``result.h5`` (every dataset has the attributes `units` and `description`)::

    /                              attributes: experiment, run, source_identifier, complete, events
    /image/sum                     float64, shape of one event
    /image/max                     the detector's dtype, shape of one event
    /events/timestamp_ns           int64 (events,)     time of the event, or of its arrival without timestamps
    /events/peaks                  int32 (events,)     -1: no image
    /events/energy                 float64 (events,)   NaN: no value
    /events/received_unix_s        float64 (events,)
    /peaks_histogram/edges, entries
    /energy_histogram/edges, entries
    /time_series/edges, events, peaks, hits, imaged, energy, measured    sums in each interval of time
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

import h5py
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from lclstream.client.statistics import Statistics
from lclstream.consumers.bins import ExpandingBins
from lclstream.consumers.run_summary import RunSummary

_ROWS = 4096
_TABLE = {
    "timestamp_ns": (np.int64, "ns", "time of the event since 1970-01-01 UTC as the data acquisition says it"),
    "peaks": (np.int32, "1", "peaks found in the image; -1 where the event has none"),
    "energy": (np.float64, "", "the scalar field; NaN where it is missing"),
    "received_unix_s": (np.float64, "s", "wall time at which the event's message arrived"),
}


class ResultDocument(BaseModel):
    """``result.json``: what was received and found. Null means: not known from this stream."""

    model_config = ConfigDict(extra="forbid")

    complete: bool
    """The end of the stream was seen; false: `reason` tells why the rest is missing."""
    reason: str | None
    experiment: str
    run: int | None
    source_identifier: str
    events: int
    events_unique: int | None
    """Distinct event times; equal to `events` when nothing came twice."""
    timestamps: Literal["exact nanoseconds", "float seconds", "none"]
    messages: int
    bytes: int
    messages_lost: int
    first_event_unix_s: float | None
    """Wall time at which the first event was received, seconds since 1970 UTC."""
    last_event_unix_s: float | None
    duration_s: float
    rate_events_s: float
    rate_bytes_s: float
    image: str | None
    image_shape: list[int] | None
    image_dtype: str | None
    image_units: str | None
    image_sum: float | None
    gain_bits: Literal["masked", "kept"] | None
    gain_bits_reason: str | None
    gain_switched_pixels_mean: float | None
    """Pixels an event that were not in high gain; null where the gain bits are not masked."""
    peak_method: str | None
    peaks_mean: float | None
    peaks_total: int | None
    hits: int | None
    hit_peaks: int | None
    hit_rate: float | None
    energy: str | None
    energy_units: str | None
    energy_mean: float | None
    energy_events: int | None


def document(summary: RunSummary, statistics: Statistics, *, complete: bool, reason: str | None) -> ResultDocument:
    """The numbers of a summary."""
    chosen = summary.fields
    image = chosen is not None and summary.sum_image is not None
    scalar = chosen is not None and chosen.scalar is not None
    shots = summary.image_events
    if chosen is None or chosen.timestamp is None:
        timestamps: Literal["exact nanoseconds", "float seconds", "none"] = "none"
    else:
        timestamps = "exact nanoseconds" if chosen.exact else "float seconds"
    masked = image and summary.gain is not None and summary.gain.masked
    return ResultDocument(
        complete=complete,
        reason=reason,
        experiment=summary.experiment,
        run=summary.run,
        source_identifier=summary.source,
        events=summary.events,
        events_unique=summary.events_unique,
        timestamps=timestamps,
        messages=statistics.messages,
        bytes=statistics.bytes,
        messages_lost=statistics.lost,
        first_event_unix_s=statistics.first_unix_s,
        last_event_unix_s=statistics.last_unix_s,
        duration_s=statistics.seconds,
        rate_events_s=summary.events / statistics.seconds if statistics.seconds > 0 else 0.0,
        rate_bytes_s=statistics.rate_bytes_s,
        image=chosen.image if chosen else None,
        image_shape=list(summary.sum_image.shape) if summary.sum_image is not None else None,
        image_dtype=str(summary.max_image.dtype) if summary.max_image is not None else None,
        image_units=summary.image_units if image else None,
        image_sum=float(summary.sum_image.sum()) if summary.sum_image is not None else None,
        gain_bits=("masked" if masked else "kept") if image else None,
        gain_bits_reason=summary.gain.reason if summary.gain else None,
        gain_switched_pixels_mean=summary.switched_pixels / shots if masked and shots else None,
        peak_method=summary.peak_method if image else None,
        peaks_mean=summary.peaks_total / shots if shots else None,
        peaks_total=summary.peaks_total if image else None,
        hits=summary.hits if image else None,
        hit_peaks=summary.settings.hit_peaks if image else None,
        hit_rate=summary.hits / shots if shots else None,
        energy=chosen.scalar if chosen else None,
        energy_units=summary.scalar_units if scalar else None,
        energy_mean=summary.scalar_sum / summary.scalar_events if summary.scalar_events else None,
        energy_events=summary.scalar_events if scalar else None,
    )


def write_document(result: ResultDocument, path: Path) -> None:
    """Write ``result.json`` so that a reader sees the old one or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(result.model_dump_json(indent=2) + "\n")
    os.replace(beside, path)


class ResultFile:
    """``result.h5`` while it grows: rows of events as they come, the rest at the end, then its name.

    Args:
        path: final name. Until :meth:`finish` the file has a hidden name beside it; :meth:`discard` removes that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._beside = path.with_name(f".{path.name}.{os.getpid()}")
        self._file = h5py.File(self._beside, "w")
        self._waiting: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in _TABLE}
        self._count = 0
        table = self._file.create_group("events")
        for name, (dtype, units, description) in _TABLE.items():
            column = table.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(_ROWS,), compression="gzip")
            column.attrs.update({"units": units, "description": description})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def append(self, rows: dict[str, npt.NDArray[Any]]) -> None:
        """Add rows: a column for each of the table's names."""
        for name, values in rows.items():
            self._waiting[name].append(values)
        self._count += len(rows["peaks"])
        if self._count >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        for name, parts in self._waiting.items():
            if parts:
                column = self._file["events"][name]
                values = np.concatenate(parts)
                column.resize(len(column) + len(values), axis=0)
                column[-len(values) :] = values
                parts.clear()
        self._count = 0

    def finish(self, summary: RunSummary, result: ResultDocument) -> None:
        """Write images, histograms and attributes, and give the file its name."""
        self._flush()
        file = self._file
        file.attrs.update(
            {
                "experiment": result.experiment,
                "run": -1 if result.run is None else result.run,
                "source_identifier": result.source_identifier,
                "complete": result.complete,
                "events": result.events,
            }
        )
        file["events/energy"].attrs["units"] = summary.scalar_units
        if summary.sum_image is not None and summary.max_image is not None:
            _put(file, "image/sum", summary.sum_image, summary.image_units, "sum over all events")
            _put(file, "image/max", summary.max_image, summary.image_units, "brightest value of each pixel")
        _put_bins(file, "peaks_histogram", summary.peaks, "1", "peaks an event")
        _put_bins(file, "energy_histogram", summary.energy, summary.scalar_units, "the scalar field")
        _put_bins(file, "time_series", summary.course, "s", "time since the first event")
        file.flush()
        self._file.close()
        os.replace(self._beside, self.path)

    def discard(self) -> None:
        """Close and remove what has no name yet; nothing after :meth:`finish`."""
        self._file.close()
        self._beside.unlink(missing_ok=True)


def _put(file: Any, path: str, values: npt.NDArray[Any], units: str, description: str) -> None:
    dataset = file.create_dataset(path, data=values, compression="gzip" if values.size > _ROWS else None)
    dataset.attrs.update({"units": units, "description": description})


def _put_bins(file: Any, path: str, bins: ExpandingBins, units: str, description: str) -> None:
    edges, entries, sums = bins.shown(len(bins.entries))
    _put(file, f"{path}/edges", edges, units, f"edges of the bins: {description}")
    _put(file, f"{path}/{'events' if sums else 'entries'}", entries, "1", "events in each bin")
    for name, values in sums.items():
        _put(file, f"{path}/{name}", values, "", f"sum of {name} over the events of each bin")
