"""From messages to batches, whatever format the stream has: it is told by a message's first bytes."""

from __future__ import annotations

from lclstream.client.batch import HDF5_SIGNATURE, Batch, decode
from lclstream.client.errors import MessageError
from lclstream.client.simplon import SimplonReader
from lclstream.client.simplon_v2 import SELF_DESCRIBED, SimplonV2Reader

#: A CBOR map begins with one of these.
_MAPS = range(0xA0, 0xC0)


class Decoder:
    """Reads the messages of one stream: HDF5, Simplon 1.8, DECTRIS stream V2. Used by one thread.

    ::

        decoder = Decoder()
        for number, message in enumerate(stream):
            for batch in decoder.feed(message, name=f"message {number}"):
                ...
        decoder.end()
    """

    def __init__(self) -> None:
        self._simplon = SimplonReader()
        self._simplon_v2 = SimplonV2Reader()

    def feed(self, message: bytes, *, name: str = "message") -> list[Batch]:
        """The batches that can be read now.

        Args:
            message: the next one of the stream.
            name: what to call it in errors.

        Returns:
            One batch for an HDF5 message and for an image of a Simplon format (with one event); none for what begins
            or ends a Simplon series. Simplon 1.8 images that came before their start message come with it.

        Raises:
            MessageError: the message is of no known format, or damaged.
        """
        if message.startswith(HDF5_SIGNATURE):
            return [decode(message, name=name)]
        if message[:1] in (b"c", b"m") and message[1:2] and message[1] in _MAPS:
            return self._simplon.feed(message, name)
        if message.startswith(SELF_DESCRIBED) or (message and message[0] in _MAPS):
            return self._simplon_v2.feed(message, name)
        raise MessageError(
            f"{name} ({len(message)} bytes, beginning {message[:16]!r}) is neither HDF5 nor a Simplon 1.8 or stream V2 "
            "message: what does the data_serializer of the stream's configuration say?"
        )

    def end(self) -> None:
        """Say that the stream is over.

        Raises:
            MessageError: Simplon 1.8 images came, but never the start message that says their shape.
        """
        self._simplon.end()
