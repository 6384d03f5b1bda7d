"""What can go wrong between two programs, as errors that say what to do.

::

    ConnectionError
    └── PeerError                 the other side cannot be used; `retry` says whether trying again can help
        ├── AuthenticationError   it refused our certificate, or we refuse its certificate: never retried
        ├── UnreachableError      nobody answers there: retried
        └── ServiceError          it answered with an error status; `status` and `detail` are its own words
    CredentialsError (ValueError) our own certificate folder is incomplete or unsafe
"""

from __future__ import annotations


class PeerError(ConnectionError):
    """The other side of a call cannot be used.

    Attributes:
        retry: whether the same call may succeed later.
        answer_lost: the request may have arrived and been obeyed, though no answer came.
    """

    retry: bool = False
    answer_lost: bool = False


class AuthenticationError(PeerError):
    """One side does not accept the other's certificate."""


class UnreachableError(PeerError):
    """Nobody answers at that address, or not in time."""

    retry = True


class ServiceError(PeerError):
    """The service answered, with an error.

    Attributes:
        status: HTTP status code.
        detail: the service's own explanation.
    """

    def __init__(self, message: str, *, status: int, detail: str) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail
        self.retry = status in (429, 502, 503, 504) or status == 500


class CredentialsError(ValueError):
    """A certificate folder lacks something, or a key in it can be read by others."""
