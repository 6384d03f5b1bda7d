"""Put results where the experimenters look: onto the run in the logbook, its workflow's line there, or a comment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator, XComArg
from airflow.sdk.exceptions import AirflowFailException

from lclstream_airflow.hooks.elog import ElogError, ElogHook, run_number
from lclstream_airflow.hooks.patience import PeerError, insist
from lclstream_airflow.hooks.verdict import task_error
from lclstream_airflow.links import RunLink
from lclstream_airflow.operators.lineage import announce, lineage
from lclstream_airflow.operators.remote import START_PATIENCE_S

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

_RUN_LINK = RunLink()
#: The run table shows a value in one cell.
_LONGEST_TEXT = 1000
#: What a template gives for something that is not there.
_EMPTY = (None, "", "None")


class ElogOperator(BaseOperator):
    """Writes run parameters, counters of a workflow job, and a comment, into the logbook.

    All may be written again without harm, so the task may be retried and cleared: a comment that is there already, with
    the same text for the same run, is not written a second time. Returns the parameters as written.

    :param experiment: the experiment's name
    :param run: the run's number; only a comment may be without one, and belongs to the experiment then
    :param run_params: name → value. Nested objects become ``outer_inner``; lists and None are left out (the run table
        has one cell for a value), and long texts are cut
    :param only: names of the parameters to write, as a list or its JSON text; None or empty: all of them
    :param prefix: put before every parameter's name
    :param job_id: the logbook's id of the workflow job that this DAG run belongs to; None or empty: `counters` and
        `status` are not written
    :param counters: name → value, shown beside the workflow job while it runs
    :param status: the workflow job's status, such as ``RUNNING`` or ``DONE``
    :param files: paths of files to register in the run's file catalogue, as a list or its JSON text; with `location`
    :param location: the logbook's name of the place where `files` are; None or empty: nothing is registered
    :param comment: a text for the logbook's entries of the run; None or empty: no comment
    :param comment_title: its title
    :param comment_tags: its tags, each one word, as a list or separated by blanks; `lclstream backfill --tag` finds the
        run by them
    :param elog_conn_id: connection of type `elog`
    """

    template_fields: Sequence[str] = (
        "experiment",
        "run",
        "run_params",
        "only",
        "prefix",
        "job_id",
        "counters",
        "status",
        "files",
        "location",
        "comment",
        "comment_title",
        "comment_tags",
        "elog_conn_id",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"run_params": "json", "counters": "json"}
    operator_extra_links = (_RUN_LINK,)
    ui_color = "#f6efd8"

    def __init__(
        self,
        *,
        experiment: str,
        run: int | str | None = None,
        run_params: Mapping[str, Any] | XComArg | None = None,
        only: Sequence[str] | str | None = None,
        prefix: str = "",
        job_id: str | None = None,
        counters: Mapping[str, Any] | None = None,
        status: str | None = None,
        files: Sequence[str] | str | None = None,
        location: str | None = None,
        comment: str | None = None,
        comment_title: str | None = None,
        comment_tags: Sequence[str] | str = (),
        elog_conn_id: str = ElogHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.experiment = experiment
        self.run = run
        self.run_params = run_params
        self.only = only
        self.prefix = prefix
        self.job_id = job_id
        self.counters = counters
        self.status = status
        self.files = files
        self.location = location
        self.comment = comment
        self.comment_title = comment_title
        self.comment_tags = comment_tags
        self.elog_conn_id = elog_conn_id

    def execute(self, context: Context) -> dict[str, Any]:
        """Write.

        Raises:
            AirflowFailException: the logbook refuses, or an argument is wrong; trying again would not help.
            AirflowException: the logbook cannot be reached.
        """
        if self._has_nothing_to_say():
            self.log.info("Nothing is to be written")
            return {}
        try:
            hook = ElogHook(self.elog_conn_id)
            parameters = self._parameters()
            if not self._is_without_run():
                _RUN_LINK.record(context, hook.run_url(self.experiment, self.run or ""))
                insist(lambda: self._write(hook, parameters), limit_s=START_PATIENCE_S)
            if (self.comment or "").strip():
                insist(lambda: self._say(hook), limit_s=START_PATIENCE_S)
        except ElogError as error:
            raise AirflowFailException(str(error)) from error
        except (PeerError, ValueError) as error:
            raise task_error(error) from error
        if not self._is_without_run():
            files = _list_of_texts("files", self.files)
            announce(self, context, self.experiment, {"run": self.run, "parameters": parameters, "files": files})
        return parameters

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:
        """The run in the logbook, for OpenLineage."""
        del task_instance
        if self.run in _EMPTY:
            return lineage([], [])
        return lineage([], [(ElogHook(self.elog_conn_id).endpoint().base_url, f"{self.experiment}/run/{self.run}")])

    def _has_nothing_to_say(self) -> bool:
        return not (self._about_the_run() or (self.comment or "").strip())

    def _about_the_run(self) -> bool:
        return bool(self.run_params or self.counters or self.status or (self.files and self.location))

    def _is_without_run(self) -> bool:
        return self.run in _EMPTY and not self._about_the_run()

    def _parameters(self) -> dict[str, Any]:
        if self.run_params is not None and not isinstance(self.run_params, Mapping):
            raise ValueError(
                f"run_params is a {type(self.run_params).__name__}, not an object: hand over a task's output "
                "(`XComArg(task, key='result')`), not its text"
            )
        needed = {"experiment": self.experiment} | ({} if self._is_without_run() else {"run": self.run})
        for name, value in needed.items():
            if value in _EMPTY:
                raise ValueError(f"{name} is empty: it says where in the logbook to write")
        wanted = set(_list_of_texts("only", self.only))
        pairs = self._flat(self.run_params or {})
        missing = wanted - {name for name, _ in pairs}
        if missing:
            self.log.warning("Not among the parameters: %s", ", ".join(sorted(missing)))
        return {self.prefix + name: value for name, value in pairs if not wanted or name in wanted}

    def _flat(self, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
        pairs: list[tuple[str, Any]] = []
        for name, value in values.items():
            if isinstance(value, Mapping):
                pairs += [(f"{name}_{inner}", leaf) for inner, leaf in self._flat(value)]
            elif isinstance(value, bool | int | float):
                pairs.append((name, value))
            elif isinstance(value, str):
                pairs.append((name, value[:_LONGEST_TEXT]))
            else:
                self.log.info("%s is no single value and is left out", name)
        return pairs

    def _write(self, hook: ElogHook, parameters: Mapping[str, Any]) -> None:
        with hook.get_conn() as client:
            if parameters:
                client.add_run_params(self.experiment, parameters, run_number(self.run or ""))
                self.log.info("Run %s of %s: %d parameters written", self.run, self.experiment, len(parameters))
            if self.job_id not in _EMPTY and (self.counters or self.status):
                counters = [{"key": name, "value": value} for name, value in (self.counters or {}).items()]
                client.update_workflow_job(
                    self.experiment, str(self.job_id), status=self.status or None, counters=counters or None
                )
                self.log.info("Workflow job %s: status and counters written", self.job_id)
            run = run_number(self.run or "")
            for path in _list_of_texts("files", self.files) if self.location else ():
                client.register_file(self.experiment, path, run)
                client.file_available_at_location(self.experiment, run, path, self.location or "")
                self.log.info("%s is registered as being at %s", path, self.location)

    def _say(self, hook: ElogHook) -> None:
        text = (self.comment or "").strip()
        tags = self.comment_tags.split() if isinstance(self.comment_tags, str) else list(self.comment_tags)
        number = None if self.run in _EMPTY else run_number(self.run or "")
        with hook.get_conn() as client:
            # An entry cannot be taken back, and the answer to an earlier try may have been lost.
            for entry in client.elog_entries(self.experiment):
                if (entry.content.strip(), entry.run_num, entry.title or "") == (
                    text,
                    number,
                    self.comment_title or "",
                ):
                    self.log.info("Run %s of %s has this comment already", self.run, self.experiment)
                    return
            client.new_elog_entry(self.experiment, text, number, title=self.comment_title or None, tags=tags)
            self.log.info("Run %s of %s: comment written", self.run, self.experiment)


def _list_of_texts(name: str, given: Sequence[str] | str | None) -> list[str]:
    texts: Any = given
    if isinstance(texts, str) and texts.strip():
        try:
            texts = json.loads(texts)
        except ValueError as error:
            raise ValueError(f"{name} is {given!r}, no list: {error}") from error
    if texts and not (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"{name} is {given!r}: it must be a list of texts")
    return list(texts or ())
