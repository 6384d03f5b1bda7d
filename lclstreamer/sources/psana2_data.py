"""Data sources that read LCLS-II events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ComponentError
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
    """All channels of a digitizer: psana gives ``{segment: {channel: samples, "times": …}}``.

    A channel has the same number in every event of a run, whichever others the event has: that of its segment, or,
    where the detector's configuration says that segments have n channels, n x segment + channel.
    """

    def __init__(self, name: str, parameters: Any, info: Mapping[str, Any]) -> None:
        super().__init__(name, parameters, info)
        self._place = f"data_sources.{name}"
        found = _find(self._place, info["run"], parameters.psana_name)
        self._call = call_of(self._place, found, parameters.psana_name, parameters.psana_fields)
        for word in parameters.psana_fields.split(".")[:-1]:
            found = getattr(found, word)
        self._in_segment = _channels_of_segments(found)

    def get(self, event: Any) -> Channels | None:
        """The samples of the channels this event has, in the order of their numbers; `None` when there are none.

        Raises:
            ComponentError: a segment has more channels than the run's configuration says.
        """
        segments = self._call(event)
        if not segments:
            return None
        arrays = {
            self._number(segment, channel): np.asarray(samples)
            for segment, channels in segments.items()
            for channel, samples in channels.items()
            if channel != "times"
        }
        numbers = sorted(arrays)
        return Channels(tuple(arrays[number] for number in numbers), tuple(numbers))

    def _number(self, segment: int, channel: Any) -> int:
        # psana leaves out segments without a waveform: counting those that are there would name the wrong channel.
        if not isinstance(channel, int | np.integer) or not 0 <= channel < self._in_segment:
            raise ComponentError(
                f"{self._place}: segment {segment} of {self.parameters.psana_name} has a channel {channel!r}; by the "
                f"run's configuration the channels of its segments are 0 to {self._in_segment - 1}, no others can be "
                "numbered: choose a psana_fields that gives {segment: {number: samples}}"
            )
        return int(segment) * self._in_segment + int(channel)


def _channels_of_segments(detector: Any) -> int:
    """How many channels each segment has by the run's configuration, 1 where that does not say."""
    try:
        channels = detector._seg_chans()  # noqa: SLF001 - psana's only word for it: {segment: [channel, …]}
    except (AttributeError, AssertionError, TypeError):
        return 1
    return 1 + max((int(channel) for each in channels.values() for channel in each), default=0)


def _find(place: str, run: Any, wanted: str) -> Any:
    try:
        return run.Detector(wanted)
    except KeyError:
        where = f"run {run.runnum} of {run.expt}"
        raise not_there(place, wanted, where, run.detnames, (name for name, _ in run.epicsinfo)) from None
