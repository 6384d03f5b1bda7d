"""`JIDSlurmOperator` for DAGs written for LCLS' job interface: same constructor, same conf, same result.

By default the job goes through our job service. With a connection of type `jid` it goes to the ARP's job interface by
REST, as it always did.
"""

from __future__ import annotations

import getpass
import shlex
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowException, AirflowNotFoundException
from airflow.sdk.log import mask_secret

from lclstream_airflow.hooks.jid import JobInterfaceHook
from lclstream_airflow.hooks.patience import ServiceError
from lclstream_airflow.hooks.psik import PsikHook
from lclstream_airflow.hooks.service import ConnectionDefinitionError, UndefinedConnectionError
from lclstream_airflow.operators.documents import DocumentError
from lclstream_airflow.operators.psik import LONGEST_RESULT
from lclstream_airflow.operators.remote import Progress, Remote
from lclstream_airflow.operators.slurm import SlurmOperator
from lclstream_airflow.triggers.jid import JobInterfaceTrigger
from lclstream_airflow.triggers.psik import PsikJobTrigger

if TYPE_CHECKING:
    from airflow.sdk import Context

_LUTE = "/sdf/group/lcls/ds/tools/lute/latest"
_DOCUMENT_KEY = "lclstream_jid_document"
#: What a task prints that has failed although its job has not.
_FAILURES = ("executor:Task failed with return code:", "executor:Exiting after Task failure.")
#: The submit script of the workflows ends with an `sbatch … --wrap COMMAND`. In a job that the job service has
#: submitted already, this function in sbatch's place runs the command where it is.
_IN_PLACE = """\
#!/bin/bash
sbatch() {
    while [ $# -gt 0 ]; do
        case "$1" in
            --wrap) exec bash -c "$2" ;;
            --wrap=*) exec bash -c "${1#--wrap=}" ;;
        esac
        shift
    done
    echo "the submit script called sbatch without --wrap: there is nothing to run" >&2
    exit 2
}
export -f sbatch
"""


