"""The pipeline that only batches."""

from __future__ import annotations

from collections.abc import Iterable

from lclstreamer.events import Event
from lclstreamer.pipelines.base import Pipeline


class BatchProcessingPipeline(Pipeline):
    """Events as they are, `batch_size` in a message."""

    def process(self, event: Event) -> Iterable[Event]:
        """The event itself."""
        return (event,)
