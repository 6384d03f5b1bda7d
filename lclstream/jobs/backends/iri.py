"""Jobs at a DOE facility, by its IRI facility API (the compute part, which versions 1 and 2 have in common).

The event loop owns this object. The API starts a program, and takes no files with it: the script travels as an argument
of a shell, which writes it into a folder of its own at the facility and runs it there. What it prints stays there, too,
in a file that the job's console log names; the API's ways to files differ between its versions and facilities.

A submission carries an idempotency key. Where the facility keeps none (501), and after an answer that was lost, the job
is looked for by its name, which holds our folder's.
"""

from __future__ import annotations

import logging
import math
import stat
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from lclstream import __version__
from lclstream.jobs.backends import BackendUnavailableError, RefusedError, SubmissionRejectedError, plans
from lclstream.jobs.config import IriBackend as IriConfig
from lclstream.jobs.job import Job
from lclstream.jobs.machine import Fact, Report
from lclstream.jobs.models import BackendInfo, JobSpec

log = logging.getLogger(__name__)

_FACTS = {
    "queued": Fact.accepted,
    "held": Fact.accepted,
    "active": Fact.running,
    "completed": Fact.succeeded,
    "failed": Fact.broken,
    "canceled": Fact.canceled,
}
#: Attributes, in the words of our Slurm backend, that have a place of their own in the API's job.
_PLACES = {"--partition": "queue_name", "--account": "account", "--reservation": "reservation_id"}
#: A job the API does not know for this long is gone, in seconds.
_GONE_AFTER_S = 120.0
#: Most jobs the API lists in one answer.
_PAGE = 1000
#: $1 is the script, the rest the program that reads it.
_LAUNCH = (
    'mkdir -p "$base" && cd "$base" && printf %s "$1" > script && chmod 700 script || exit 71; shift; '
    'export jobid="${SLURM_JOB_ID:-${PBS_JOBID:-0}}"; exec "$@" ./script'
)