class JIDSlurmOperator(SlurmOperator):
    """Runs a managed task of an analysis workflow on batch nodes; the task's id is the managed task's name.

    It reads the DAG run's conf: ``experiment``, ``run_id``, ``user``, ``lute_location``, ``lute_params``
    (``config_file``, ``debug``), ``slurm_params`` (a list), ``kerb_file``, ``ARP_ROOT_JOB_ID``, ``ARP_LOCATION``,
    ``JID_UPDATE_COUNTERS``, ``Authorization``. XCom ``log`` holds the end of the job's log (at most 48 kB).

    :param user: whom the job interface runs the job as; default: this process' user. Our job service runs jobs as it
        is set up to, and takes no notice
    :param poke_interval: pause between two looks, in seconds
    :param max_cores: most processes: a larger ``--ntasks`` is lowered, a missing one becomes 1
    :param max_nodes: most nodes: ``--nodes=0-N``
    :param require_partition: partition, whatever the conf says
    :param custom_slurm_params: if not empty, these options of Slurm and none of the conf's
    :param job_conn_id: connection of type `psik` (our job service, default) or `jid` (the ARP's job interface)
    :param pass_authorization: put the conf's ``Authorization`` into the environment of the job, for tasks that write to
        the logbook themselves; it then lies in the job's folder at the job service, for the time of the job and after

    Further arguments: see :class:`.RemoteWorkOperator` and :class:`.PsikOperator`. A token in the conf is masked in
    logs; it never goes into XCom or a trigger: with a `jid` connection that names no token file the wait takes a
    worker.
    """

    template_fields: Sequence[str] = (
        "custom_slurm_params",
        "require_partition",
        "job_conn_id",
        *(name for name in SlurmOperator.template_fields if name != "psik_conn_id"),
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {}
    ui_color = "#006699"

    def __init__(
        self,
        *,
        user: str | None = None,
        poke_interval: float = 5.0,
        max_cores: int | None = None,
        max_nodes: int | None = None,
        require_partition: str | None = None,
        custom_slurm_params: str = "",
        job_conn_id: str = PsikHook.default_conn_name,
        pass_authorization: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(script="", poll_interval=poke_interval, **kwargs)
        self.user = user or getpass.getuser()
        self.poke_interval = poke_interval
        self.max_cores = max_cores
        self.max_nodes = max_nodes
        self.require_partition = require_partition
        self.custom_slurm_params = custom_slurm_params
        self.job_conn_id = job_conn_id
        self.pass_authorization = pass_authorization
        self._interface: JobInterfaceHook | None = None
        self._authorization: str | None = None
        #: What we ask the job interface for, and what it has answered.
        self._jid_request: dict[str, Any] = {}
        self._jid_document: dict[str, Any] = {}
        self._store: Any = None

    @property
    def lute_task_id(self) -> str:
        """The managed task: the task's id without its groups."""
        return self.task_id.rpartition(".")[2]

    # --- which way

    def _way(self, context: Context) -> JobInterfaceHook | None:
        """The job interface, when the connection is one; else the job service is used.

        Raises:
            ConnectionDefinitionError: there is no such connection, or it is of another type.
        """
        conf = _conf(context)
        authorization = conf.get("Authorization")
        if authorization:
            self._authorization = str(authorization)
            mask_secret(self._authorization)
            mask_secret(self._authorization.rpartition(" ")[2])
        try:
            kind = BaseHook.get_connection(self.job_conn_id).conn_type
        except AirflowNotFoundException as error:
            raise UndefinedConnectionError(
                f"connection {self.job_conn_id!r} is not defined: add one of type 'psik' or 'jid' (Admin, Connections)"
            ) from error
        if kind not in (PsikHook.conn_type, JobInterfaceHook.conn_type):
            raise ConnectionDefinitionError(
                f"connection {self.job_conn_id!r} is of type {kind!r}: take 'psik' or 'jid'"
            )
        self.psik_conn_id = self.job_conn_id
        self._store = context.get("task_state_store")
        self._interface = None
        if kind == JobInterfaceHook.conn_type:
            self._interface = JobInterfaceHook(self.job_conn_id, self._authorization)
        return self._interface

    def prepare(self, context: Context) -> None:
        """See :meth:`RemoteWorkOperator.prepare`."""
        interface = self._way(context)
        conf = _conf(context)
        lute, slurm = self._parameters(conf)
        submit = f"{conf.get('lute_location') or _LUTE}/launch_scripts/submit_slurm.sh"
        if interface is None:
            self.script = f"{_IN_PLACE}exec {shlex.join([submit, *lute, *slurm])}\n"
            self.sbatch_options = slurm
            self.job_name = self.job_name or self.lute_task_id
            self.environment = {**self._variables(conf), **(self.environment or {})}
            super().prepare(context)
            return
        interface.place()
        if not interface.has_token:
            if not self._authorization:
                raise DocumentError(
                    f"connection {self.job_conn_id!r} names no token_file, and the DAG run's conf has no Authorization"
                )
            if self.deferrable:
                self.log.info("The token is the DAG run's own: waiting in the worker, so that it stays out of triggers")
                self.deferrable = False
        definition = {
            "name": self.lute_task_id,
            "executable": submit,
            "trigger": "MANUAL",
            "location": conf.get("ARP_LOCATION") or "S3DF",
            "parameters": " ".join([*lute, *slurm]),
            "run_as_user": self.user,
        }
        self._jid_request = {
            "arp_root_job_id": conf.get("ARP_ROOT_JOB_ID"),
            "experiment": _needed(conf, "experiment"),
            "run_num": conf.get("run_id"),
            "user": conf.get("user"),
            "status": "",
            "tool_id": "",
            "def": definition,
        }

    def _parameters(self, conf: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Words for the submit script, and options of Slurm."""
        given = _needed(conf, "lute_params")
        if not isinstance(given, Mapping) or not given.get("config_file"):
            raise DocumentError("conf: lute_params: config_file is missing: the path of the workflow's configuration")
        lute = ["--taskname", self.lute_task_id, "--config", str(given["config_file"])]
        if given.get("debug"):
            lute.append("--debug")
        if conf.get("kerb_file"):
            lute += ["-K", str(conf["kerb_file"])]
        if self.custom_slurm_params:
            return lute, shlex.split(self.custom_slurm_params)
        words = _needed(conf, "slurm_params")
        if not isinstance(words, list | tuple):
            raise DocumentError(f"conf: slurm_params is {words!r}: a list of options is needed")
        return lute, self._limited([str(word) for word in words])

    def _limited(self, words: list[str]) -> list[str]:
        """The conf's options with this task's own limits; as ever, looked for in the form ``--name=value``."""
        given = dict(word.partition("=")[::2] for word in words)
        changes: dict[str, str] = {}
        if self.max_cores is not None:
            asked = given.get("--ntasks", "1")
            changes["--ntasks"] = str(min(int(asked), self.max_cores)) if asked.isdigit() else asked
        if self.max_nodes is not None:
            changes["--nodes"] = f"0-{self.max_nodes}"
        if self.require_partition:
            changes["--partition"] = self.require_partition
        kept = [
            f"{name}={changes.pop(name)}" if (name := word.partition("=")[0]) in changes else word for word in words
        ]
        return [*kept, *(f"{name}={value}" for name, value in changes.items())]

    def _variables(self, conf: Mapping[str, Any]) -> dict[str, str]:
        """What the ARP puts into the environment of its jobs."""
        root = conf.get("ARP_ROOT_JOB_ID")
        values = {
            "EXPERIMENT": conf.get("experiment"),
            "RUN_NUM": conf.get("run_id"),
            "ARP_LOCATION": conf.get("ARP_LOCATION"),
            "ARP_ROOT_JOB_ID": root,
            "ARP_JOB_ID": root,
            "JID_UPDATE_COUNTERS": conf.get("JID_UPDATE_COUNTERS"),
            "Authorization": self._authorization if self.pass_authorization else None,
        }
        return {name: str(value) for name, value in values.items() if value not in (None, "")}

    # --- the job

    def start(self, key: str) -> Remote:
        """See :meth:`RemoteWorkOperator.start`."""
        interface = self._interface
        if interface is None:
            return super().start(key)
        known = self._store.get(_DOCUMENT_KEY) if self._store is not None else None
        if isinstance(known, dict) and known.get("key") == key:
            self._jid_document = known["document"]
            number = str(self._jid_document["tool_id"])
            try:
                return self.state(number)
            except ServiceError as error:
                if error.status != 404:
                    raise
                return Remote(number, Progress.OVER)
        names = [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{key}/{part}")) for part in ("job", "definition", "def")]
        control = {**self._jid_request, "_id": names[0], "def_id": names[1]}
        control["def"] = {**control["def"], "_id": names[2]}
        experiment = str(control["experiment"])
        answer = interface.call(lambda client: client.start_job(experiment, control))
        self._jid_document = _without_tokens(answer)
        if self._store is not None:
            # The interface cannot be asked for a job by a key of ours; what it knows it by is written down.
            self._store.set(_DOCUMENT_KEY, {"key": key, "document": self._jid_document})
        return Remote(str(answer["tool_id"]), Progress.UNDER_WAY)

    def state(self, remote_id: str | int) -> Remote:
        """See :meth:`RemoteWorkOperator.state`."""
        if self._interface is None:
            return super().state(remote_id)
        known = self._interface.call(lambda client: client.status(self._jid_document))
        status = known.get("status")
        if status in ("FAILED", "EXITED"):
            return Remote(remote_id, Progress.OVER)
        return Remote(remote_id, Progress.SUCCEEDED if status == "DONE" else Progress.UNDER_WAY)

    def record(self, context: Context, remote_id: str | int) -> None:
        """See :meth:`RemoteWorkOperator.record`."""
        if self._interface is None:
            super().record(context, remote_id)
            return
        context["ti"].xcom_push(key="job_id", value=remote_id)
        self.log.info("Job %s of %s was given to the job interface", remote_id, self._jid_document.get("experiment"))

    def trigger(self, remote_id: str | int, deadline: float) -> PsikJobTrigger | JobInterfaceTrigger:  # type: ignore[override]
        """See :meth:`RemoteWorkOperator.trigger`."""
        if self._interface is None:
            return super().trigger(remote_id, deadline)
        return JobInterfaceTrigger(
            conn_id=self.job_conn_id,
            remote_id=str(remote_id),
            deadline=deadline,
            experiment=str(self._jid_document.get("experiment")),
            document=self._jid_document,
            poll_interval=self.poll_interval,
            patience_s=self.patience_s,
            on_kill_policy=self.on_kill_policy,
            authorization=None if self._interface.has_token else self._authorization,
        )

    def cancel(self, remote_id: str | int) -> None:
        """See :meth:`RemoteWorkOperator.cancel`."""
        if self._interface is None:
            super().cancel(remote_id)
            return
        document = self._jid_document
        self._interface.call(lambda client: client.kill(str(document.get("experiment")), document))

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """As Airflow does it: a new object, which first reads what the earlier one has written down."""
        if self._way(context) is not None and self._store is not None:
            self._jid_document = (self._store.get(_DOCUMENT_KEY) or {}).get("document", {})
        return super().resume_execution(next_method, next_kwargs, context)

    def on_kill(self) -> None:
        """See :meth:`RemoteWorkOperator.on_kill`."""
        if self._interface is not None and self._remote_id is None:
            # Asking again would start another job: the interface knows no keys.
            self.log.error("Killed before the job interface has said which job it started, if it did")
            return
        super().on_kill()

    def finish(self, context: Context, remote_id: str | int, facts: dict[str, Any]) -> dict[str, Any]:
        """Put the log's end into XCom, and look in it for a task that has failed although its job has not.

        Raises:
            AirflowException: there is such a line.
        """
        if self._interface is None:
            done = super().finish(context, remote_id, facts)
            with self.hook.get_conn() as client:
                logs = client.logs(str(remote_id), offset=-LONGEST_RESULT)
            log = "\n".join(logs[name] for name in sorted(logs) if name != "console")
        else:
            done = {**facts, "result": {}, "files": []}
            log = self._log()
            for line in log.splitlines():
                self.log.info("%s", line)
        context["ti"].xcom_push(key="log", value=self._cleaned(log))
        for words in _FAILURES:
            if words in log:
                raise AirflowException(f"job {remote_id} has ended, but its log says that the task failed: {words!r}")
        return done

    def explain(self, remote_id: str | int) -> str:
        """The last lines of the log."""
        if self._interface is None:
            return super().explain(remote_id)
        lines = self._cleaned(self._log()).strip().splitlines()
        return "; its log ends with:\n" + "\n".join(lines[-15:]) if lines else ""

    def _log(self) -> str:
        assert self._interface is not None
        document = self._jid_document
        return self._interface.call(lambda client: client.log(str(document.get("experiment")), document))

    def _cleaned(self, log: str) -> str:
        """The end of a log, without the token, should the task have printed it."""
        text = log[-LONGEST_RESULT:]
        token = (self._authorization or "").rpartition(" ")[2]
        return text.replace(token, "***") if len(token) > 4 else text


def _conf(context: Context) -> Mapping[str, Any]:
    conf: Mapping[str, Any] = context["dag_run"].conf or {}
    return conf


def _needed(conf: Mapping[str, Any], name: str) -> Any:
    if conf.get(name) in (None, "", {}, []):
        raise DocumentError(f"the DAG run's conf has no {name}: this operator is for DAG runs that the ARP has started")
    return conf[name]


def _without_tokens(document: Mapping[str, Any]) -> dict[str, Any]:
    """A job's document as it may be kept: an interface might repeat headers or tokens in it."""
    return {
        name: value for name, value in document.items() if not any(word in name.lower() for word in ("auth", "token"))
    }
