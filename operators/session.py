"""Sessions: nodes at a computing centre that stay for a shift and analyse every stream that is handed to them.

A session is a job that runs ``lclstream session``. It is found by its tag, at the job service itself, so that whoever
has a stream sees at once whether nodes are there: when there are none, the data go to disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowSkipException

from lclstream_airflow.hooks.patience import PeerError, insist
from lclstream_airflow.hooks.psik import JobState, PsikHook
from lclstream_airflow.hooks.verdict import task_error
from lclstream_airflow.links import JobLink
from lclstream_airflow.operators.documents import DocumentError
from lclstream_airflow.operators.psik import PsikOperator
from lclstream_airflow.operators.remote import START_PATIENCE_S, Progress, Remote
from lclstream_airflow.triggers.session import AcquisitionTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

_JOB_LINK = JobLink()
_TAG = "session"
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_EMPTY = (None, "", "None")


class SessionOperator(PsikOperator):
    """Starts a session's job, and waits until it has its nodes.

    The job goes on after that; a :class:`.SessionEndSensor` keeps its lease, :class:`SessionReleaseOperator` ends it.
    XCom: ``job_id``.

    :param session: the session's name; streams find it by that
    :param job: the job's specification; its script runs ``lclstream session -- COMMAND``

    Further arguments: see :class:`.PsikOperator`.
    """

    template_fields: Sequence[str] = (*PsikOperator.template_fields, "session")

    def __init__(self, *, session: str, **kwargs: Any) -> None:
        super().__init__(wait_for="active", **kwargs)
        self.session = session

    def prepare(self, context: Context) -> None:
        """See :meth:`RemoteWorkOperator.prepare`."""
        if self.session in _EMPTY:
            raise DocumentError("session is empty: streams find the session by its name")
        super().prepare(context)
        self.tags = {**self.tags, _TAG: self.session}


class FindSessionOperator(BaseOperator):
    """Finds the job of an open session; skips what follows when there is none, so that another branch keeps the data.

    Returns its id. Of several, the one that has started last.

    :param session: the session's name
    :param psik_conn_id: connection of type `psik`
    """

    template_fields: Sequence[str] = ("session", "psik_conn_id")
    operator_extra_links = (_JOB_LINK,)
    ui_color = "#e3f2d9"

    def __init__(self, *, session: str, psik_conn_id: str = PsikHook.default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.session = session
        self.psik_conn_id = psik_conn_id

    def execute(self, context: Context) -> str:
        """Look once.

        Raises:
            AirflowSkipException: no session of that name has nodes, or the service that knows cannot be asked: a stream
                must not wait for it.
            AirflowFailException: the connection is wrong.
            AirflowException: there is no connection or no certificate; `retries` may help.
        """
        hook = PsikHook(self.psik_conn_id)
        try:
            found = insist(lambda: hook.under_way({_TAG: self.session}), limit_s=START_PATIENCE_S)
        except PeerError as error:
            raise AirflowSkipException(f"whether session {self.session!r} is open is not known: {error}") from error
        except ValueError as error:
            raise task_error(error) from error
        open_now = [job for job in found if job.state is JobState.active]
        if not open_now:
            raise AirflowSkipException(f"no session {self.session!r} has nodes now")
        newest = max(open_now, key=lambda job: job.updated)
        _JOB_LINK.record(context, hook.job_url(newest.jobid))
        self.log.info("Session %s: job %s", self.session, newest.jobid)
        return newest.jobid


class SessionStreamOperator(PsikOperator):
    """Hands a stream to a session, and waits until it has been analysed there.

    Killed, it ends that analysis and leaves the session. XCom: ``result``, what the analysis wrote into its
    ``result.json``; the return value is ``{"job_id", "state", "exit_code", "result"}``.

    :param job_id: the session's job
    :param name: the stream's name in the session, such as ``r0007``; other characters than letters, digits and ``._-``
        become ``-``
    :param letter: what the analysis finds in its environment: ``{"url": …}`` becomes ``LCLSTREAM_URL``
    """

    template_fields: Sequence[str] = ("job_id", "name", "letter", "psik_conn_id")

    def __init__(self, *, job_id: str, name: str, letter: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(job={}, follow_log=False, lease_s=None, retry_failed_work=False, **kwargs)
        self.job_id = job_id
        self.name = name
        self.letter = letter

    def prepare(self, context: Context) -> None:
        """See :meth:`RemoteWorkOperator.prepare`."""
        del context
        if self.job_id in _EMPTY or self.name in _EMPTY:
            raise DocumentError(f"job_id is {self.job_id!r} and name {self.name!r}: both must be there")
        self.name = _NO_NAME.sub("-", self.name)

    def start(self, key: str) -> Remote:
        """Put the letter into the box; the same letter again changes nothing."""
        del key
        with self.hook.get_conn() as client:
            client.upload(self.job_id, f"inbox/{self.name}.json", json.dumps(dict(self.letter)).encode())
        return Remote(f"{self.job_id}/{self.name}", Progress.UNDER_WAY)

    def state(self, remote_id: str | int) -> Remote:
        """Its answer says how it stands; the trigger reads it."""
        return Remote(remote_id, Progress.UNDER_WAY)

    def record(self, context: Context, remote_id: str | int) -> None:
        """See :meth:`RemoteWorkOperator.record`."""
        super().record(context, str(remote_id).partition("/")[0])

    def trigger(self, remote_id: str | int, deadline: float) -> AcquisitionTrigger:
        """See :meth:`RemoteWorkOperator.trigger`."""
        return AcquisitionTrigger(
            conn_id=self.psik_conn_id,
            remote_id=str(remote_id),
            deadline=deadline,
            poll_interval=self.poll_interval,
            patience_s=self.patience_s,
            on_kill_policy=self.on_kill_policy,
        )

    def cancel(self, remote_id: str | int) -> None:
        """End this analysis, not the session."""
        job, _, name = str(remote_id).partition("/")
        with self.hook.get_conn() as client:
            client.upload(job, f"inbox/{name}.cancel", b"")

    def explain(self, remote_id: str | int) -> str:
        """Where to read more."""
        return f"; its output is in the log of job {str(remote_id).partition('/')[0]}"

    def finish(self, context: Context, remote_id: str | int, facts: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`RemoteWorkOperator.finish`."""
        del remote_id
        context["ti"].xcom_push(key="result", value=facts["result"])
        return facts


