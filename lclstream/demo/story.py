"""The loop, step by step: what is started, what a person would do, and what then happens by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console

from lclstream.api.client import TransferClient
from lclstream.api.models import TransferInfo
from lclstream.arp.names import dag_run_id
from lclstream.consumers.summary_file import ResultDocument
from lclstream.demo.data import EXPERIMENT, RUN, RunDescription, describe, simulate, stream_configuration
from lclstream.demo.processes import START_S, Children, DemoError
from lclstream.demo.report import Summary
from lclstream.demo.services import DAG_ID, WORKFLOW, Services
from lclstream.demo.workspace import Workspace
from lclstream.elog.client import ElogClient
from lclstream.elog.models import Trigger
from lclstream.jobs.client import JobClient
from lclstream.security.errors import PeerError, UnreachableError

#: Seconds the DAG run may take once the run has started.
RUN_TIMEOUT_S = 300.0
_RESULTS = {"result_json": "result.json", "result_h5": "result.h5", "result_png": "result.png"}


@dataclass(frozen=True)
class Options:
    """What the user asked for; see ``lclstream demo --help``."""

    data: Path | None = None
    kafka: str | None = None
    events: int = 200
    ranks: int = 2
    keep: bool = False
    folder: Path = Path(".lclstream/demo")


def play(options: Options, console: Console) -> Summary:
    """Run the demonstration; everything it started has ended when this returns or raises.

    Returns:
        What was measured. ``summary.ok`` tells whether all went well; a failure is in ``summary.error``.
    """
    summary = Summary()
    try:
        workspace = Workspace(options.folder)
    except DemoError as error:
        summary.error = str(error)
        console.print(f"[bold red]failed[/]: {summary.error}", markup=True)
        return summary
    summary.logs = workspace.logs
    children = Children(workspace.logs, {})
    story = _Story(options, workspace, children, console, summary)
    try:
        story.tell()
        summary.write(workspace.summary)
        summary.show(console)
        if options.keep:
            story.keep()
    except (DemoError, PeerError) as error:
        summary.error = str(error)
    finally:
        story.say("stopping everything")
        story.close()
        summary.left_behind = children.stop()
        summary.write(workspace.summary)
        workspace.release()
    if summary.error is not None:
        console.print("[bold red]failed[/]: ", end="")
        console.print(summary.error, markup=False, soft_wrap=True)
        console.print(f"logs: {workspace.logs}", markup=False, soft_wrap=True)
    elif summary.left_behind:
        console.print("[bold red]left behind, and ended by force[/]: " + "; ".join(summary.left_behind))
    elif not summary.ok:
        console.print("[bold red]not every event arrived exactly once[/]: see the table above and the logs")
    else:
        console.print(f"[bold green]done[/]: the picture is {summary.result_png}", soft_wrap=True)
    return summary


class _Story:
    """State of one demonstration. Only the main thread uses it."""

    def __init__(
        self, options: Options, workspace: Workspace, children: Children, console: Console, summary: Summary
    ) -> None:
        self._options = options
        self._workspace = workspace
        self._children = children
        self._console = console
        self._summary = summary
        self._services: Services | None = None
        self._started = time.monotonic()
        self._run_started = 0.0

    def say(self, text: str) -> None:
        """One line of progress, with the seconds since the start."""
        # Wrapped lines would break paths that people copy.
        self._console.print(f"[dim]{time.monotonic() - self._started:6.1f} s[/]  {text}", soft_wrap=True)

    def close(self) -> None:
        """Close what the story holds itself."""
        if self._services is not None:
            self._services.close()

    def tell(self) -> None:
        """All steps, in order."""
        path = self._data_file()
        writing = None
        if self._options.data is None:
            self.say(f"writing a run of {self._options.events} events: {path}")
            writing = simulate(self._children, path, self._options.events)

        self.say("making certificates for the sites s3df and olcf")
        services = self._services = Services(self._workspace, self._children, ranks=self._options.ranks)
        self.say(
            f"{'using Kafka at ' + self._options.kafka if self._options.kafka else 'starting Kafka'}; "
            "starting the logbook, the job services, the transfer API"
        )
        services.start(self._options.kafka)
        self.say("starting Airflow: database, scheduler, triggerer, DAG processor, API server")
        services.airflow.start(self._children)
        self._summary.airflow_url = services.airflow.url

        if writing is not None:
            self._children.finish(writing, timeout=120)
        description = describe(self._children, path)
        main = description.image() or description.waveform()
        assert main is not None, "describe() has refused such a file"
        self.say(
            f"the run: {description.experiment} run {description.run}, {description.events} events, "
            f"{main[0].name} {main[0].chain(main[1])} {main[1].shape} {main[1].dtype}"
        )
        self._summary.experiment, self._summary.run = description.experiment, description.run
        self._summary.source, self._summary.events_expected = path, description.events

        self._children.wait_until(services.ready, timeout=START_S, what="our services answer")
        services.define_workflow(description.experiment, stream_configuration(description, path))
        services.start_run_processor(description.experiment)
        self._children.wait_until(
            lambda: services.airflow.ready(DAG_ID),
            timeout=START_S,
            every=0.5,
            what="Airflow is healthy and knows the DAG",
        )
        self._children.wait_until(services.reading_runs, timeout=START_S, what="the run processor reads Kafka")
        self.say(f"everything is up; Airflow is at {services.airflow.url}")

        self._stream(services, description)

    def _data_file(self) -> Path:
        if self._options.data is not None:
            return self._options.data.resolve()
        return self._workspace / f"data/{EXPERIMENT}-r{RUN:04d}.xtc2"

    def _stream(self, services: Services, description: RunDescription) -> None:
        experiment, run = description.experiment, description.run
        with ElogClient(services.elog_url, services.beamline) as elog:
            self._run_started = time.time()
            elog.start_run(experiment, run_num=run)
            self.say(f"[bold]run {run} of {experiment} starts on the logbook[/]; from here on nothing is done by hand")
            run_id = self._dag_run(services, experiment, run)
            transfer = self._follow(services, run_id, lambda: elog.end_run(experiment))
            self._collect(services, run_id, transfer)
            self._summary.elog_params = elog.run(experiment, run).parameters()

    def _dag_run(self, services: Services, experiment: str, run: int) -> str:
        """Wait for the DAG run of this run; its id is known beforehand."""
        run_id = dag_run_id(experiment, run, Trigger.START_OF_RUN, WORKFLOW)
        self._children.wait_until(
            lambda: services.airflow.dag_run(DAG_ID, run_id) is not None,
            timeout=START_S,
            what=f"the DAG run {run_id} exists",
        )
        made = services.airflow.dag_run(DAG_ID, run_id)
        assert made is not None, "it was there a moment ago"
        queued = datetime.fromisoformat(made["queued_at"])
        self._summary.dag_run_id = run_id
        self._summary.run_start_to_dag_run_s = round(queued.timestamp() - self._run_started, 3)
        self.say(f"the run processor made the DAG run {run_id} after {self._summary.run_start_to_dag_run_s:.1f} s")
        return run_id

    def _follow(self, services: Services, run_id: str, end_run: Callable[[], object]) -> TransferInfo:
        """Watch tasks and transfer until the DAG run ends; end the run once its last event has left the detector."""
        shown: dict[str, str] = {}
        transfer: TransferInfo | None = None
        ended = False

        def finished() -> bool:
            nonlocal transfer, ended
            for task, state in services.airflow.tasks(DAG_ID, run_id).items():
                if shown.get(task) != state and state not in ("none", "scheduled", "queued"):
                    self.say(f"task {task}: {state}")
                shown[task] = state
            transfer = self._transfer(services, run_id) or transfer
            if transfer is not None:
                phases = self._summary.transfer_phases
                if not phases or phases[-1] != transfer.phase.value:
                    phases.append(transfer.phase.value)
                    counts = f"{transfer.metrics.recvd} messages in, {transfer.metrics.sent} out"
                    self.say(f"transfer {transfer.id}: {transfer.phase.value} ({counts})")
                if not ended and transfer.phase.value in ("draining", "done"):
                    end_run()
                    ended = True
                    self.say("the run ends on the logbook")
            dag_run = services.airflow.dag_run(DAG_ID, run_id) or {}
            self._summary.dag_run_state = dag_run.get("state", self._summary.dag_run_state)
            return self._summary.dag_run_state in ("success", "failed")

        self._children.wait_until(finished, timeout=RUN_TIMEOUT_S, every=0.3, what=f"the DAG run {run_id} ends")
        self._summary.run_start_to_result_s = round(time.time() - self._run_started, 3)
        self._summary.tasks = shown
        if not ended:
            end_run()
        if self._summary.dag_run_state != "success":
            raise DemoError(self._why_failed(services, run_id, shown))
        if transfer is None:
            raise DemoError(f"the DAG run {run_id} succeeded without a transfer: see {self._workspace.logs}")
        return transfer

    def _transfer(self, services: Services, run_id: str) -> TransferInfo | None:
        """The transfer that the DAG asked for, as the API has it now."""
        made = services.airflow.xcom(DAG_ID, run_id, "request_stream", "transfer_id")
        if made is None:
            return None
        try:
            with TransferClient(services.api_url, services.airflow_credentials) as api:
                return api.info(int(made))
        except UnreachableError:
            # Too busy to answer now; whether the service is alive is checked besides.
            return None

    def _why_failed(self, services: Services, run_id: str, tasks: dict[str, str]) -> str:
        """The failed tasks, each with the errors in its log."""
        lines = [f"the DAG run {run_id} failed"]
        for task in (task for task, state in tasks.items() if state == "failed"):
            log = services.airflow.task_log(run_id, task)
            lines.append(f"task {task} failed; its log is {log}")
            if log is not None:
                lines += services.airflow.errors_in(log)[-3:]
        return "\n".join(lines)

    def _collect(self, services: Services, run_id: str, transfer: TransferInfo) -> None:
        """Fetch what the analysis wrote at the other site, and count."""
        result = services.airflow.xcom(DAG_ID, run_id, "analyse")
        if not isinstance(result, dict) or "job_id" not in result:
            raise DemoError(f"the task `analyse` of {run_id} has published no job id")
        files: dict[str, Path] = {}
        with JobClient(services.olcf_jobs_url, services.airflow_credentials) as jobs:
            for kind, name in _RESULTS.items():
                path = self._workspace / f"results/{name}"
                path.write_bytes(jobs.download(str(result["job_id"]), name))
                files[kind] = path
        counted = ResultDocument.model_validate_json(files["result_json"].read_bytes())
        self._summary.result_png, self._summary.result_h5 = files["result_png"], files["result_h5"]
        self._summary.events_received = counted.events
        self._summary.events_unique = counted.events_unique
        self._summary.bytes_received = counted.bytes
        if counted.first_event_unix_s is not None:
            self._summary.run_start_to_first_event_s = round(counted.first_event_unix_s - self._run_started, 3)

    def keep(self) -> None:
        """Leave everything running until a stop signal arrives, or a program dies."""
        assert self._services is not None, "tell() has made it"
        airflow = self._services.airflow
        self._console.print(
            f"\nEverything is still running. Airflow: [bold]{airflow.url}[/]  login {airflow.login}, "
            f"password {airflow.password_file.read_text()}\nCtrl-C stops it."
        )
        while True:
            self._children.check()
            time.sleep(0.5)
