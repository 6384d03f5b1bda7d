"""The interface of processing pipelines, and how several are applied one after the other."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lclstreamer import registry
from lclstreamer.events import Event


class Pipeline(abc.ABC):
    """Changes, drops or makes events. One instance a rank, used in the main thread.

    Attributes:
        batch_size: how many events go into a message, `None` when this pipeline does not say.
    """

    batch_size: int | None = None

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters
        self.batch_size = getattr(parameters, "batch_size", None)

    @abc.abstractmethod
    def process(self, event: Event) -> Iterable[Event]:
        """The events this event becomes; none when it is dropped."""

    def finish(self) -> Iterable[Event]:
        """Events still kept back when the data end."""
        return ()

    def report(self) -> dict[str, int]:
        """What it counted, for the end of the run."""
        return {}


class Chain:
    """Pipelines applied in order."""

    def __init__(self, pipelines: Sequence[Pipeline]) -> None:
        self.pipelines = list(pipelines)
        sizes = [pipeline.batch_size for pipeline in self.pipelines if pipeline.batch_size]
        self.batch_size = sizes[0] if sizes else 1

    def process(self, event: Event) -> Iterable[Event]:
        """The events that come out of the last pipeline for one that goes into the first."""
        return self._through(event, 0)

    def finish(self) -> Iterator[Event]:
        """What all pipelines still keep, each passed through those behind it."""
        for number, pipeline in enumerate(self.pipelines):
            for event in pipeline.finish():
                yield from self._through(event, number + 1)

    def report(self) -> dict[str, int]:
        """The counts of all pipelines."""
        counts: dict[str, int] = {}
        for pipeline in self.pipelines:
            for key, value in pipeline.report().items():
                counts[key] = counts.get(key, 0) + value
        return counts

    def _through(self, event: Event, number: int) -> Iterable[Event]:
        events: Iterable[Event] = (event,)
        for pipeline in self.pipelines[number:]:
            events = [after for before in events for after in pipeline.process(before)]
        return events


def make_chain(sections: Sequence[Any]) -> Chain:
    """The pipelines of the configuration.

    Raises:
        ConfigurationError: a class cannot be imported or refuses its options.
    """
    made = []
    for number, section in enumerate(sections):
        place = "processing_pipeline" if len(sections) == 1 else f"processing_pipeline[{number}]"
        component, options = registry.resolve(place, section)
        made.append(component(options))
    return Chain(made)
