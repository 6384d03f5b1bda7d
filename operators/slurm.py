"""Run a batch script on a Slurm cluster, through its job service."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lclstream_airflow.hooks.psik import SbatchOptionError, directives, parse_options
from lclstream_airflow.operators.documents import DocumentError
from lclstream_airflow.operators.psik import PsikOperator

if TYPE_CHECKING:
    from airflow.sdk import Context


class SlurmOperator(PsikOperator):
    """Submits a batch script with Slurm's own words to a job service, and waits for it.

    The script's ``#SBATCH`` lines count; an argument wins over them. Nodes, processes, cores, GPUs per task and time
    become the job's resources. All other options become attributes, of which the service's configuration says which
    are allowed (`allow_attributes`): account, partition, QOS and the like must be there.

    :param script: the batch script: its text, or the absolute path of a file on the worker
    :param job_name: the job's name; default: the script's, else the task's id
    :param account: account to charge
    :param partition: partition
    :param qos: quality of service
    :param constraint: features of nodes
    :param reservation: reservation
    :param nodes: number of nodes, or a range such as ``"0-4"`` (which is an attribute, ``--nodes``)
    :param ntasks: number of processes, over all nodes
    :param ntasks_per_node: processes on each node
    :param cpus_per_task: cores for each process
    :param gpus_per_task: GPUs for each process
    :param walltime: longest run time: minutes, Slurm's forms (``"1:30:00"``, ``"2-0"``), or a `timedelta`; without one,
        and without ``--time`` in the script, the job service's default of 10 minutes
    :param exclusive: whether no other job may run on the same nodes
    :param sbatch_options: further options of sbatch: a list of words, or their text
    :param directory: folder to run in, if the service allows it; default: the job's own
    :param backend: which of the service's backends

    Further arguments: see :class:`.PsikOperator`, without `job`.
    """

    template_fields: Sequence[str] = (
        "script",
        "job_name",
        "account",
        "partition",
        "qos",
        "constraint",
        "reservation",
        "nodes",
        "ntasks",
        "ntasks_per_node",
        "cpus_per_task",
        "gpus_per_task",
        "walltime",
        "sbatch_options",
        "directory",
        "backend",
        *(name for name in PsikOperator.template_fields if name != "job"),
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"script": "bash", "values": "json", "environment": "json"}
    ui_color = "#e3f2d9"

    def __init__(
        self,
        *,
        script: str,
        job_name: str | None = None,
        account: str | None = None,
        partition: str | None = None,
        qos: str | None = None,
        constraint: str | None = None,
        reservation: str | None = None,
        nodes: int | str | None = None,
        ntasks: int | str | None = None,
        ntasks_per_node: int | str | None = None,
        cpus_per_task: int | str | None = None,
        gpus_per_task: int | str | None = None,
        walltime: float | str | datetime.timedelta | None = None,
        exclusive: bool = False,
        sbatch_options: Sequence[str] | str = (),
        directory: str | None = None,
        backend: str = "default",
        **kwargs: Any,
    ) -> None:
        super().__init__(job={}, **kwargs)
        self.script = script
        self.job_name = job_name
        self.account = account
        self.partition = partition
        self.qos = qos
        self.constraint = constraint
        self.reservation = reservation
        self.nodes = nodes
        self.ntasks = ntasks
        self.ntasks_per_node = ntasks_per_node
        self.cpus_per_task = cpus_per_task
        self.gpus_per_task = gpus_per_task
        self.walltime = walltime
        self.exclusive = exclusive
        self.sbatch_options = sbatch_options
        self.directory = directory
        self.backend = backend

    def prepare(self, context: Context) -> None:
        """See :meth:`RemoteWorkOperator.prepare`."""
        self.job = self._specification(_text(self.script))
        super().prepare(context)

    def _specification(self, script: str) -> dict[str, Any]:
        """The job as the job service wants it described."""
        try:
            options = parse_options([*directives(script), *self._words()])
        except SbatchOptionError as error:
            raise DocumentError(f"script and options: {error}") from error
        if options.output or options.error:
            raise DocumentError(
                "script: --output and --error: leave them out; the job service keeps the logs and shows them"
            )
        job: dict[str, Any] = {
            "name": self.job_name or options.name,
            "directory": self.directory or options.directory,
            "script": script,
            "resources": options.resources,
            "attributes": options.attributes,
            "backend": self.backend,
        }
        return {name: value for name, value in job.items() if value is not None}

    def _words(self) -> list[str]:
        """The arguments as options of sbatch."""
        given: Mapping[str, Any] = {
            "account": self.account,
            "partition": self.partition,
            "qos": self.qos,
            "constraint": self.constraint,
            "reservation": self.reservation,
            "nodes": self.nodes,
            "ntasks": self.ntasks,
            "ntasks-per-node": self.ntasks_per_node,
            "cpus-per-task": self.cpus_per_task,
            "gpus-per-task": self.gpus_per_task,
            "time": _time(self.walltime),
        }
        further = shlex.split(self.sbatch_options) if isinstance(self.sbatch_options, str) else self.sbatch_options
        words = [f"--{name}={value}" for name, value in given.items() if value not in (None, "", "None")]
        return [*words, *further, *(["--exclusive"] if self.exclusive else [])]


def _time(walltime: float | str | datetime.timedelta | None) -> str | None:
    if isinstance(walltime, datetime.timedelta):
        seconds = int(walltime.total_seconds())
        return f"{seconds // 60}:{seconds % 60:02d}"
    if isinstance(walltime, float):
        return f"{int(walltime * 60) // 60}:{int(walltime * 60) % 60:02d}"
    return None if walltime is None else str(walltime)


def _text(script: str) -> str:
    if script.lstrip().startswith("#!") or "\n" in script:
        return script.lstrip()
    path = Path(script.strip())
    if not path.is_absolute():
        raise DocumentError(f"script: {script[:200]!r} is neither a script (#!…) nor the absolute path of one")
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"script: {path} cannot be read on this worker: {error}") from error
