"""Run a batch job at a computing centre."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lclstream_airflow.hooks.patience import PeerError, ServiceError, insist
from lclstream_airflow.hooks.psik import JobClient, JobSpec, JobState, PsikHook, has_no_lease
from lclstream_airflow.hooks.results import read_json
from lclstream_airflow.links import JobLink
from lclstream_airflow.operators.documents import DocumentError, load_document
from lclstream_airflow.operators.lineage import lineage
from lclstream_airflow.operators.remote import START_PATIENCE_S, Progress, Remote, RemoteWorkOperator
from lclstream_airflow.triggers.polling import OnKill
from lclstream_airflow.triggers.psik import PsikJobTrigger

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

_JOB_LINK = JobLink()
#: Facts go through Airflow's database; anything longer is data.
LONGEST_RESULT = 48_000
_TAIL_BYTES = 8_192
_TAIL_LINES = 15


class PsikOperator(RemoteWorkOperator):
    """Submits a job to a job service, waits for it, and brings back its results.

    Results, in XCom: ``job_id`` at once, ``result`` at the end; the return value is ``{"job_id", "state", "info",
    "attempt", "queued_s", "run_s", "result": {…}, "files": [paths]}``.

    :param job: the job's specification: an object, its text in YAML or JSON, or the absolute path of a file on the
        worker
    :param values: what ``{{ name }}`` stands for in the specification's texts; use ``{{ name | quote }}`` in scripts,
        or better `environment`
    :param environment: variables for the script, beside those of the specification: the safe way to hand over what
        comes from elsewhere (in the script: ``"$NAME"``)
    :param input_files: files to put into the job's folder before it starts: name there → absolute path on the worker
    :param result_file: a JSON object that the job writes in its folder; it becomes ``result``. At most 48 kB: facts,
        not data. NaN and infinity become text. None: no result is expected
    :param output_files: patterns such as ``*.png`` of files in the job's folder to keep
    :param output_folder: where on the worker they are kept; needed with `output_files`
    :param follow_log: copy what the job prints into the task's log while it runs (our job service only)
    :param lease_s: the service ends the job when nobody has renewed its lease for that long, in seconds; the wait
        renews it. None, and with ``on_kill_policy="leave"``: no lease, so that only its own longest run time ends the
        job when Airflow is gone. The published psik-api knows no leases: there that holds in any case
    :param wait_for: ``"completed"`` (default), or ``"active"``: only until the job runs. It goes on then, and a later
        task has to keep its lease and to end it; no result is expected
    :param psik_conn_id: connection of type `psik`

    Further arguments: see :class:`.RemoteWorkOperator`. The job's longest run time is part of its specification
    (``resources: {duration: …}``, minutes) and holds also when Airflow is gone.
    """

    template_fields: Sequence[str] = (
        "job",
        "values",
        "environment",
        "input_files",
        "result_file",
        "output_files",
        "output_folder",
        "lease_s",
        "psik_conn_id",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"job": "yaml", "values": "json", "environment": "json"}
    operator_extra_links = (_JOB_LINK,)
    ui_color = "#e3f2d9"

    def __init__(
        self,
        *,
        job: Mapping[str, Any] | str,
        values: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        input_files: Mapping[str, str] | None = None,
        result_file: str | None = None,
        output_files: Sequence[str] = (),
        output_folder: str | None = None,
        follow_log: bool = True,
        lease_s: float | str | None = 300.0,
        wait_for: Literal["completed", "active"] = "completed",
        psik_conn_id: str = PsikHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job = job
        self.values = values
        self.environment = environment
        self.input_files = input_files
        self.result_file = result_file
        self.output_files = output_files
        self.output_folder = output_folder
        self.follow_log = follow_log
        self.lease_s = lease_s
        self.wait_for = wait_for
        self.psik_conn_id = psik_conn_id
        self._hook: PsikHook | None = None
        self._spec: JobSpec | None = None
        self._uploads: dict[str, bytes] = {}

    @property
    def hook(self) -> PsikHook:
        """The connection's hook."""
        if self._hook is None:
            self._hook = PsikHook(self.psik_conn_id)
        return self._hook

    def prepare(self, context: Context) -> None:
        """See :meth:`RemoteWorkOperator.prepare`."""
        document = self._document()
        environment = {name: str(value) for name, value in (self.environment or {}).items()}
        document["environment"] = {**(document.get("environment") or {}), **environment}
        document.setdefault("name", context["ti"].task_id)
        self._spec = JobSpec.model_validate(document)
        self._uploads = {name: _read(path) for name, path in (self.input_files or {}).items()}
        if self.output_files and not self.output_folder:
            raise DocumentError("output_files needs output_folder: the folder on the worker to keep them in")
        # Until there is a job, the button leads to the list of them.
        _JOB_LINK.record(context, self.hook.jobs_url())

    def _document(self) -> dict[str, Any]:
        """The specification, with its places filled."""
        return load_document(self.job, self.values or {}, "job")

    def start(self, key: str) -> Remote:
        """See :meth:`RemoteWorkOperator.start`."""
        assert self._spec is not None
        with self.hook.get_conn() as client:
            if not self._uploads:
                job_id = client.submit(self._spec, idempotency_key=key, lease_s=self._lease(), tags=self.tags)
                return Remote(job_id, _progress(client.state(job_id)))
            job_id = client.create(self._spec, idempotency_key=key, lease_s=self._lease(), tags=self.tags)
            state = client.state(job_id)
            if state is JobState.new:
                for name, data in self._uploads.items():
                    client.upload(job_id, name, data)
                    self._renew(client, job_id)
                client.start(job_id)
                state = client.state(job_id)
            return Remote(job_id, _progress(state))

    def state(self, remote_id: str | int) -> Remote:
        """See :meth:`RemoteWorkOperator.state`."""
        with self.hook.get_conn() as client:
            return Remote(remote_id, _progress(client.state(str(remote_id))))

    def record(self, context: Context, remote_id: str | int) -> None:
        """See :meth:`RemoteWorkOperator.record`."""
        context["ti"].xcom_push(key="job_id", value=remote_id)
        # For the page: which service knows that id.
        context["ti"].xcom_push(key="job_at", value={"id": remote_id, "connection": self.psik_conn_id})
        link = self.hook.job_url(str(remote_id))
        _JOB_LINK.record(context, link)
        self.log.info("Job %s: %s", remote_id, link)

    def trigger(self, remote_id: str | int, deadline: float) -> PsikJobTrigger:
        """See :meth:`RemoteWorkOperator.trigger`."""
        return PsikJobTrigger(
            conn_id=self.psik_conn_id,
            remote_id=str(remote_id),
            deadline=deadline,
            follow_log=self.follow_log,
            lease_s=self._lease(),
            until="active" if self.wait_for == "active" else "ended",
            poll_interval=self.poll_interval,
            patience_s=self.patience_s,
            on_kill_policy=self.on_kill_policy,
        )

    def lasts(self) -> Literal["task", "run"]:
        """See :meth:`RemoteWorkOperator.lasts`."""
        return "run" if self.wait_for == "active" else "task"

    def cancel(self, remote_id: str | int) -> None:
        """See :meth:`RemoteWorkOperator.cancel`."""
        with self.hook.get_conn() as client:
            client.cancel(str(remote_id))

    def finish(self, context: Context, remote_id: str | int, facts: dict[str, Any]) -> dict[str, Any]:
        """Fetch the result and the files to keep.

        Raises:
            DocumentError: the job has not written what is expected of it.
        """
        job_id = str(remote_id)
        if self.wait_for == "active":
            return {**facts, "result": {}, "files": []}
        with self.hook.get_conn() as client:
            if not self.follow_log:
                self._show_tail(client, job_id)
            result = self._result(client, job_id)
            files = self._keep_files(client, job_id)
        context["ti"].xcom_push(key="result", value=result)
        return {**facts, "result": result, "files": files}

    def explain(self, remote_id: str | int) -> str:
        """The last lines of what the job wrote to its error output, or to its output."""
        with self.hook.get_conn() as client:
            logs = client.logs(str(remote_id), offset=-_TAIL_BYTES)
        self._show(logs)
        for kind in ("stderr", "stdout", "console"):
            # Attempts count upwards; the newest tells why the job failed.
            for name in sorted((name for name in logs if name.startswith(kind)), key=_attempt, reverse=True):
                lines = logs[name].strip().splitlines()
                if lines:
                    return f"; its {name} ends with:\n" + "\n".join(lines[-_TAIL_LINES:])
        return ""

    def _lease(self) -> float | None:
        # Work that outlives its task must not depend on the task's renewals.
        if self.on_kill_policy is OnKill.LEAVE or self.lease_s in (None, "", "None"):
            return None
        return float(self.lease_s or 0)

    def _renew(self, client: JobClient, job_id: str) -> None:
        if (lease_s := self._lease()) is None:
            return
        try:
            client.renew(job_id, lease_s)
        except ServiceError as error:
            if not has_no_lease(error):
                raise

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:
        """The stream that the job was told of in its environment, and the files kept of it, for OpenLineage."""
        url = str((self.environment or {}).get("LCLSTREAM_URL") or "")
        kept = task_instance.xcom_pull(task_ids=self.task_id) or {}
        return lineage([(url, "stream")], [("file", path) for path in kept.get("files", [])])

    def _show_tail(self, client: JobClient, job_id: str) -> None:
        try:
            self._show(client.logs(job_id, offset=-_TAIL_BYTES))
        except (PeerError, ValueError) as error:
            # It is for people; a good job's results do not depend on it.
            self.log.warning("The log of job %s cannot be shown: %s", job_id, error)

    def _show(self, logs: Mapping[str, str]) -> None:
        for name in sorted(logs):
            for line in logs[name][-_TAIL_BYTES:].splitlines():
                self.log.info("[%s] %s", name, line)

    def _result(self, client: JobClient, job_id: str) -> dict[str, Any]:
        if not self.result_file:
            return {}
        name = self.result_file
        try:
            data = insist(lambda: client.download(job_id, name), limit_s=START_PATIENCE_S)
        except ServiceError as error:
            if error.status != 404:
                raise
            raise DocumentError(f"it has not written {name} in its folder") from error
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

    def _keep_files(self, client: JobClient, job_id: str) -> list[str]:
        if not self.output_files or not self.output_folder:
            return []
        folder = Path(self.output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = []
        for name, stat in sorted(client.files(job_id).items()):
            if stat.children is not False or not any(fnmatch.fnmatch(name, pattern) for pattern in self.output_files):
                continue
            target = _inside(folder, name)
            data = insist(lambda path=name: client.download(job_id, path), limit_s=START_PATIENCE_S)  # type: ignore[misc]
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.part")
            partial.write_bytes(data)
            # Whoever watches the folder never sees half a file.
            os.replace(partial, target)
            self.log.info("Kept %s (%d bytes)", target, len(data))
            kept.append(str(target))
        if not kept:
            raise DocumentError(f"it has left no file that matches {', '.join(self.output_files)}")
        return kept


def _progress(state: JobState) -> Progress:
    if not state.is_final:
        return Progress.UNDER_WAY
    return Progress.SUCCEEDED if state is JobState.completed else Progress.OVER


def _attempt(name: str) -> int:
    _, _, number = name.rpartition(".")
    return int(number) if number.isdigit() else 0


def _read(path: str) -> bytes:
    if not Path(path).is_absolute():
        raise DocumentError(f"input_files: {path!r} must be an absolute path on the worker")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DocumentError(f"input_files: {path} cannot be read on this worker: {error}") from error


def _inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder; a service's answer must not lead outside."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise DocumentError(f"the job service names a file {name!r}, which would be written outside {folder}")
    return folder.joinpath(*parts)