class IriBackend:
    """See the module's text.

    Args:
        config: its settings.
    """

    def __init__(self, config: IriConfig) -> None:
        self._config = config
        self.poll_s = config.poll_s
        self._client: httpx.AsyncClient | None = None
        self._missing: dict[str, float] = {}
        self._canceled: set[str] = set()
        self._trouble = ""

    def check(self, spec: JobSpec) -> None:
        """See :class:`lclstream.jobs.backends.Backend`."""
        if spec.directory is not None:
            raise RefusedError("directory: a job at this facility runs in a folder of its own there")
        for name in spec.attributes:
            if name not in self._config.allow_attributes:
                allowed = ", ".join(sorted(self._config.allow_attributes)) or "none"
                raise RefusedError(f"attributes: {name}: this backend does not allow it; allowed: {allowed}")
        if spec.resources.duration > self._config.max_duration_min:
            raise ValueError(
                f"resources.duration: {spec.resources.duration} min, "
                f"and this backend allows {self._config.max_duration_min:g}"
            )

    def psik_backend(self) -> dict[str, object]:
        """See :class:`lclstream.jobs.backends.Backend`."""
        return {"type": "iri"}

    def info(self, name: str) -> BackendInfo:
        """See :class:`lclstream.jobs.backends.Backend`."""
        return BackendInfo(
            name=name,
            full_name=name,
            description=self._config.description,
            system_type="iri",
            status="unavailable" if self._trouble else "active",
            notes=[self._trouble] if self._trouble else [],
            configuration=self._config.model_dump(mode="json", exclude={"token_file"}),
        )

    def told(self, native_id: str, body: bytes, signature: str | None) -> Job | None:
        """The API sends no callbacks."""
        return None

    async def start(self) -> None:
        """Open the client."""
        self._client = httpx.AsyncClient(
            base_url=f"{self._config.url}{self._config.prefix}/compute",
            headers={"user-agent": f"lclstream/{__version__}", "accept": "application/json"},
            timeout=self._config.timeout_s,
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    # --- jobs

    async def submit(self, job: Job) -> str:
        """Start the job there. Its own folder's name says which it is."""
        path = job.folder.control / "remote.json"
        notes = plans.read(path) or {"key": str(uuid.uuid4()), "asked": False}
        if (known := notes.get("jobid")) is not None:
            return str(known)
        spec = job.spec()
        if any(Path(job.directory).iterdir()):
            raise SubmissionRejectedError(
                "files were uploaded for the job, and nothing takes them to this facility: put them there by other "
                "means, or into the script"
            )
        found = await self._find(job, spec) if notes["asked"] else None
        if found is None:
            # Written down first: what was asked for may run, also when the answer is lost.
            plans.replace(path, {**notes, "asked": True})
            found = await self._post(spec, job, str(notes["key"]))
        plans.replace(path, {**notes, "asked": True, "jobid": found})
        job.folder.attempt(1).mkdir(exist_ok=True)
        with open(job.folder.log / "console", "a") as console:
            console.write(f"what it prints is at {self._config.url}: {self._output(job)}\n")
        return found

    async def _post(self, spec: JobSpec, job: Job, key: str) -> str:
        document = self._document(spec, job)
        path = f"/job/{self._resource}"
        response = await self._ask("POST", path, json=document, headers={"idempotency-key": key})
        if response.status_code == 501:
            response = await self._ask("POST", path, json=document)
        if response.status_code in (400, 403, 404, 413, 422):
            raise SubmissionRejectedError(f"{self._config.url}: {_words(response)}")
        answer = self._read(response)
        if not isinstance(answer, dict) or not isinstance(answer.get("id"), str):
            raise self._away(f"answered what is no job: {str(answer)[:200]}")
        return str(answer["id"])

    async def _find(self, job: Job, spec: JobSpec) -> str | None:
        """The id of a job whose submission was not answered; None when the facility has none of its name."""
        wanted = _name(job, spec)
        for offset in range(0, 100 * _PAGE, _PAGE):
            query = {"historical": "true", "include_spec": "true", "limit": str(_PAGE), "offset": str(offset)}
            listed = self._read(await self._ask("POST", f"/status/{self._resource}", params=query))
            if not isinstance(listed, list):
                raise self._away(f"answered what is no list of jobs: {str(listed)[:200]}")
            for one in listed:
                if isinstance(one, dict) and (one.get("job_spec") or {}).get("name") == wanted:
                    return str(one["id"])
            if len(listed) < _PAGE:
                break
        return None

    async def observe(self, job: Job) -> list[Report]:
        """What the facility says."""
        native_id = job.native_id
        assert native_id is not None
        path = f"/status/{self._resource}/{quote(native_id, safe='')}"
        response = await self._ask("GET", path, params={"historical": "true"})
        if response.status_code == 404:
            since = self._missing.setdefault(job.stamp, time.monotonic())
            if time.monotonic() - since < _GONE_AFTER_S:
                return []
            del self._missing[job.stamp]
            return [Report(Fact.broken, time.time(), info=f"{self._config.url} no longer has the job {native_id}")]
        self._missing.pop(job.stamp, None)
        answer = self._read(response)
        status = (answer.get("status") or {}) if isinstance(answer, dict) else {}
        fact = _FACTS.get(str(status.get("state")))
        if fact is None:
            return []
        when = status.get("time")
        report = Report(
            fact,
            float(when) if isinstance(when, int | float) and math.isfinite(when) else time.time(),
            None,
            self._info(fact, status, native_id),
        )
        if fact in (Fact.succeeded, Fact.broken, Fact.canceled):
            self._canceled.discard(native_id)
        return [report]

    def _info(self, fact: Fact, status: dict[str, Any], native_id: str) -> str:
        if fact is Fact.accepted:
            return native_id
        if fact is Fact.running:
            return self._config.resource
        code = status.get("exit_code")
        if fact is Fact.succeeded:
            return str(code or 0)
        return str(code) if isinstance(code, int) and code != 0 else str(status.get("message") or "")

    async def cancel(self, job: Job) -> None:
        """Ask the facility, once."""
        native_id = job.native_id
        if native_id is None or native_id in self._canceled:
            return
        response = await self._ask("DELETE", f"/cancel/{self._resource}/{quote(native_id, safe='')}")
        if response.status_code != 404 and response.status_code >= 400:
            raise self._away(_words(response))
        self._canceled.add(native_id)

    # --- the API's words

    @property
    def _resource(self) -> str:
        return quote(self._config.resource, safe="")

    def _base(self, job: Job) -> str:
        return f"{self._config.directory.rstrip('/')}/{job.stamp}"

    def _output(self, job: Job) -> str:
        return f"{self._base(job)}.out"

    def _document(self, spec: JobSpec, job: Job) -> dict[str, Any]:
        resources = spec.resources
        needs = {
            "node_count": resources.node_count,
            "process_count": resources.process_count,
            "processes_per_node": resources.processes_per_node,
            "cpu_cores_per_process": resources.cpu_cores_per_process,
            "gpu_cores_per_process": resources.gpu_cores_per_process or None,
            "exclusive_node_use": resources.exclusive_node_use,
        }
        placed = {_PLACES[name]: value for name, value in spec.attributes.items() if name in _PLACES}
        attributes: dict[str, Any] = {
            "duration": max(1, math.ceil(60 * resources.duration)),
            "queue_name": self._config.queue_name,
            "account": self._config.project_name,
            "reservation_id": self._config.reservation_id,
            **placed,
        }
        custom = {name.lstrip("-"): value for name, value in spec.attributes.items() if name not in _PLACES}
        ours = {"base": self._base(job), "jobndx": "1", "mpirun": self._config.mpirun}
        ours["nodes"] = str(resources.node_count or 1)
        return {
            "executable": "/bin/sh",
            "arguments": ["-c", _LAUNCH, "sh", spec.script, *plans.interpreter(spec.script)],
            "directory": self._config.directory,
            "name": _name(job, spec),
            "inherit_environment": spec.inherit_environment,
            "environment": {**spec.environment, **ours},
            "stdout_path": self._output(job),
            "stderr_path": self._output(job),
            "resources": {name: value for name, value in needs.items() if value is not None},
            "attributes": {
                **{name: value for name, value in attributes.items() if value is not None},
                **({"custom_attributes": custom} if custom else {}),
            },
        }

    async def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """One exchange; every doubt is an error that is tried again.

        Raises:
            BackendUnavailableError: the facility cannot be asked now, or refuses our token.
        """
        assert self._client is not None
        headers = {"authorization": f"Bearer {self._token()}", **more.pop("headers", {})}
        try:
            response = await self._client.request(method, path, headers=headers, **more)
        except httpx.HTTPError as error:
            raise self._away(f"{type(error).__name__} {error}") from error
        if response.status_code in (401, 409, 429) or (response.status_code >= 500 and response.status_code != 501):
            raise self._away(_words(response))
        self._trouble = ""
        return response

    def _read(self, response: httpx.Response) -> Any:
        if response.status_code >= 300:
            raise self._away(_words(response))
        try:
            return response.json()
        except ValueError as error:
            raise self._away("answered what is no JSON") from error

    def _away(self, words: str) -> BackendUnavailableError:
        self._trouble = f"{self._config.url}: {words}"
        return BackendUnavailableError(self._trouble)

    def _token(self) -> str:
        """Read at each use: tokens of facilities live for a day or two, and are renewed by others."""
        file = self._config.token_file.expanduser()
        try:
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                raise self._away(f"token_file {file} can be read by others: chmod 600 {file}")
            token = file.read_text().strip()
        except OSError as error:
            if isinstance(error, BackendUnavailableError):
                raise
            raise self._away(f"token_file {file}: {error.strerror}") from error
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise self._away(f"token_file {file} does not hold one line with a token")
        return token


def _name(job: Job, spec: JobSpec) -> str:
    return f"{(spec.name or 'lclstream')[:64]}-{job.stamp}"


def _words(response: httpx.Response) -> str:
    """What the API says of an error (RFC 9457)."""
    try:
        document = response.json()
    except ValueError:
        document = {}
    detail = document.get("detail") or document.get("title") if isinstance(document, dict) else None
    return f"{response.status_code}: {str(detail or response.text)[:1000]}"
