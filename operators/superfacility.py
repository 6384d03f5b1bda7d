"""Run a batch job at NERSC, through the Superfacility API."""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.exceptions import AirflowException

from lclstream_airflow.hooks.patience import PeerError, ServiceError, UnreachableError, insist
from lclstream_airflow.hooks.results import read_json
from lclstream_airflow.hooks.superfacility import (
    FacilityJob,
    MachineStanding,
    SbatchOptionError,
    SuperfacilityClient,
    SuperfacilityHook,
    directives,
)
from lclstream_airflow.hooks.verdict import task_error
from lclstream_airflow.links import JobLink
from lclstream_airflow.operators.documents import DocumentError
from lclstream_airflow.operators.lineage import lineage
from lclstream_airflow.operators.psik import LONGEST_RESULT
from lclstream_airflow.operators.remote import START_PATIENCE_S, Progress, Remote, RemoteWorkOperator
from lclstream_airflow.triggers.polling import WaitStatus
from lclstream_airflow.triggers.superfacility import (
    LONGEST_LOG,
    SuperfacilityJobTrigger,
    SuperfacilityStandingTrigger,
)

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

_JOB_LINK = JobLink()
_TAIL_LINES = 15
#: A submission without an answer may still be on its way through the API's own queue, in seconds.
SETTLE_S = 5.0
#: Between two looks at a machine that is not there, in seconds.
_OUTAGE_POLL_S = 60.0
#: Beyond the deadline that the trigger watches itself, Airflow's own one, in seconds.
_BACKSTOP_S = 60.0
_SHELLS = ("sh", "bash", "dash", "ksh", "zsh")
#: Options by which we find a job and its log again, in all their spellings.
_OURS = re.compile(r"--(job-name|chdir|output)(=|$)|-[JDo]")

#: What may stand in a ``#SBATCH`` line as it is.
_FOLDER = re.compile(r"/[A-Za-z0-9_./@+=,:-]*")


class OutagePolicy(StrEnum):
    """What happens when the machine takes no jobs."""

    WAIT = "wait"
    FAIL = "fail"


