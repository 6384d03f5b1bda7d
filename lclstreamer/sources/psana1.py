"""The event source that reads LCLS-I runs with psana1, and its data sources.

psana1 is imported when a run is opened; it comes from SLAC's conda channel only. Runs are opened in small-data mode, in
which going over an event costs little until its data are asked for: every rank goes over all events and reads its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer import identifiers
from lclstreamer.errors import ConfigurationError, SourceError
from lclstreamer.events import Event, RunInfo
from lclstreamer.sources.base import DataSource, EventSource, Reader, SourceContext, make_data_sources
from lclstreamer.sources.detector import as_array, call_of, not_there

_EVENT_CODES = 256


def psana1() -> Any:
    """The package `psana` of LCLS-I.

    Raises:
        ConfigurationError: it is not installed, or what is installed is psana of LCLS-II.
    """
    try:
        psana = importlib.import_module("psana")
    except ImportError as error:
        raise ConfigurationError(
            f"psana (LCLS-I) cannot be imported: {error}. It is installed with conda: conda install -c lcls-i psana"
        ) from error
    if not hasattr(psana, "EventId"):
        raise ConfigurationError(
            "event_source.type: Psana1EventSource needs psana of LCLS-I; the installed psana is that of LCLS-II, which "
            "Psana2EventSource uses"
        )
    return psana


class Psana1EventSource(EventSource):
    """Events of an LCLS-I run."""

    def __init__(self, parameters: Any, context: SourceContext) -> None:
        super().__init__(parameters, context)
        self._identifier = identifiers.parse_psana1(context.source_identifier)

    def open(self) -> None:
        """Open the run and its detectors.

        Raises:
            SourceError: the run, a detector or a field is not there.
        """
        psana = psana1()
        try:
            self._data = psana.DataSource(self._identifier)
        except (RuntimeError, OSError) as error:
            raise SourceError(
                f"source_identifier: {self.context.source_identifier} cannot be opened: {error}"
            ) from error
        self._read = Reader(make_data_sources(self.context, {"psana": psana, "run": self._identifier}))

    def events(self) -> Iterator[Event]:
        """This rank's events; those of shared memory are divided by the server."""
        psana, limit = psana1(), self.context.limit
        shared = "shmem" in self._identifier
        words = dict(word.partition("=")[::2] for word in self._identifier.split(":"))
        info = RunInfo(words.get("exp", ""), int(words["run"]) if words.get("run", "").isdigit() else 0)
        if shared and limit is not None:
            limit = len(range(self.context.rank, limit, self.context.size))
        for index, event in enumerate(self._data.events()):
            if limit is not None and index >= limit:
                return
            if shared or self.mine(index):
                yield Event(self._read(event), index, info, nanoseconds(psana, event))


def nanoseconds(psana: Any, event: Any) -> int | None:
    """Nanoseconds since 1970 of a psana1 event, `None` when it has no time."""
    identity = event.get(psana.EventId)
    if identity is None:
        return None
    seconds, rest = identity.time()
    return int(seconds) * 1_000_000_000 + int(rest)


class Psana1Timestamp(DataSource):
    """Time of the event in seconds since 1970."""

    is_timestamp = True

    def get(self, event: Any) -> NDArray[np.float64] | None:
        """A float64 without axes."""
        stamp = nanoseconds(self.info["psana"], event)
        return None if stamp is None else np.array(stamp / 1e9, dtype=np.float64)


class Psana1DetectorInterface(DataSource):
    """What psana1's detector interface gives for the configured fields; event codes as 256 integers, filled with 0.

    Raises:
        SourceError: the run has no such detector, or the detector no such field; the text names those that are there.
    """

    def __init__(self, name: str, parameters: Any, info: Mapping[str, Any]) -> None:
        super().__init__(name, parameters, info)
        self._place = f"data_sources.{name}"
        psana, wanted = info["psana"], parameters.psana_name
        try:
            detector = psana.Detector(wanted)
        except (KeyError, RuntimeError) as error:
            names = {one for row in psana.DetNames() for one in row if one} if hasattr(psana, "DetNames") else set()
            raise not_there(self._place, wanted, info["run"], names, ()) from error
        chains = parameters.chains
        self._calls = [call_of(self._place, detector, wanted, chain) for chain in chains] or [detector]
        self._codes = chains == ["eventCodes"]
        self._dtype = None if parameters.dtype == "native" else np.dtype(parameters.dtype)

    def get(self, event: Any) -> NDArray[Any] | None:
        """The field's value as an array; several fields are stacked along a new first axis."""
        values = [call(event) for call in self._calls]
        if self._codes:
            return None if values[0] is None else _padded(values[0])
        return as_array(self._place, self.parameters, values, self._dtype)


def _padded(codes: Any) -> NDArray[np.int64]:
    found = np.asarray(codes, dtype=np.int64)[:_EVENT_CODES]
    padded = np.zeros(_EVENT_CODES, dtype=np.int64)
    padded[: found.size] = found
    return padded
