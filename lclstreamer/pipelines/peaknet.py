"""Images of one size with a channel axis, as PeakNet and MAXIE take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.events import Event
from lclstreamer.pipelines.base import Pipeline


class PeaknetPreprocessingPipeline(Pipeline):
    """Pads every array with two axes (H, W) to the target size with zeros and gives it a channel axis.

    The result of an event is (C, H', W'), of a batch (B, C, H', W'), with the dtype of the image; an image larger than
    the target along an axis keeps its size along it. Everything that is no image stays as it is.
    """

    def process(self, event: Event) -> Iterable[Event]:
        """The event with its images padded."""
        for name, value in event.values.items():
            if isinstance(value, np.ndarray) and value.ndim == 2:
                event.values[name] = self._image(value)
        return (event,)

    def _image(self, image: NDArray[Any]) -> NDArray[Any]:
        options = self.parameters
        height, width = image.shape
        rows, columns = max(options.target_height, height), max(options.target_width, width)
        centred = options.pad_style == "center"
        top = (rows - height) // 2 if centred else 0
        left = (columns - width) // 2 if centred else 0
        channels = options.num_channels if options.add_channel_dim else 1
        padded = np.zeros((channels, rows, columns), dtype=image.dtype)
        padded[:, top : top + height, left : left + width] = image
        return padded if options.add_channel_dim else padded[0]
