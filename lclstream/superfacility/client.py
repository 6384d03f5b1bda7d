"""NERSC's Superfacility API through its published client, `sfapi_client`; with errors and bounds like our own clients'.

The published client repeats a failed call ten times by itself, a POST, too: a submission whose answer was late would
run twice. Here it asks once, and the caller decides. What a job is called is how it is found again (:meth:`find`).
"""

from __future__ import annotations

import asyncio
import datetime
import importlib
import importlib.util
import re
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import tenacity
from pydantic import ValidationError

from lclstream.security.errors import AuthenticationError, CredentialsError, PeerError, ServiceError, UnreachableError
from lclstream.security.http import refused

with warnings.catch_warnings():
    import authlib.deprecate  # has its warnings shown always, so it comes before the next line

    # About another HTTP library, at every start of every task; nobody who uses us can do anything about it.
    warnings.simplefilter("ignore", authlib.deprecate.AuthlibDeprecationWarning)
    from authlib.integrations.base_client.errors import OAuthError
    from sfapi_client import AsyncClient
    from sfapi_client.compute import AsyncCompute, Machine
    from sfapi_client.exceptions import ClientKeyError, SfApiError
    from sfapi_client.jobs import JobState
    from sfapi_client.paths import AsyncRemotePath

if TYPE_CHECKING:
    import httpx

# What authlib sends the published client's calls with: httpx2 where some package brings it, httpx otherwise. Either has
# errors of its own.
_HTTP = [importlib.import_module(name) for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]
_STATUS_ERRORS: tuple[type[Exception], ...] = tuple(library.HTTPStatusError for library in _HTTP)
_TRANSPORT_ERRORS: tuple[type[Exception], ...] = tuple(library.TransportError for library in _HTTP)

#: NERSC's own addresses.
NERSC_URL = "https://api.nersc.gov"
NERSC_PREFIX = "/api/v1.2"
NERSC_TOKEN_URL = "https://oidc.nersc.gov/c2id/token"  # noqa: S105 - an address
#: Seconds a call may take, waiting for the API's own tasks included.
TIMEOUT_S = 60.0
#: The same for a cancellation, which often comes from a process that is itself about to be killed.
CANCEL_S = 15.0

