"""DECTRIS Simplon 1.8 messages, as the original engine sends them to CrystFEL.

A message is one letter (`c` for control, `m` for an image) and a CBOR map. The last rank sends `start` before its first
image and `stop` at the end; every rank sends an `image` message for each event. Images are compressed with
bitshuffle-LZ4 in blocks of 4096 elements, without a header.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import cbor2
import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ComponentError
from lclstreamer.events import Event, Message
from lclstreamer.serializers.base import Serializer, SerializerContext
from lclstreamer.serializers.codecs import BitshuffleCodec

_BLOCK = 4096
_HEADER = 12
_BEAM = ("angle_x", "angle_y", "position_x", "position_y")


class SimplonBinarySerializer(Serializer):
    """An image message an event, of any integer or floating dtype."""

    def __init__(self, parameters: Any, context: SerializerContext) -> None:
        super().__init__(parameters, context)
        self._last = context.rank == context.size - 1
        self._started = False
        self._run = "0"
        self._images = 0
        self._sequence = 0

    def add(self, event: Event) -> Iterable[Message]:
        """The event's image message, with the start message before the first of the last rank.

        Raises:
            ComponentError: the image is no array of numbers, or a data source that Simplon needs is missing.
        """
        values = event.values
        image = values[self.parameters.data_source_to_serialize]
        if image is None:
            return []
        if not isinstance(image, np.ndarray) or image.dtype.kind not in "iuf":
            raise ComponentError(
                f"data_serializer.data_source_to_serialize: {self.parameters.data_source_to_serialize} must be an "
                "array "
                "of integers or floats"
            )
        image = np.ascontiguousarray(image)
        messages: list[Message] = []
        if values["run_info"] is not None:
            self._run = str(values["run_info"][2])
        self._images += 1
        if self._last and not self._started:
            self._started = True
            messages.append(self._message(b"c", self._start(values, image), 0))
        messages.append(self._message(b"m", self._image(values, image), 1))
        return messages

    def end_batch(self) -> Iterable[Message]:
        """Nothing: messages were made event by event."""
        return ()

    def end(self) -> Iterable[Message]:
        """The stop message of the last rank."""
        if not self._last:
            return ()
        return (self._message(b"c", {"type": "stop", "run": self._run, "timestamp": time.time()}, 0),)

    def _message(self, kind: bytes, content: Mapping[str, Any], events: int) -> Message:
        message = Message([kind, cbor2.dumps(content)], events=events, sequence=self._sequence)
        self._sequence += 1
        return message

    def _number(self) -> int:
        return self.context.rank * 10000 + self._images

    def _start(self, values: Mapping[str, Any], image: NDArray[Any]) -> dict[str, Any]:
        options = self.parameters
        info, geometry = values["run_info"], values["detector_geometry"]
        if info is None or geometry is None:
            raise ComponentError("SimplonBinarySerializer: the first event has no run_info or detector_geometry")
        experiment = [str(word) for word in info]
        has_pixels = len(geometry) > 2
        return {
            "type": "start",
            "run_number": experiment[2],
            "start_time": experiment[1],
            "duration": "N/A",
            "beamline": experiment[3][4:7].upper(),
            "experiment": experiment[0],
            "beam_type": "X-ray",
            "polarization": {"fraction": options.polarization_fraction, "axis": options.polarization_axis},
            "data_collection_rate": options.data_collection_rate,
            "datatype": str(image.dtype),
            "shape": "x".join(map(str, image.shape)),
            "algorithm": "bitshuffle-lz4",
            "detector": {
                "name": options.detector_name,
                "id": str(geometry[0]),
                "type": options.detector_type,
                "geometry": str(geometry[1]),
                "pixel_coords": np.array(geometry[2]).tobytes() if has_pixels else "",
                "material": "???",
                "thickness": "???",
            },
            "message_id": self._number(),
            "timestamp": time.time(),
        }

    def _image(self, values: Mapping[str, Any], image: NDArray[Any]) -> dict[str, Any]:
        beam = values.get("beam_data")
        content: dict[str, Any] = {"type": "image", "run": self._run, "compressed_data": bare_bslz4(image)}
        if beam is not None:
            content["beam_direction"] = {name: float(beam[number]) for number, name in enumerate(_BEAM)}
            content["photon_energy"] = float(beam[4])
            content["photon_wavelength"] = 0
        stamp = values["timestamp"]
        with np.errstate(over="ignore"):
            # A sum beyond the image's own float type is sent as infinity, as the original does.
            total = image.sum().item()
        return {
            **content,
            "dtype": str(image.dtype),
            "sum": total,
            "message_id": self._number(),
            "timestamp": None if stamp is None else np.asarray(stamp).item(),
        }


def bare_bslz4(values: NDArray[Any]) -> bytes:
    """Bitshuffle-LZ4 in blocks of 4096 elements, without the header HDF5 and DECTRIS stream V2 have."""
    codec = BitshuffleCodec(values.size, values.itemsize, "lz4", 0, block=_BLOCK)
    return bytes(codec.encode(values, memoryview(bytearray(codec.room)))[_HEADER:])
