"""DECTRIS stream V2: CBOR messages `start`, `image`, `end`.

Arrays are multi-dimensional (tag 40) typed arrays (tags 64 to 86, RFC 8746); compressed ones hold DECTRIS compression
(tag 56500: algorithm, element size, data). See https://github.com/dectris/documentation/tree/main/stream_v2.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import cbor2
import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ComponentError
from lclstreamer.events import Event, Message
from lclstreamer.serializers.base import Serializer, SerializerContext
from lclstreamer.serializers.codecs import BitshuffleCodec

#: The typed-array tags of RFC 8746 for little-endian numbers.
TAGS = {
    "uint8": 64,
    "uint16": 69,
    "uint32": 70,
    "uint64": 71,
    "int8": 72,
    "int16": 77,
    "int32": 78,
    "int64": 79,
    "float16": 84,
    "float32": 85,
    "float64": 86,
}
_ARRAY_TAG, _COMPRESSED_TAG = 40, 56500
_CHANNEL = "threshold_1"
_NANOSECONDS = 1_000_000_000


class SimplonV2Serializer(Serializer):
    """A start message a rank and run, an image message an event, an end message a rank."""

    def __init__(self, parameters: Any, context: SerializerContext) -> None:
        super().__init__(parameters, context)
        self._series: tuple[int, str] | None = None
        self._begun_ns = 0
        self._sequence = 0

    def add(self, event: Event) -> Iterable[Message]:
        """The event's image message, with the start message before the first.

        Raises:
            ComponentError: the image is no array of numbers of at least two axes.
        """
        name = self.parameters.data_source_to_serialize
        image = event.values[name]
        if image is None:
            return []
        if not isinstance(image, np.ndarray) or str(image.dtype.newbyteorder("=")) not in TAGS or image.ndim < 2:
            raise ComponentError(
                f"data_serializer.data_source_to_serialize: {name} must be an image of integers or floats"
            )
        # Segments lie one below the other: the format knows images of two axes. Our user data say their own.
        shape = image.shape
        image = np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("<")).reshape(-1, image.shape[-1])
        unique = f"{event.run.experiment or 'unknown'}-r{event.run.run:04d}-rank{self.context.rank}"
        messages: list[Message] = []
        if self._series != (event.run.run, unique):
            messages += self.end()
            self._series, self._begun_ns = (event.run.run, unique), event.timestamp_ns or 0
            messages.append(self._message(self._start(event, image), 0))
        messages.append(self._message(self._image(event, image, shape), 1))
        return messages

    def end_batch(self) -> Iterable[Message]:
        """Nothing: messages were made event by event."""
        return ()

    def end(self) -> Iterable[Message]:
        """The end message, if there was a start."""
        if self._series is None:
            return ()
        message = self._message({"type": "end", **self._identity()}, 0)
        self._series = None
        return (message,)

    def _message(self, content: Any, events: int) -> Message:
        message = Message([cbor2.dumps(content)], events=events, sequence=self._sequence)
        self._sequence += 1
        return message

    def _identity(self) -> dict[str, Any]:
        assert self._series is not None
        return {"series_id": self._series[0], "series_unique_id": self._series[1]}

    def _start(self, event: Event, image: NDArray[Any]) -> dict[str, Any]:
        content: dict[str, Any] = {
            "type": "start",
            **self._identity(),
            "arm_date": _date(self._begun_ns),
            "channels": [_CHANNEL],
            "detector_description": self.parameters.detector_type,
            "detector_serial_number": self.parameters.detector_name,
            "image_dtype": str(image.dtype),
            "image_size_x": image.shape[1],
            "image_size_y": image.shape[0],
            "user_data": {
                "experiment": event.run.experiment,
                "run": event.run.run,
                "rank": self.context.rank,
                "ranks": self.context.size,
                "source_identifier": self.context.source_identifier,
                "configuration_sha256": self.context.configuration_sha256,
                "lclstreamer_version": self.context.version,
            },
        }
        if self.parameters.incident_energy is not None:
            content["incident_energy"] = self.parameters.incident_energy
        return content

    def _image(self, event: Event, image: NDArray[Any], shape: tuple[int, ...]) -> dict[str, Any]:
        now = (event.timestamp_ns or 0) - self._begun_ns
        return {
            "type": "image",
            **self._identity(),
            "image_id": event.index,
            "series_date": _date(self._begun_ns),
            "start_time": [now, _NANOSECONDS],
            "stop_time": [now, _NANOSECONDS],
            "real_time": [0, _NANOSECONDS],
            "data": {_CHANNEL: cbor2.CBORTag(_ARRAY_TAG, [list(image.shape), self._array(image)])},
            "user_data": {"timestamp_ns": event.timestamp_ns, "image_shape": list(shape)},
        }

    def _array(self, image: NDArray[Any]) -> Any:
        content: Any = image.tobytes() if self.parameters.compression is None else None
        if content is None:
            codec = BitshuffleCodec(image.size, image.itemsize, "lz4", 0)
            packed = bytes(codec.encode(image, memoryview(bytearray(codec.room))))
            content = cbor2.CBORTag(_COMPRESSED_TAG, ["bslz4", image.itemsize, packed])
        return cbor2.CBORTag(TAGS[str(image.dtype.newbyteorder("="))], content)


def _date(nanoseconds: int) -> Any:
    """A date and time as CBOR tag 0."""
    seconds = datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    return cbor2.CBORTag(0, seconds.isoformat().replace("+00:00", "Z"))
