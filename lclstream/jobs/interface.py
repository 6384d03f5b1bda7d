"""The job interface of LCLS' Automated Run Processor (JID): starts, follows and ends batch jobs by REST.

Everything is a POST of the job's document below ``/jid/ws``; the answer is ``{"success", "value", "errormsg"?}``, with
status 200 even when `success` is false. Who asks is said by a bearer token in the header `Authorization`.

===========================  =============================================================
``{experiment}/start_job``   the document, with ``tool_id`` (the scheduler's id) and ``status``
``job_statuses``             takes and gives a list of documents
``{experiment}/job_log_file``  the job's log, a text
``{experiment}/kill_job``    the document
===========================  =============================================================

Statuses: ``START``, ``SUBMITTED``, ``RUNNING``, ``DONE``, ``FAILED``, ``EXITED``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from lclstream import __version__
from lclstream.security.errors import AuthenticationError, ServiceError, UnreachableError

#: LCLS' own.
SLAC_URL = "https://psdm.slac.stanford.edu"
SLAC_PREFIX = "/arps3dfjid/jid/ws"
TIMEOUT_S = 30.0
LIVE = frozenset({"START", "SUBMITTED", "RUNNING"})
#: Most bytes of a log that are kept; its end counts.
_LONGEST_LOG = 4 << 20


class JobInterfaceClient:
    """Calls of the job interface for an event loop; use it in an ``async with``.

    Args:
        url: up to and with ``/jid/ws``.
        authorization: what the header `Authorization` says, such as ``Bearer …``; None: nothing.
        timeout: seconds a call may take.
    """

    def __init__(self, url: str, authorization: str | None, *, timeout: float = TIMEOUT_S) -> None:
        self.url = url.rstrip("/")
        headers = {"user-agent": f"lclstream/{__version__}", "accept": "application/json"}
        if authorization:
            headers["authorization"] = authorization
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def start_job(self, experiment: str, document: dict[str, Any]) -> dict[str, Any]:
        """Start a job; returns its document.

        Raises:
            ServiceError: it is refused; or (`status` 499, not to be repeated) the answer did not come, and nobody
                knows whether the job was started.
        """
        try:
            value = await self._post(f"{quote(experiment, safe='')}/start_job", document)
        except UnreachableError as error:
            if isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
                raise
            words = f"{error}; whether the job was started is not known: look in the logbook before trying again"
            raise ServiceError(words, status=499, detail=words) from error
        if not isinstance(value, dict) or not value.get("tool_id"):
            raise self._odd("start_job", value)
        return value

    async def statuses(self, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Jobs' present documents."""
        value = await self._post("job_statuses", documents)
        if not isinstance(value, list):
            raise self._odd("job_statuses", value)
        return value

    async def status(self, document: dict[str, Any]) -> dict[str, Any]:
        """A job's present document.

        Raises:
            ServiceError: `status` 404: the interface does not know it.
        """
        for one in await self.statuses([document]):
            if isinstance(one, dict) and str(one.get("tool_id")) == str(document.get("tool_id")):
                return one
        words = f"job {document.get('tool_id')}: the job interface does not know it"
        raise ServiceError(f"{self.url}: {words}", status=404, detail=words)

    async def log(self, experiment: str, document: dict[str, Any]) -> str:
        """The end of a job's log."""
        value = await self._post(f"{quote(experiment, safe='')}/job_log_file", document)
        return value[-_LONGEST_LOG:] if isinstance(value, str) else str(value or "")[-_LONGEST_LOG:]

    async def kill(self, experiment: str, document: dict[str, Any]) -> None:
        """Ask for a job's end."""
        await self._post(f"{quote(experiment, safe='')}/kill_job", document)

    async def _post(self, path: str, document: Any) -> Any:
        try:
            response = await self._http.post(f"{self.url}/{path}", json=document)
        except httpx.TransportError as error:
            raise UnreachableError(f"{self.url}: cannot be reached: {type(error).__name__} {error}") from error
        if response.status_code in (401, 403):
            raise AuthenticationError(
                f"{self.url}/{path} refused our token ({response.status_code}): it may have expired, or be another "
                "experiment's"
            )
        if response.status_code != 200:
            words = response.text[:2000]
            raise ServiceError(
                f"{self.url}/{path} answered {response.status_code}: {words}",
                status=response.status_code if response.status_code >= 400 else 502,
                detail=words,
            )
        try:
            answer = response.json()
        except ValueError as error:
            raise self._odd(path, response.text) from error
        if not isinstance(answer, dict):
            raise self._odd(path, answer)
        if answer.get("success") is not True:
            words = str(answer.get("errormsg") or answer)[:2000]
            raise ServiceError(f"{self.url}/{path}: {words}", status=422, detail=words)
        return answer.get("value")

    def _odd(self, path: str, value: Any) -> ServiceError:
        words = f"{self.url}/{path} answered what cannot be understood: {str(value)[:500]}"
        return ServiceError(words, status=502, detail=words)
