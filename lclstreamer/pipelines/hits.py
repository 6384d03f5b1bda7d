"""The pipeline that keeps events worth keeping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ComponentError
from lclstreamer.events import Event
from lclstreamer.pipelines.base import Pipeline


class HitFilterPipeline(Pipeline):
    """Keeps events with enough peaks and enough signal; events without the image are dropped."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self._hits = self._misses = 0

    def process(self, event: Event) -> Iterable[Event]:
        """The event, or nothing."""
        value = event.values[self.parameters.data_source]
        if value is not None and self._is_hit(value):
            self._hits += 1
            return (event,)
        self._misses += 1
        return ()

    def report(self) -> dict[str, int]:
        """How many events were kept and dropped."""
        return {"hits": self._hits, "misses": self._misses}

    def _is_hit(self, value: NDArray[Any]) -> bool:
        options = self.parameters
        if value.ndim < 2:
            raise ComponentError(f"HitFilterPipeline: {options.data_source} must be an image of at least 2 axes")
        rows = slice(*options.rows) if options.rows else slice(None)
        columns = slice(*options.columns) if options.columns else slice(None)
        region = value[..., rows, columns]
        if options.minimum_sum is not None and region.sum(dtype=np.float64) < options.minimum_sum:
            return False
        return options.minimum_peaks is None or count_peaks(region, options.peak_threshold) >= options.minimum_peaks


def count_peaks(image: NDArray[Any], threshold: float) -> int:
    """Local maxima above a threshold.

    A pixel is one when it is above the threshold, not below any of its eight neighbours, and above those before it in
    memory: of a flat top one pixel counts. Pixels at the edge of a segment are not looked at.

    Args:
        image: (…, rows, columns).
        threshold: in the image's units.
    """
    inner = image[..., 1:-1, 1:-1]
    found = inner > threshold
    if not found.any():
        return 0
    height, width = image.shape[-2:]
    for down in (-1, 0, 1):
        for across in (-1, 0, 1):
            if down == across == 0:
                continue
            other = image[..., 1 + down : height - 1 + down, 1 + across : width - 1 + across]
            before = (down, across) < (0, 0)
            found &= (inner > other) if before else (inner >= other)
    return int(np.count_nonzero(found))
