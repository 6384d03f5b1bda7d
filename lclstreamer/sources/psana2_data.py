"""Data sources that read LCLS-II events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.events import Channels
from lclstreamer.sources.base import DataSource
from lclstreamer.sources.detector import as_array, call_of, not_there

#: psana2 counts seconds from 1990-01-01, we from 1970-01-01.
PSANA2_EPOCH_S = 631_152_000


def timestamp_ns(timestamp: int) -> int:
    """Nanoseconds since 1970-01-01 of a psana2 timestamp, which is ``(seconds since 1990 << 32) | nanoseconds``."""
    return ((timestamp >> 32) + PSANA2_EPOCH_S) * 1_000_000_000 + (timestamp & 0xFFFFFFFF)


class Psana2Timestamp(DataSource):
    """psana's 64-bit timestamp as float64, as the original sends it (good to about 0.5 µs)."""

    is_timestamp = True

    def get(self, event: Any) -> NDArray[np.float64]:
        """A float64 without axes."""
        return np.array(event.timestamp, dtype=np.float64)


class Psana2RunInfo(DataSource):
    """Experiment, run timestamp, run number and source identifier as four strings."""

    def __init__(self, name: str, parameters: Any, info: Mapping[str, Any]) -> None:
        super().__init__(name, parameters, info)
        run = info["run"]
        self._value = np.array([str(run.expt), str(run.timestamp), str(run.runnum), info["source_identifier"]])

    def get(self, event: Any) -> NDArray[np.str_]:
        """Four strings."""
        return self._value


class Psana2DetectorInterface(DataSource):
    """What psana's detector interface gives for the configured fields.

    Raises:
        SourceError: the run has no such detector or EPICS variable, or the detector no such field; the text names those
            that are there.
    """

    def __init__(self, name: str, parameters: Any, info: Mapping[str, Any]) -> None:
        super().__init__(name, parameters, info)
        self._place = f"data_sources.{name}"
        found = _find(self._place, info["run"], parameters.psana_name)
        chains = parameters.chains
        self._calls = [call_of(self._place, found, parameters.psana_name, chain) for chain in chains] or [found]
        self._dtype = None if parameters.dtype == "native" else np.dtype(parameters.dtype)

    def get(self, event: Any) -> NDArray[Any] | None:
        """The field's value as an array, good until the next event: psana may use its memory again (raw.calib does).

        Several fields are stacked along a new first axis.
        """
        return as_array(self._place, self.parameters, [call(event) for call in self._calls], self._dtype)


class Psana2Waveforms(DataSource):
    """All channels of a digitizer: psana gives ``{segment: {channel: samples, "times": …}}``."""

    def __init__(self, name: str, parameters: Any, info: Mapping[str, Any]) -> None:
        super().__init__(name, parameters, info)
        place = f"data_sources.{name}"
        found = _find(place, info["run"], parameters.psana_name)
        self._call = call_of(place, found, parameters.psana_name, parameters.psana_fields)

    def get(self, event: Any) -> Channels | None:
        """The samples of every channel, numbered through segment by segment; `None` when there are none."""
        segments = self._call(event)
        if not segments:
            return None
        arrays = [
            np.asarray(samples)
            for _, channels in sorted(segments.items())
            for channel, samples in sorted(channels.items(), key=lambda one: str(one[0]))
            if channel != "times"
        ]
        return Channels(tuple(arrays), tuple(range(len(arrays))))


def _find(place: str, run: Any, wanted: str) -> Any:
    try:
        return run.Detector(wanted)
    except KeyError:
        where = f"run {run.runnum} of {run.expt}"
        raise not_there(place, wanted, where, run.detnames, (name for name, _ in run.epicsinfo)) from None
