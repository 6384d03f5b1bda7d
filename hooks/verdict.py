"""Whether Airflow should try a task again after an error: one rule for all operators and sensors."""

from __future__ import annotations

from airflow.sdk.exceptions import AirflowException, AirflowFailException

from lclstream_airflow.hooks.patience import CredentialsError, PeerError, ServiceError
from lclstream_airflow.hooks.service import UndefinedConnectionError


def task_error(error: PeerError | ValueError, words: str | None = None, *, checked: bool = False) -> AirflowException:
    """The error of Airflow to raise: `AirflowFailException` where trying again would not help.

    ============================================  ==============================================================
    the service refuses (4xx)                     fails for good: the same request would be refused again
    an argument, document or connection is wrong  fails for good
    a connection is not defined                   tried again: Airflow says so also while its database is away
    our certificates cannot be used               tried again: a worker may start before its folder is mounted
    the service is away                           tried again
    an answer that is no service's of ours        tried again: a proxy may stand in its place for a moment
    ============================================  ==============================================================

    :param words: the message; default: the error's
    :param checked: whether arguments and documents were checked before, so that a ValueError can only be such an answer
    """
    if isinstance(error, ServiceError):
        final = not error.retry
    else:
        final = not checked and not isinstance(error, PeerError | CredentialsError | UndefinedConnectionError)
    return (AirflowFailException if final else AirflowException)(words or str(error))
