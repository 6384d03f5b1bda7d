"""The interfaces of event sources and data sources.

An event source owns its data sources. Everything here runs in the main thread.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lclstreamer import registry
from lclstreamer.errors import ComponentError, EngineError
from lclstreamer.events import Event

log = logging.getLogger("lclstreamer")


@dataclass(frozen=True)
class SourceContext:
    """What an event source is told besides its options.

    Attributes:
        source_identifier: the configuration's.
        data_sources: the configuration's sections by name.
        rank: number of this rank.
        size: number of ranks over which the events are divided.
        limit: how many events to give in all, over all ranks; `None` for all there are.
    """

    source_identifier: str
    data_sources: Mapping[str, BaseModel]
    rank: int = 0
    size: int = 1
    limit: int | None = None


class EventSource(abc.ABC):
    """Gives this rank's share of the events: over all ranks each event exactly once."""

    def __init__(self, parameters: Any, context: SourceContext) -> None:
        self.parameters = parameters
        self.context = context

    @abc.abstractmethod
    def open(self) -> None:
        """Open the data and make the data sources; called once, before :meth:`events`.

        Raises:
            SourceError: data, detectors or fields are not there.
        """

    @abc.abstractmethod
    def events(self) -> Iterator[Event]:
        """This rank's events, in order. May be left before its end."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Give back what is held; called once, also after errors."""

    @classmethod
    def plan(cls, parameters: Any, context: SourceContext) -> str:
        """What this rank would read, in a sentence, without reading it."""
        return f"events {context.rank}, {context.rank + context.size}, {context.rank + 2 * context.size}, …"

    def mine(self, index: int) -> bool:
        """Whether the event of this number is this rank's."""
        return index % self.context.size == self.context.rank


class DataSource(abc.ABC):
    """Reads one thing from every event.

    Args:
        name: the name in the configuration.
        parameters: the section of the configuration.
        info: what the event source gives: always ``source_identifier``; psana sources also ``run``, the psana run.
    """

    #: The value is the event's time; formats that have room send the exact nanoseconds too.
    is_timestamp = False

    def __init__(self, name: str, parameters: Any, info: Mapping[str, Any]) -> None:
        self.name = name
        self.parameters = parameters
        self.info = info

    @abc.abstractmethod
    def get(self, event: Any) -> Any:
        """The value as a numpy array, or `None` where the event has none."""


def make_data_sources(context: SourceContext, info: Mapping[str, Any]) -> dict[str, DataSource]:
    """The data sources of the configuration, by name.

    Raises:
        ConfigurationError: a class cannot be imported or refuses its options.
    """
    made: dict[str, DataSource] = {}
    for name, section in context.data_sources.items():
        component, options = registry.resolve(f"data_sources.{name}", section)
        made[name] = component(name, options, {"source_identifier": context.source_identifier, **info})
    return made


class Reader:
    """Reads all data sources of an event; what a data source cannot read is missing, not the end of the run."""

    def __init__(self, sources: Mapping[str, DataSource]) -> None:
        self.sources = sources
        self._told: set[str] = set()

    def __call__(self, event: Any) -> dict[str, Any]:
        """The values of an event by data source name, `None` where there is none.

        Raises:
            ComponentError: a data source failed in a way that is not "this event has none".
        """
        values: dict[str, Any] = {}
        for name, source in self.sources.items():
            try:
                values[name] = source.get(event)
            except EngineError:
                raise
            except (TypeError, AttributeError) as error:
                # psana's detectors fail like this on events in which a segment is missing.
                values[name] = None
                if name not in self._told:
                    self._told.add(name)
                    log.warning(
                        "data source %s: an event could not be read (%s: %s); counted as missing, told once",
                        name,
                        type(error).__name__,
                        error,
                    )
            except (ValueError, KeyError, IndexError, RuntimeError) as error:
                raise ComponentError(f"data_sources.{name}: reading an event failed: {error}") from error
        return values
