"""Jobs handed on to another job service, ours or a published psik-api, and followed there.

The event loop owns this object. The other service's history is the truth; its callback is only a reason to look at
once. The files of a job go there before it starts; its logs and results come here when it has ended, before its final
state is told to anybody, so that whoever sees the end can read them here.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from lclstream.jobs import confined
from lclstream.jobs.backends import BackendUnavailableError, RefusedError, SubmissionRejectedError, plans
from lclstream.jobs.client import AsyncJobClient
from lclstream.jobs.config import PsikBackend as PsikConfig
from lclstream.jobs.job import Job
from lclstream.jobs.machine import Fact, Report
from lclstream.jobs.models import BackendInfo, JobSpec, JobState, Transition
from lclstream.jobs.signatures import is_signed
from lclstream.security.credentials import Credentials
from lclstream.security.errors import CredentialsError, PeerError, ServiceError

log = logging.getLogger(__name__)

_FACTS = {
    JobState.queued: Fact.accepted,
    JobState.active: Fact.running,
    JobState.completed: Fact.succeeded,
    JobState.failed: Fact.broken,
    JobState.canceled: Fact.canceled,
}
#: Folders inside folders that are brought here.
_DEEPEST = 16
#: Errors of a disk or of this process that have nothing to do with the file that met them, and that may pass.
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class PsikBackend:
    """See the module's text.

    Args:
        config: its settings.
        credentials: the service's own certificate folder.

    Raises:
        CredentialsError: the folder to show there cannot be used.
    """

    def __init__(self, config: PsikConfig, credentials: Credentials) -> None:
        self._config = config
        self.poll_s = config.poll_s
        self._credentials = Credentials(config.credentials) if config.credentials is not None else credentials
        self._client: AsyncJobClient | None = None
        self._jobs: dict[str, Job] = {}
        self._canceled: set[str] = set()
        self._trouble = ""

    def check(self, spec: JobSpec) -> None:
        """See :class:`lclstream.jobs.backends.Backend`; attributes are judged by the other service."""
        if spec.directory is not None:
            raise RefusedError("directory: a job that is handed on runs in its own folder at the other site")

    def psik_backend(self) -> dict[str, object]:
        """See :class:`lclstream.jobs.backends.Backend`."""
        return {"type": "psik"}

    def info(self, name: str) -> BackendInfo:
        """See :class:`lclstream.jobs.backends.Backend`."""
        return BackendInfo(
            name=name,
            full_name=name,
            description=self._config.description,
            system_type="psik",
            status="unavailable" if self._trouble else "active",
            notes=[self._trouble] if self._trouble else [],
            configuration=self._config.model_dump(mode="json", exclude={"credentials"}),
        )

    async def start(self) -> None:
        """Open the client."""
        self._client = AsyncJobClient(
            self._config.url, self._credentials, prefix=self._config.prefix, timeout=self._config.timeout_s
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    @property
    def _there(self) -> AsyncJobClient:
        assert self._client is not None
        return self._client

    def told(self, native_id: str, body: bytes, signature: str | None) -> Job | None:
        """The job a callback is about, when it is signed with the secret we sent with that job."""
        job = self._jobs.get(native_id)
        if job is None:
            return None
        notes = plans.read(job.folder.control / "remote.json") or {}
        secret = notes.get("secret")
        return job if secret and is_signed(body, secret, signature) else None

    async def submit(self, job: Job) -> str:
        """Make the job there, send its files, start it. Its own folder is the idempotency key."""
        notes = self._notes(job)
        spec = job.spec()
        handed = JobSpec(
            name=spec.name,
            script=spec.script,
            environment=spec.environment,
            inherit_environment=spec.inherit_environment,
            resources=spec.resources,
            attributes=spec.attributes,
            backend=self._config.backend,
            callback=f"{self._config.callback_url}/jobs/callback" if self._config.callback_url else None,
            cb_secret=SecretStr(notes["secret"]) if self._config.callback_url else None,
        )
        try:
            native_id = notes.get("jobid")
            if native_id is None:
                native_id = await self._there.create(handed, idempotency_key=notes["key"])
                plans.replace(job.folder.control / "remote.json", {**notes, "jobid": native_id})
            job.folder.attempt(1).mkdir(exist_ok=True)
            self._jobs[native_id] = job
            for name in _names(Path(job.directory)):
                with confined.open_to_read(Path(job.directory), name) as file:
                    await self._there.upload(native_id, name, file.read())
            await self._there.start(native_id)
        except (PeerError, CredentialsError) as error:
            if isinstance(error, ServiceError) and not error.retry and error.status not in (401, 404, 409):
                raise SubmissionRejectedError(f"{self._config.url}: {error.detail}") from error
            self._trouble = str(error)
            raise BackendUnavailableError(str(error)) from error
        self._trouble = ""
        return native_id

    def _notes(self, job: Job) -> dict[str, Any]:
        path = job.folder.control / "remote.json"
        notes = plans.read(path)
        if notes is None:
            notes = {"key": f"{job.stamp}-{secrets.token_hex(8)}", "secret": secrets.token_hex(32)}
            plans.replace(path, notes)
        return notes

    async def observe(self, job: Job) -> list[Report]:
        """The other service's history, as facts."""
        native_id = job.native_id
        assert native_id is not None
        self._jobs[native_id] = job
        try:
            history = await self._there.history(native_id)
        except (PeerError, CredentialsError) as error:
            if isinstance(error, ServiceError) and error.status == 404:
                words = f"{self._config.url} no longer has the job {native_id}"
                return [Report(Fact.broken, job.last.time, job.jobndx, words)]
            self._trouble = str(error)
            raise BackendUnavailableError(str(error)) from error
        self._trouble = ""
        if history and history[-1].state.is_final:
            try:
                await self._fetch(job, native_id)
            except PeerError as error:
                if error.retry:
                    raise BackendUnavailableError(str(error)) from error
                log.error("job %s: its logs and results stay at the other site: %s", job.stamp, error)
            self._jobs.pop(native_id, None)
            self._canceled.discard(native_id)
        return [_report(line, native_id) for line in history if line.state in _FACTS]

    async def cancel(self, job: Job) -> None:
        """Ask the other service, once."""
        native_id = job.native_id
        if native_id is None or native_id in self._canceled:
            return
        try:
            await self._there.cancel(native_id)
        except (PeerError, CredentialsError) as error:
            raise BackendUnavailableError(str(error)) from error
        self._canceled.add(native_id)

    # --- results

    async def _fetch(self, job: Job, native_id: str) -> None:
        """Bring logs and results here. What cannot be kept here is named in the console log.

        Raises:
            PeerError, OSError: it may go better later.
        """
        # Written at the end: a fetch that is repeated says it once.
        stays: list[str] = []
        try:
            logs = await self._there.logs(native_id)
        except (PeerError, ValueError) as error:
            stays.append(_lasting(error, "log/"))
            logs = {}
        for name, text in logs.items():
            try:
                if confined.parts_of(name) != [name]:
                    raise confined.OutsideFolderError(f"{name!r} is no name of a log")
                _keep(job.folder.log, name, text.encode(errors="replace"))
            except (OSError, ValueError) as error:
                stays.append(_lasting(error, f"log/{name}"))
        left = self._config.fetch_bytes
        async for name, size in self._results(native_id, "", _DEEPEST, stays):
            if size > left:
                stays.append(f"{name} ({size} bytes): `fetch_bytes` allows {left} more")
                continue
            left -= size
            try:
                # A name that cannot be one here is not worth the download.
                confined.parts_of(name)
                _keep(Path(job.directory), name, await self._there.download(native_id, name))
            except (OSError, ValueError) as error:
                stays.append(_lasting(error, name))
        if stays:
            log.warning("job %s: %d of its logs and results stay at %s", job.stamp, len(stays), self._config.url)
            with open(job.folder.log / "console", "a", encoding="utf-8", errors="replace") as console:
                console.writelines(f"stays at {self._config.url}, job {native_id}: {one}\n" for one in stays)

    async def _results(
        self, native_id: str, folder: str, depth: int, stays: list[str]
    ) -> AsyncIterator[tuple[str, int]]:
        if self._config.fetch_bytes == 0:
            return
        try:
            listed = await self._there.files(native_id, folder)
        except (PeerError, ValueError) as error:
            stays.append(_lasting(error, f"{folder}/"))
            return
        for name, status in listed.items():
            path = f"{folder}/{name}" if folder else name
            if status.children is False:
                yield path, status.size
            elif depth > 0:
                async for found in self._results(native_id, path, depth - 1, stays):
                    yield found
            else:
                stays.append(f"{path}/: too many folders in each other")


def _keep(root: Path, name: str, data: bytes) -> None:
    with confined.replacing(root, name) as file:
        file.write(data)


def _lasting(error: Exception, name: str) -> str:
    """What to say of a file that will never come here; an error that may pass is raised again."""
    if isinstance(error, PeerError):
        if error.retry or not isinstance(error, ServiceError):
            raise error
    elif isinstance(error, OSError) and error.errno in _PASSING:
        raise error
    return f"{name}: {(error.strerror if isinstance(error, OSError) else None) or error}"


def _report(line: Transition, native_id: str) -> Report:
    # There `queued` names what the other service's own scheduler calls the job. Here it is the job's id at that
    # service, by which we go on asking when its scheduler has put the job back into its queue.
    info = native_id if line.state is JobState.queued else line.info
    # The published service writes attempt 0 for a cancellation.
    return Report(_FACTS[line.state], line.time, line.jobndx or None, info)


def _names(root: Path) -> list[str]:
    """Regular files below a folder, by name; links are left out."""
    found = []
    for folder, _, names in os.walk(root, followlinks=False):
        for name in names:
            path = Path(folder) / name
            if path.is_file() and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
    return sorted(found)
