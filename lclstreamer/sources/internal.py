"""The event source that makes its own events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lclstreamer.errors import SourceError
from lclstreamer.events import Event, RunInfo
from lclstreamer.sources.base import EventSource, Reader, SourceContext, make_data_sources


class InternalEventSource(EventSource):
    """Makes `number_of_events_to_generate` events in all; rank r of n gives events r, r + n, r + 2n and so on."""

    def open(self) -> None:
        """Make the data sources."""
        self._read = Reader(make_data_sources(self.context, {}))

    def events(self) -> Iterator[Event]:
        """This rank's events; a data source is given the event's number."""
        if not hasattr(self, "_read"):
            raise SourceError("the event source was not opened")
        run = RunInfo()
        for index in range(self.context.rank, self._total(self.parameters, self.context), self.context.size):
            yield Event(self._read(index), index, run)

    @staticmethod
    def _total(parameters: Any, context: SourceContext) -> int:
        total: int = parameters.number_of_events_to_generate
        return total if context.limit is None else min(total, context.limit)

    @classmethod
    def plan(cls, parameters: Any, context: SourceContext) -> str:
        """What this rank would make."""
        mine = len(range(context.rank, cls._total(parameters, context), context.size))
        return f"makes {mine} of {cls._total(parameters, context)} events"
