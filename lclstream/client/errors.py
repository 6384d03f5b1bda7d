"""What can go wrong on a stream, as errors that say what to do.

::

    StreamError
    ├── AddressError    (ValueError)       the URL cannot be used; nothing was tried
    ├── ListenError     (OSError)          the address to listen at is taken or not ours
    ├── NoPeerError     (ConnectionError)  nobody was at the other end within the time given
    ├── WrongPeerError  (ConnectionError)  somebody answered who is no peer of a stream; trying again cannot help
    ├── BrokenStream    (ConnectionError)  a connection ended other than by the end of the stream: data are missing
    ├── StreamTimeout   (TimeoutError)     the peer is there, but nothing moved for the time given
    ├── TransferError                      the transfer service ended the transfer before its stream was over
    └── MessageError    (ValueError)       a message is not what the reader expects (for example not HDF5)
"""

from __future__ import annotations


class StreamError(Exception):
    """Any failure of a stream."""


class AddressError(StreamError, ValueError):
    """The URL, or the combination of URL and options, cannot be used."""


class ListenError(StreamError, OSError):
    """The address to listen at is taken, not allowed, or not of this machine."""


class NoPeerError(StreamError, ConnectionError):
    """Nobody was at the other end within the time given."""


class WrongPeerError(StreamError, ConnectionError):
    """The other end speaks another protocol, or does the same job as we (two pullers, two pushers)."""


class BrokenStream(StreamError, ConnectionError):  # noqa: N818 - a stream that is broken, as the interface names it
    """A connection ended before the end of the stream; what was read before is whole and in order."""


class StreamTimeout(StreamError, TimeoutError):  # noqa: N818 - named like the built-in TimeoutError's kin in sockets
    """Nothing moved for the time given although the peer is connected."""


class TransferError(StreamError):
    """The transfer ended otherwise than by the end of its stream: failed, canceled, or its lease ran out."""


class MessageError(StreamError, ValueError):
    """A message cannot be read."""
