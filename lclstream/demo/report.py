"""What a demonstration measured: shown as a table, written to ``summary.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table


class Summary(BaseModel):
    """The outcome of one demonstration; times in seconds since the run started on the logbook.

    Attributes:
        experiment: name of the experiment the run belongs to.
        run: run number.
        source: the file that was streamed.
        events_expected: events in that file.
        events_received: events that arrived at the analysis.
        events_unique: events that arrived there with different timestamps.
        bytes_received: size of the messages that arrived there.
        dag_run_id: the DAG run that the run processor made.
        dag_run_state: how it ended.
        run_start_to_dag_run_s: until the DAG run existed.
        run_start_to_first_event_s: until the analysis had the first event.
        run_start_to_result_s: until the results were on the logbook.
        elog_params: run parameters on the logbook at the end.
        tasks: task → state, as Airflow has them at the end.
        transfer_phases: the phases the transfer went through, as they were seen.
        result_png: the picture of the analysis.
        result_h5: its arrays.
        logs: folder with one log file a program.
        airflow_url: the user interface; it answers only while the demonstration is kept.
        left_behind: processes that had to be ended by force; empty when all ended by themselves.
        error: why the demonstration failed; none when it did not.
    """

    experiment: str | None = None
    run: int | None = None
    source: Path | None = None
    events_expected: int | None = None
    events_received: int | None = None
    events_unique: int | None = None
    bytes_received: int | None = None
    dag_run_id: str | None = None
    dag_run_state: str | None = None
    run_start_to_dag_run_s: float | None = None
    run_start_to_first_event_s: float | None = None
    run_start_to_result_s: float | None = None
    elog_params: dict[str, Any] = {}
    tasks: dict[str, str] = {}
    transfer_phases: list[str] = []
    result_png: Path | None = None
    result_h5: Path | None = None
    logs: Path | None = None
    airflow_url: str | None = None
    left_behind: list[str] = []
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every event arrived exactly once, the DAG run succeeded, and nothing was left behind."""
        return (
            self.error is None
            and self.events_expected is not None
            and self.events_expected == self.events_received == self.events_unique
            and self.dag_run_state == "success"
            and not self.left_behind
        )

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n")

    def show(self, console: Console) -> None:
        """Print it as a table."""
        table = Table(title="What happened", show_header=False, title_justify="left", min_width=72)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        rows: list[tuple[str, object]] = [
            ("run", f"{self.experiment} run {self.run}"),
            ("events in the run", self.events_expected),
            ("events analysed", f"{self.events_received} ({self.events_unique} different)"),
            ("data received", None if self.bytes_received is None else f"{self.bytes_received / 1e6:.1f} MB"),
            ("run start → DAG run", _seconds(self.run_start_to_dag_run_s)),
            ("run start → first event analysed", _seconds(self.run_start_to_first_event_s)),
            ("run start → results on the logbook", _seconds(self.run_start_to_result_s)),
            ("DAG run", f"{self.dag_run_id}: {self.dag_run_state}"),
            ("on the logbook", "\n".join(f"{key} = {value}" for key, value in self.elog_params.items())),
            ("picture", self.result_png),
            ("arrays", self.result_h5),
            ("logs", self.logs),
        ]
        for name, value in rows:
            if value not in (None, ""):
                table.add_row(name, str(value))
        console.print(table)


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} s"
