"""Both ends of a stream, for programs: :func:`pull` receives, :func:`push` sends.

The modules behind need numpy, h5py or libzmq only when they are used: importing this one is cheap.
"""

from lclstream.client.errors import (
    AddressError,
    BrokenStream,
    ListenError,
    MessageError,
    NoPeerError,
    StreamError,
    StreamTimeout,
    TransferError,
    WrongPeerError,
)
from lclstream.client.pulling import Puller, pull
from lclstream.client.pushing import Pusher, push
from lclstream.client.statistics import Statistics

__all__ = [
    "AddressError",
    "BrokenStream",
    "ListenError",
    "MessageError",
    "NoPeerError",
    "Puller",
    "Pusher",
    "Statistics",
    "StreamError",
    "StreamTimeout",
    "TransferError",
    "WrongPeerError",
    "pull",
    "push",
]
