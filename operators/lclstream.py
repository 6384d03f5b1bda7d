"""Ask for a stream of an experiment's data; end one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException

from lclstream_airflow.hooks.lclstream import LCLStreamHook, TransferInfo, TransferPhase, TransferStatus
from lclstream_airflow.hooks.patience import PeerError, ServiceError, insist
from lclstream_airflow.links import TransferLink
from lclstream_airflow.operators.documents import load_document
from lclstream_airflow.operators.lineage import announce, lineage
from lclstream_airflow.operators.remote import START_PATIENCE_S, Progress, Remote, RemoteWorkOperator
from lclstream_airflow.triggers.lclstream import LCLStreamTransferTrigger, Until

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

_TRANSFER_LINK = TransferLink()
#: What the service does not take in a transfer's name.
_NO_NAME = re.compile(r"[^A-Za-z0-9._:-]+")
_LONGEST_NAME = 128


class LCLStreamTransferOperator(RemoteWorkOperator):
    """Asks the transfer service for a stream, and waits until it can be pulled from or until it is done.

    The service starts a buffer and then the engine, which reads the events, packs them and sends them to the buffer.
    Consumers pull from the transfer's URL, which is known as soon as the service has answered.

    Results, in XCom: ``transfer_id`` and ``url`` at once; the return value has them too, with ``phase`` and the counts
    of messages and bytes.

    :param config: the engine's configuration: an object, its text in YAML or JSON, or the absolute path of a file on
        the worker. Its `data_handlers` are replaced by the service
    :param values: what ``{{ name }}`` stands for in the configuration's texts, such as ``{"run": 7}``
    :param ranks: MPI ranks of the engine; None: the service's default
    :param transfer_name: a name to find the transfer by; None: made of DAG and run. Other characters than letters,
        digits and ``. _ : -`` become ``-``
    :param wait_for: ``"ready"`` (default): until consumers can connect; ``"complete"``: until everything was delivered
        and the transfer's ports are free. Somebody must pull for that
    :param on_no_consumer: what the buffer does while nobody pulls: ``"wait"`` (default): it holds up the engine when
        its memory is full; ``"spill"``: it goes on into files, and keeps what nobody ever pulls; ``"prefer_spill"``:
        into files where the service can do that, otherwise it waits
    :param lease_s: the service ends the transfer when nobody has renewed its lease for that long, in seconds. The wait
        renews it; after ``"ready"`` a later sensor has to. None: no lease, so that **nothing** ends the transfer when
        Airflow is gone
    :param readers: logins (`login` or `login@issuer`) that may pull from encrypted buffers besides the connection's own
        and the members of the experiment, such as that of the site's analysis jobs; a list, or separated by blanks
    :param lclstream_conn_id: connection of type `lclstream`

    Further arguments: see :class:`.RemoteWorkOperator`.
    """

    template_fields: Sequence[str] = (
        "config",
        "values",
        "ranks",
        "transfer_name",
        "on_no_consumer",
        "lease_s",
        "readers",
        "lclstream_conn_id",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {"config": "yaml", "values": "json"}
    operator_extra_links = (_TRANSFER_LINK,)
    ui_color = "#d8e8f6"

    def __init__(
        self,
        *,
        config: Mapping[str, Any] | str,
        values: Mapping[str, Any] | None = None,
        ranks: int | str | None = None,
        transfer_name: str | None = None,
        wait_for: Literal["ready", "complete"] = "ready",
        on_no_consumer: Literal["wait", "spill", "prefer_spill"] | str = "wait",
        lease_s: float | str | None = 60.0,
        readers: Sequence[str] | str = (),
        lclstream_conn_id: str = LCLStreamHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.values = values
        self.ranks = ranks
        self.transfer_name = transfer_name
        self.wait_for = wait_for
        self.on_no_consumer = on_no_consumer
        self.lease_s = lease_s
        self.readers = readers
        self.lclstream_conn_id = lclstream_conn_id
        self._hook: LCLStreamHook | None = None
        self._document: dict[str, Any] = {}
        self._name = ""
        self._last: TransferStatus | TransferInfo | None = None

    @property
    def hook(self) -> LCLStreamHook:
        """The connection's hook."""
        if self._hook is None:
            self._hook = LCLStreamHook(self.lclstream_conn_id)
        return self._hook

    def prepare(self, context: Context) -> None:
        """See :meth:`RemoteWorkOperator.prepare`."""
        if self.wait_for not in ("ready", "complete"):
            raise ValueError(f"wait_for is {self.wait_for!r}: it may be 'ready' or 'complete'")
        if self.on_no_consumer not in ("wait", "spill", "prefer_spill"):
            raise ValueError(f"on_no_consumer is {self.on_no_consumer!r}: it may be 'wait', 'spill' or 'prefer_spill'")
        self._document = load_document(self.config, self.values or {}, "config")
        name = self.transfer_name or f"{context['ti'].dag_id}.{context['ti'].run_id}"
        self._name = _NO_NAME.sub("-", name)[:_LONGEST_NAME]
        # Until there is a transfer, the button leads to the list of them.
        _TRANSFER_LINK.record(context, self.hook.transfers_url())

    def start(self, key: str) -> Remote:
        """See :meth:`RemoteWorkOperator.start`."""
        spill = self.on_no_consumer != "wait"
        try:
            status = self._request(key, "spill" if spill else None)
        except ServiceError as error:
            if self.on_no_consumer != "prefer_spill" or error.status != 422 or "on_no_consumer" not in str(error):
                raise
            self.log.info("The service keeps nothing in files: while nobody pulls, the buffer holds up the engine")
            status = self._request(key, None)
        self._last = status
        return self._remote(status)

    def _request(self, key: str, on_no_consumer: Literal["wait", "spill"] | None) -> TransferStatus:
        with self.hook.get_conn() as client:
            return client.request(
                self._document,
                lease_s=self._lease(),
                ranks=None if self.ranks in (None, "") else int(self.ranks or 0),
                name=self._name,
                on_no_consumer=on_no_consumer,
                idempotency_key=key,
                tags=self.tags,
                readers=self.readers.split() if isinstance(self.readers, str) else list(self.readers),
            )

    def state(self, remote_id: str | int) -> Remote:
        """See :meth:`RemoteWorkOperator.state`."""
        with self.hook.get_conn() as client:
            self._last = info = client.info(int(remote_id))
        return self._remote(info)

    def record(self, context: Context, remote_id: str | int) -> None:
        """See :meth:`RemoteWorkOperator.record`."""
        context["ti"].xcom_push(key="transfer_id", value=remote_id)
        # For the page: which service knows that id.
        context["ti"].xcom_push(key="transfer_at", value={"id": remote_id, "connection": self.lclstream_conn_id})
        if self._last is not None:
            context["ti"].xcom_push(key="url", value=self._last.url)
        link = self.hook.transfer_url(int(remote_id))
        _TRANSFER_LINK.record(context, link)
        self.log.info("Transfer %s: %s", remote_id, link)

    def trigger(self, remote_id: str | int, deadline: float) -> LCLStreamTransferTrigger:
        """See :meth:`RemoteWorkOperator.trigger`."""
        return LCLStreamTransferTrigger(
            conn_id=self.lclstream_conn_id,
            remote_id=int(remote_id),
            deadline=deadline,
            until=Until.READY if self.wait_for == "ready" else Until.DONE,
            lease_s=self._lease(),
            poll_interval=self.poll_interval,
            patience_s=self.patience_s,
            on_kill_policy=self.on_kill_policy,
        )

    def lasts(self) -> Literal["task", "run"]:
        """See :meth:`RemoteWorkOperator.lasts`: a stream that is ready is pulled by other tasks."""
        return "run" if self.wait_for == "ready" else "task"

    def cancel(self, remote_id: str | int) -> None:
        """See :meth:`RemoteWorkOperator.cancel`."""
        with self.hook.get_conn() as client:
            client.cancel(int(remote_id))

    def finish(self, context: Context, remote_id: str | int, facts: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`RemoteWorkOperator.finish`."""
        del remote_id
        values = {name: value for name, value in (self.values or {}).items() if isinstance(value, str | int)}
        told = {name: facts.get(name) for name in ("transfer_id", "url", "phase")}
        announce(self, context, str(values.get("experiment") or ""), {**values, **told})
        return facts

    def get_openlineage_facets_on_start(self) -> OperatorLineage[Any, Any]:
        """What is read, for OpenLineage: the engine's source."""
        return lineage([self._source()], [])

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:
        """The stream, named by the address it can be pulled from, and its source."""
        url = task_instance.xcom_pull(task_ids=self.task_id, key="url") or ""
        scheme, _, place = url.partition("://")
        return lineage(
            [self._source()], [(f"{scheme}://{place}", str(self.transfer_name or "stream"))] if place else []
        )

    def _source(self) -> tuple[str, str]:
        document = self._document or load_document(self.config, self.values or {}, "config")
        return "lclstream", str(document.get("source_identifier") or "")

    def _lease(self) -> float | None:
        return None if self.lease_s in (None, "", "None") else float(self.lease_s or 0)

    @staticmethod
    def _remote(transfer: TransferStatus | TransferInfo) -> Remote:
        if not transfer.phase.final:
            return Remote(transfer.id, Progress.UNDER_WAY)
        done = transfer.phase is TransferPhase.done
        return Remote(transfer.id, Progress.SUCCEEDED if done else Progress.OVER)


class LCLStreamCancelOperator(BaseOperator):
    """Ends a transfer: for the branch of a DAG that runs when something else has failed.

    Without effect on a transfer that has ended. Returns the transfer's id, or None when there was none.

    :param transfer_id: the transfer; None or empty (the task that asks for it did not get that far): nothing to do
    :param lclstream_conn_id: connection of type `lclstream`
    """

    template_fields: Sequence[str] = ("transfer_id", "lclstream_conn_id")
    operator_extra_links = (_TRANSFER_LINK,)
    ui_color = "#f6dcd8"

    def __init__(
        self,
        *,
        transfer_id: int | str | None,
        lclstream_conn_id: str = LCLStreamHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.transfer_id = transfer_id
        self.lclstream_conn_id = lclstream_conn_id

    def execute(self, context: Context) -> int | None:
        """Cancel the transfer.

        Raises:
            AirflowException: the service does not take it; the lease ends the transfer then.
        """
        if self.transfer_id in (None, "", "None"):
            self.log.info("No transfer was made: there is nothing to end")
            return None
        transfer = int(self.transfer_id or 0)
        hook = LCLStreamHook(self.lclstream_conn_id)

        def cancel() -> None:
            with hook.get_conn() as client:
                client.cancel(transfer)

        try:
            _TRANSFER_LINK.record(context, hook.transfer_url(transfer))
            insist(cancel, limit_s=START_PATIENCE_S)
        except ServiceError as error:
            if error.status != 404:
                raise AirflowException(str(error)) from error
            self.log.info("Transfer %s is not known any more", transfer)
        except PeerError as error:
            raise AirflowException(str(error)) from error
        self.log.info("Transfer %s is ended", transfer)
        return transfer