_SUCCESS = frozenset({"COMPLETED"})
_ENDED = _SUCCESS | {
    "BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip
#: What the machine's tools say when they cannot be asked now: no judgement about the job.
_AWAY = re.compile(
    r"unable to contact|not responding|timed out|connection refused|zero bytes|temporarily|try again|"
    r"persist_conn|unable to establish",
    re.IGNORECASE,
)


def _once(method: Any) -> Any:
    return method.retry_with(stop=tenacity.stop_after_attempt(1), reraise=True)


class _OnceClient(AsyncClient):  # type: ignore[misc] # it has no types
    """The published client without its own repetitions."""

    get = _once(AsyncClient.get)
    post = _once(AsyncClient.post)
    put = _once(AsyncClient.put)
    delete = _once(AsyncClient.delete)


@dataclass(frozen=True)
class FacilityJob:
    """A job as the facility shows it.

    Attributes:
        id: its number.
        name: its name.
        state: Slurm's word, such as ``RUNNING``.
        exit_code: such as ``1:0``; empty while it is not known.
    """

    id: str
    name: str
    state: str
    exit_code: str = ""

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.state in _ENDED

    @property
    def has_succeeded(self) -> bool:
        """Whether it has ended well."""
        return self.state in _SUCCESS


@dataclass(frozen=True)
class MachineStanding:
    """How a machine stands.

    Attributes:
        status: ``active``, ``degraded``, ``unavailable`` or ``other``.
        notes: what its operators say, the descriptions of present outages included.
        ends: when a present outage is to end; None when nobody says.
    """

    status: str
    notes: tuple[str, ...] = ()
    ends: datetime.datetime | None = None

    @property
    def takes_jobs(self) -> bool:
        """Whether it makes sense to submit."""
        return self.status in ("active", "degraded")


class SuperfacilityClient:
    """One session with the API; use it in an ``async with``.

    Args:
        api_url: such as ``https://api.nersc.gov/api/v1.2``.
        token_url: where tokens come from.
        key: the client's key file (mode 0600), as the published client reads it.
        timeout: seconds a call may take.

    Raises:
        CredentialsError: the key file is missing, is no key file, or can be read by others.
    """

    def __init__(self, api_url: str, token_url: str, key: Path, *, timeout: float = TIMEOUT_S) -> None:
        self.url = api_url
        self._timeout = timeout
        self._machines: dict[str, AsyncCompute] = {}
        self._user: str | None = None
        if not key.is_file():
            raise CredentialsError(f"key file {key} does not exist: it is made in NERSC's Iris, and has mode 0600")
        try:
            self._client = _OnceClient(key=key, api_base_url=api_url, token_url=token_url)
        except (ClientKeyError, ValueError, KeyError, OSError) as error:
            words = getattr(error, "message", None) or error
            raise CredentialsError(f"key file {key} cannot be used: {words}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    @asynccontextmanager
    async def _call(self, limit_s: float | None = None) -> AsyncIterator[None]:
        """One exchange: bounded, and with errors that say whether asking again can help."""
        limit_s = self._timeout if limit_s is None else min(limit_s, self._timeout)
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError as error:
            raise UnreachableError(f"{self.url}: no answer within {limit_s:g} s") from error
        except OAuthError as error:
            raise AuthenticationError(f"{self.url}: gave no token: {error.error}: {error.description}") from error
        except SfApiError as error:
            raise self._said(str(error.message)) from error
        except _STATUS_ERRORS as error:
            response: httpx.Response = error.response  # type: ignore[attr-defined]  # both libraries' errors have it
            if response.status_code in (401, 403):
                raise AuthenticationError(f"{self.url}: refused us: {response.text[:500]}") from error
            raise refused(response) from error
        except _TRANSPORT_ERRORS as error:
            raise UnreachableError(f"{self.url}: cannot be reached: {type(error).__name__} {error}") from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise self._odd(error) from error
        except ValueError as error:
            if isinstance(error, PeerError):
                raise
            # json.JSONDecodeError: a gateway's page instead of an answer; or a key that signs nothing.
            raise self._odd(error) from error

    def _odd(self, error: Exception) -> ServiceError:
        words = f"{self.url}: answered what cannot be read: {str(error)[:500]}"
        return ServiceError(words, status=502, detail=words)

    def _said(self, words: str) -> ServiceError:
        status = 503 if _AWAY.search(words) else 422
        return ServiceError(f"{self.url}: {words[:2000]}", status=status, detail=words)

    async def _machine(self, machine: str) -> AsyncCompute:
        if machine not in self._machines:
            self._machines[machine] = await self._client.compute(Machine(machine))
        return self._machines[machine]

    # --- standing

    async def user(self) -> str:
        """Whom the key belongs to."""
        if self._user is None:
            async with self._call():
                self._user = str((await self._client.user()).name)
        return self._user

    async def standing(self, machine: str) -> MachineStanding:
        """How a machine stands now."""
        async with self._call():
            state = await self._client.resources.status(machine)
            outages = await self._client.resources.outages(machine)
        now = datetime.datetime.now(datetime.UTC)
        present = [
            one
            for one in outages
            if one.status is not None
            and one.status.value in ("Active", "Extended")
            and (one.start_at is None or _aware(one.start_at) <= now)
            and (one.end_at is None or _aware(one.end_at) > now)
        ]
        notes = [*(state.notes or []), *(one.description for one in present if one.description)]
        ends = [_aware(one.end_at) for one in present if one.end_at is not None]
        return MachineStanding(state.status.value, tuple(notes), max(ends, default=None))

    # --- jobs

    async def submit(self, machine: str, script: str) -> str:
        """Submit a script, and return the job's number.

        Raises:
            ServiceError: `status` 422: the scheduler does not take it.
        """
        async with self._call():
            job = await (await self._machine(machine)).submit_job(script)
            return str(job.jobid)

    async def find(self, machine: str, prefix: str) -> list[FacilityJob]:
        """Our jobs whose name begins so, as far as the queue and today's accounting know them; the newest first."""
        user = await self.user()
        async with self._call():
            compute = await self._machine(machine)
            queued = await compute.jobs(user=user, command="squeue")
            accounted = await compute.jobs(user=user, command="sacct")
        found = {one.jobid: _job(one) for one in (*accounted, *queued)}
        ours = [job for job in found.values() if job.name.startswith(prefix)]
        return sorted(ours, key=lambda job: int(re.sub(r"\D.*", "", job.id) or 0), reverse=True)

    async def job(self, machine: str, number: str) -> FacilityJob:
        """One job, from the queue, or from accounting when it has left the queue.

        Raises:
            ServiceError: `status` 404: neither knows it (yet, or any more).
        """
        # With a user the published client asks by itself. Without one it gathers questions in a task of its own, and
        # after a failed one waits for the answer for ever.
        user = await self.user()
        async with self._call():
            compute = await self._machine(machine)
            for command in ("squeue", "sacct"):
                for one in await compute.jobs(jobids=[number], user=user, command=command):
                    job = _job(one)
                    # The queue shows ended jobs for a while, without their exit code.
                    if job.id == number and (command == "sacct" or not job.is_final):
                        return job
        words = f"job {number}: neither the queue nor accounting of {machine} knows it"
        raise ServiceError(f"{self.url}: {words}", status=404, detail=words)

    async def cancel(self, machine: str, number: str) -> None:
        """Ask for a job's end."""
        async with self._call(CANCEL_S):
            await self._client.delete(f"compute/jobs/{machine}/{number}")

    # --- files

    async def files(self, machine: str, folder: str) -> dict[str, int]:
        """The regular files in a folder: name → bytes.

        Raises:
            ServiceError: `status` 404: it is not there.
        """
        async with self._call():
            try:
                entries = await (await self._machine(machine)).ls(folder)
            except SfApiError as error:
                raise self._missing(error) from error
        return {
            str(one.name).rpartition("/")[2]: int(one.size or 0) for one in entries if (one.perms or "").startswith("-")
        }

    async def size(self, machine: str, path: str) -> int:
        """The bytes of a file.

        Raises:
            ServiceError: `status` 404: it is not there.
        """
        found = await self.files(machine, path)
        return next(iter(found.values()), 0)

    async def upload(self, machine: str, path: str, data: bytes) -> None:
        """Put a file; its folder must be there."""
        async with self._call():
            try:
                await AsyncRemotePath(path=path, compute=await self._machine(machine)).upload(BytesIO(data))
            except SfApiError as error:
                raise self._missing(error) from error

    async def download(self, machine: str, path: str) -> bytes:
        """A file's bytes.

        Raises:
            ServiceError: `status` 404: it is not there.
        """
        async with self._call():
            try:
                file = await AsyncRemotePath(path=path, compute=await self._machine(machine)).download(binary=True)
            except SfApiError as error:
                raise self._missing(error) from error
            return bytes(file.read())

    def _missing(self, error: SfApiError) -> ServiceError:
        words = str(error.message)
        if "No such file" in words:
            return ServiceError(f"{self.url}: {words}", status=404, detail=words)
        return self._said(words)


def _job(one: Any) -> FacilityJob:
    name = getattr(one, "jobname", None) or getattr(one, "name", None) or ""
    state = one.state.value if isinstance(one.state, JobState) else str(one.state or "")
    return FacilityJob(str(one.jobid), name, state, getattr(one, "exitcode", None) or "")


def _aware(time: datetime.datetime) -> datetime.datetime:
    return time if time.tzinfo is not None else time.replace(tzinfo=datetime.UTC)