class SuperfacilityOperator(RemoteWorkOperator):
    """Submits a batch script to a machine of NERSC's, waits for the job, and brings back its results.

    Before anything is sent, the machine's state and outages are looked at. The job's name holds a key of this task, by
    which a task that runs again finds its job instead of submitting a second one.

    Results, in XCom: ``job_id`` at once, ``result`` at the end; the return value is ``{"job_id", "machine", "name",
    "state", "exit_code", "result": {…}, "files": [paths]}``.

    :param script: the batch script, with its ``#SBATCH`` lines: its text, or the absolute path of a file on the worker.
        Job name, working folder and output file are set by this operator
    :param folder: absolute path of an existing folder at the facility, where the job runs and its log is written
    :param job_name: beginning of the job's name; default: the task's id
    :param environment: variables for the script (sh, bash and their kin only): the safe way to hand over what comes
        from elsewhere. They are part of the script that is sent: no secrets
    :param input_files: files to put into `folder` before the job is submitted: name there → absolute path on the worker
    :param result_file: a JSON object that the job writes in `folder`; it becomes ``result``. At most 48 kB: facts, not
        data. NaN and infinity become text. None: no result is expected
    :param output_files: patterns such as ``*.png`` of files in `folder` to keep
    :param output_folder: where on the worker they are kept; needed with `output_files`
    :param follow_log: copy what the job prints into the task's log while it runs, as long as it is below 1 MiB
    :param outage_policy: ``"wait"`` (default) until the machine takes jobs, or ``"fail"`` at once
    :param outage_timeout_s: how long to wait for the machine, in seconds
    :param machine: ``perlmutter``; None: what the connection says
    :param superfacility_conn_id: connection of type `superfacility`

    Further arguments: see :class:`.RemoteWorkOperator`; here `poll_interval` is 10 s by default, out of respect for the
    facility. The API knows no leases: when Airflow is gone for good, the script's own ``--time`` ends the job.
    """

    template_fields: Sequence[str] = (
        "script",
        "folder",
        "job_name",
        "environment",
        "input_files",
        "result_file",
        "output_files",
        "output_folder",
        "machine",
        "superfacility_conn_id",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"script": "bash", "environment": "json"}
    operator_extra_links = (_JOB_LINK,)
    ui_color = "#d9e6f2"

    def __init__(
        self,
        *,
        script: str,
        folder: str,
        job_name: str | None = None,
        environment: Mapping[str, str] | None = None,
        input_files: Mapping[str, str] | None = None,
        result_file: str | None = None,
        output_files: Sequence[str] = (),
        output_folder: str | None = None,
        follow_log: bool = True,
        outage_policy: OutagePolicy | str = OutagePolicy.WAIT,
        outage_timeout_s: float = 24 * 3600.0,
        machine: str | None = None,
        superfacility_conn_id: str = SuperfacilityHook.default_conn_name,
        poll_interval: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(poll_interval=poll_interval, **kwargs)
        self.script = script
        self.folder = folder
        self.job_name = job_name
        self.environment = environment
        self.input_files = input_files
        self.result_file = result_file
        self.output_files = output_files
        self.output_folder = output_folder
        self.follow_log = follow_log
        self.outage_policy = OutagePolicy(outage_policy)
        self.outage_timeout_s = outage_timeout_s
        self.machine = machine
        self.superfacility_conn_id = superfacility_conn_id
        self._hook: SuperfacilityHook | None = None
        self._text = ""
        self._uploads: dict[str, bytes] = {}

    @property
    def hook(self) -> SuperfacilityHook:
        """The connection's hook."""
        if self._hook is None:
            self._hook = SuperfacilityHook(self.superfacility_conn_id)
        return self._hook

    def _where(self) -> str:
        return self.machine or self.hook.place().machine

    # --- is the machine there?

    def execute(self, context: Context) -> dict[str, Any]:
        """Wait for the machine if need be, submit, wait for the job.

        Raises:
            AirflowFailException: it would fail in the same way if it were tried again.
            AirflowException: it failed, or the machine takes no jobs; `retries` may help.
        """
        try:
            self.prepare(context)
            machine = self._where()
            standing = insist(lambda: self.hook.call(lambda client: client.standing(machine)), limit_s=START_PATIENCE_S)
        except (PeerError, ValueError) as error:
            raise task_error(error) from error
        for note in standing.notes:
            self.log.info("%s: %s", machine, note)
        if standing.takes_jobs:
            return _run(self, context)
        words = _describe(machine, standing)
        if self.outage_policy is OutagePolicy.FAIL:
            raise AirflowException(f"{words}; nothing was submitted (outage_policy is 'fail')")
        self.log.info("%s; waiting for it for at most %.0f s", words, self.outage_timeout_s)
        trigger = SuperfacilityStandingTrigger(
            conn_id=self.superfacility_conn_id,
            remote_id=machine,
            deadline=time.time() + self.outage_timeout_s,
            poll_interval=max(self.poll_interval, _OUTAGE_POLL_S) if self.poll_interval >= 1 else self.poll_interval,
            patience_s=self.patience_s,
        )
        if self.deferrable:
            backstop = self.outage_timeout_s + self.patience_s + _BACKSTOP_S
            self.defer(trigger=trigger, method_name="submit_after_outage", timeout=timedelta(seconds=backstop))
        return self.submit_after_outage(context, asyncio.run(trigger.wait()))

    def submit_after_outage(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        """Continue when the machine is there.

        Raises:
            AirflowException: it is not, and the time to wait for it is over.
        """
        if WaitStatus(event["status"]) is not WaitStatus.REACHED:
            raise AirflowException(f"{event['message']}; nothing was submitted")
        self.log.info("%s", event["message"])
        return _run(self, context)

    # --- the job

    def prepare(self, context: Context) -> None:
        """See :meth:`RemoteWorkOperator.prepare`."""
        if not _FOLDER.fullmatch(self.folder):
            raise DocumentError(
                f"folder: {self.folder!r}: the absolute path of a folder at the facility is needed, without spaces"
            )
        text = self.script if self.script.lstrip().startswith("#!") else _read("script", self.script.strip()).decode()
        text = text.lstrip().replace("\r\n", "\n")
        if not text.startswith("#!"):
            raise DocumentError("script: its first line must name its interpreter, such as #!/bin/bash")
        try:
            found = [word for word in directives(text) if _OURS.match(word)]
        except SbatchOptionError as error:
            raise DocumentError(f"script: {error}") from error
        if found:
            raise DocumentError(
                f"script: #SBATCH {found[0]}: leave it out; the arguments job_name and folder say where the job is, "
                "and its log is slurm-JOBID.out in that folder"
            )
        self._text = _with_environment(text, {name: str(value) for name, value in (self.environment or {}).items()})
        self._uploads = {
            _name(name): _read("input_files", path) for name, path in sorted((self.input_files or {}).items())
        }
        if self.output_files and not self.output_folder:
            raise DocumentError("output_files needs output_folder: the folder on the worker to keep them in")
        self.hook.place()
        self.job_name = self.job_name or context["ti"].task_id

    def start(self, key: str) -> Remote:
        """See :meth:`RemoteWorkOperator.start`."""
        machine = self._where()
        prefix, name = self._names(key)

        async def find_or_submit(client: SuperfacilityClient) -> Remote:
            known = await client.find(machine, prefix)
            live = [job for job in known if not job.is_final]
            for other in live[:-1]:
                # Two submissions of one request, the answer to one of which was lost: the first one stays.
                self.log.warning("job %s is a second one of %s: cancelled", other.id, live[-1].id)
                await client.cancel(machine, other.id)
            found = live[-1] if live else next(iter(known), None)
            if found is not None and found.name == name:
                return Remote(found.id, _progress(found))
            if live:
                words = f"job {live[-1].id} runs another script under this key"
                raise ServiceError(words, status=409, detail=words)
            for file, data in self._uploads.items():
                await client.upload(machine, f"{self.folder}/{file}", data)
            number = await client.submit(machine, self._script(name))
            return Remote(number, Progress.UNDER_WAY)

        try:
            return self.hook.call(find_or_submit)
        except UnreachableError:
            time.sleep(SETTLE_S)
            raise

    def _names(self, key: str) -> tuple[str, str]:
        """The job's name up to this task's key, and the whole, which also tells scripts apart."""
        beginning = re.sub(r"[^A-Za-z0-9_.-]", "-", self.job_name or "job")[:40]
        prefix = f"{beginning}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        digest = hashlib.sha256(self._text.encode())
        for name, data in self._uploads.items():
            digest.update(name.encode() + b"\0" + data)
        return prefix, f"{prefix}-{digest.hexdigest()[:8]}"

    def _script(self, name: str) -> str:
        first, _, rest = self._text.partition("\n")
        ours = (f"--job-name={name}", f"--chdir={self.folder}", f"--output={self._log_path('%j')}")
        return "\n".join([first, *(f"#SBATCH {option}" for option in ours), rest])

    def _log_path(self, number: str) -> str:
        return f"{self.folder.rstrip('/')}/slurm-{number}.out"

    def state(self, remote_id: str | int) -> Remote:
        """See :meth:`RemoteWorkOperator.state`."""
        machine = self._where()
        return Remote(remote_id, _progress(self.hook.call(lambda client: client.job(machine, str(remote_id)))))

    def record(self, context: Context, remote_id: str | int) -> None:
        """See :meth:`RemoteWorkOperator.record`."""
        context["ti"].xcom_push(key="job_id", value=remote_id)
        link = self.hook.job_url(self._where(), str(remote_id))
        _JOB_LINK.record(context, link)
        self.log.info("Job %s at %s; its log: %s", remote_id, self._where(), self._log_path(str(remote_id)))

    def trigger(self, remote_id: str | int, deadline: float) -> SuperfacilityJobTrigger:
        """See :meth:`RemoteWorkOperator.trigger`."""
        return SuperfacilityJobTrigger(
            conn_id=self.superfacility_conn_id,
            remote_id=str(remote_id),
            deadline=deadline,
            machine=self._where(),
            log_path=self._log_path(str(remote_id)) if self.follow_log else None,
            poll_interval=self.poll_interval,
            patience_s=self.patience_s,
            on_kill_policy=self.on_kill_policy,
        )

    def cancel(self, remote_id: str | int) -> None:
        """See :meth:`RemoteWorkOperator.cancel`."""
        machine = self._where()
        self.hook.call(lambda client: client.cancel(machine, str(remote_id)))

    def finish(self, context: Context, remote_id: str | int, facts: dict[str, Any]) -> dict[str, Any]:
        """Fetch the result and the files to keep.

        Raises:
            DocumentError: the job has not written what is expected of it.
        """
        result = self._result()
        files = self._keep_files()
        context["ti"].xcom_push(key="result", value=result)
        return {**facts, "result": result, "files": files}

    def explain(self, remote_id: str | int) -> str:
        """The last lines of the job's log."""
        path = self._log_path(str(remote_id))
        machine = self._where()

        async def tail(client: SuperfacilityClient) -> bytes:
            if await client.size(machine, path) > 16 * LONGEST_LOG:
                return b""
            return await client.download(machine, path)

        try:
            lines = self.hook.call(tail).decode(errors="replace").strip().splitlines()
        except ServiceError:
            return f"; it has left no log {path}"
        return f"; {path} ends with:\n" + "\n".join(lines[-_TAIL_LINES:]) if lines else ""

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:
        """The stream that the job was told of in its environment, its input files and those kept, for OpenLineage."""
        url = str((self.environment or {}).get("LCLSTREAM_URL") or "")
        kept = task_instance.xcom_pull(task_ids=self.task_id) or {}
        inputs = [(url, "stream"), *(("file", path) for path in (self.input_files or {}).values())]
        return lineage(inputs, [("file", path) for path in kept.get("files", [])])

    def _download(self, name: str) -> bytes:
        machine, path = self._where(), f"{self.folder.rstrip('/')}/{name}"
        return insist(lambda: self.hook.call(lambda client: client.download(machine, path)), limit_s=START_PATIENCE_S)

    def _result(self) -> dict[str, Any]:
        if not self.result_file:
            return {}
        name = self.result_file
        try:
            data = self._download(name)
        except ServiceError as error:
            if error.status != 404:
                raise
            raise DocumentError(f"it has not written {name} in {self.folder}") from error
        if len(data) > LONGEST_RESULT:
            raise DocumentError(
                f"its {name} has {len(data)} bytes, more than {LONGEST_RESULT}: keep data with output_files, and only "
                "facts in the result file"
            )
        try:
            result = read_json(data)
        except ValueError as error:
            raise DocumentError(f"its {name} is not JSON: {error}") from error
        if not isinstance(result, dict):
            raise DocumentError(f"its {name} holds a {type(result).__name__}, not an object")
        return result

    def _keep_files(self) -> list[str]:
        if not self.output_files or not self.output_folder:
            return []
        machine = self._where()
        folder = Path(self.output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        there = insist(
            lambda: self.hook.call(lambda client: client.files(machine, self.folder)), limit_s=START_PATIENCE_S
        )
        kept = []
        for name in sorted(there):
            if not any(fnmatch.fnmatch(name, pattern) for pattern in self.output_files):
                continue
            target = folder / _name(name)
            partial = target.with_name(f".{target.name}.part")
            partial.write_bytes(self._download(name))
            # Whoever watches the folder never sees half a file.
            os.replace(partial, target)
            self.log.info("Kept %s (%d bytes)", target, there[name])
            kept.append(str(target))
        if not kept:
            raise DocumentError(f"it has left no file that matches {', '.join(self.output_files)} in {self.folder}")
        return kept


def _run(operator: SuperfacilityOperator, context: Context) -> dict[str, Any]:
    """What the base class executes, past Airflow's guard against operators that execute others.

    The guard takes a task that was resumed for such another one, and warns.
    """
    execute: Any = RemoteWorkOperator.execute
    done: dict[str, Any] = execute.__wrapped__(operator, context)
    return done


def _progress(job: FacilityJob) -> Progress:
    if not job.is_final:
        return Progress.UNDER_WAY
    return Progress.SUCCEEDED if job.has_succeeded else Progress.OVER


def _describe(machine: str, standing: MachineStanding) -> str:
    notes = f": {'; '.join(standing.notes)}" if standing.notes else ""
    ends = f" (until {standing.ends:%Y-%m-%d %H:%M %Z})" if standing.ends else ""
    return f"{machine} is {standing.status}{ends}{notes}"


def _with_environment(text: str, environment: Mapping[str, str]) -> str:
    """A script that sets variables before its first command."""
    if not environment:
        return text
    lines = text.splitlines()
    if not any(PurePosixPath(word).name in _SHELLS for word in lines[0][2:].split()):
        raise DocumentError(f"environment: {lines[0]} is no shell; write the values into the script, or use one")
    for name in environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise DocumentError(f"environment: {name!r} is no name of a variable")
    first = next((number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*lines[:first], *exports, *lines[first:], ""])


def _name(name: str) -> str:
    """A plain file name; neither side may lead the other out of its folder."""
    if not name or "/" in name or name in (".", "..") or not name.isprintable():
        raise DocumentError(f"{name!r}: a plain file name is needed, without folders")
    return name


def _read(what: str, path: str) -> bytes:
    if not Path(path).is_absolute():
        raise DocumentError(f"{what}: {path[:200]!r} must be an absolute path on the worker")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DocumentError(f"{what}: {path} cannot be read on this worker: {error}") from error