class SessionReleaseOperator(PsikOperator):
    """Ends a session: it takes nothing new, finishes the streams it has, and gives its nodes back.

    What is not done within `finish_s` is cancelled. Skips when there was no session. The result says how many
    acquisitions were analysed: ``acquisitions done failed cancelled``.

    :param job_id: the session's job; None or empty: there is none
    :param finish_s: how long it may finish what it has, in seconds
    """

    template_fields: Sequence[str] = ("job_id", "finish_s", "psik_conn_id")

    def __init__(
        self,
        *,
        job_id: str | None,
        finish_s: float | str = 1800.0,
        result_file: str | None = "result.json",
        **kwargs: Any,
    ) -> None:
        super().__init__(job={}, result_file=result_file, retry_failed_work=False, **kwargs)
        self.job_id = job_id
        self.finish_s = finish_s

    def lasts(self) -> Literal["task", "run"]:
        """See :meth:`RemoteWorkOperator.lasts`."""
        return "run"

    def prepare(self, context: Context) -> None:
        """See :meth:`RemoteWorkOperator.prepare`."""
        del context
        if self.job_id in _EMPTY:
            raise AirflowSkipException("there was no session to end")
        self.wait_timeout_s = float(self.finish_s)

    def start(self, key: str) -> Remote:
        """Put the word ``end`` into the box."""
        del key
        job_id = str(self.job_id)
        with self.hook.get_conn() as client:
            state = client.state(job_id)
            if not state.is_final:
                client.upload(job_id, "inbox/end", b"")
        # One that has ended is waited for as well: the trigger says at once how it has.
        return Remote(job_id, Progress.UNDER_WAY)
