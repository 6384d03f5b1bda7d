"""Airflow's REST interface, as far as the run processor needs it, with failures sorted by what to do about them.

::

    AirflowError
    ├── AirflowUnavailableError   try again: nobody answers, 5xx, too many requests, or our password is not accepted
    └── AirflowRefusalError       Airflow does not do that, however often it is asked (`status`, `detail`)
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import quote

import httpx

from lclstream import __version__
from lclstream.arp.config import AirflowConfig
from lclstream.config_file import ConfigError

_PAGE = 100
_UNAUTHORIZED, _CONFLICT, _TOO_MANY, _SERVER_ERROR = 401, 409, 429, 500


class AirflowError(ConnectionError):
    """Airflow did not do what it was asked."""


class AirflowUnavailableError(AirflowError):
    """Asking again later may help.

    Attributes:
        answered_with: 500 when Airflow itself failed while it worked on the request, so that the request may be the
            reason; None when it could not be asked.
    """

    def __init__(self, message: str, *, answered_with: int | None = None) -> None:
        super().__init__(message)
        self.answered_with = answered_with


class AirflowRefusalError(AirflowError):
    """Asking again does not help.

    Attributes:
        status: HTTP status.
        detail: Airflow's words.
    """

    def __init__(self, message: str, *, status: int, detail: str) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


def _detail(response: httpx.Response) -> str:
    try:
        document = response.json()
        detail = document.get("detail", document) if isinstance(document, dict) else document
    except ValueError:
        detail = response.text
    return str(detail)[:1000]


class AirflowClient:
    """A blocking client; close it, or use it in a ``with``. One thread at a time.

    The token is asked for when it is first needed and again when Airflow no longer takes it. It is held in memory only.

    Args:
        config: address, user and password file.
    """

    def __init__(self, config: AirflowConfig) -> None:
        self._config = config
        self._token: str | None = None
        verify: ssl.SSLContext | bool = True
        if config.ca_file is not None:
            try:
                verify = ssl.create_default_context(cafile=str(config.ca_file))
            except OSError as error:
                raise ConfigError(f"airflow.ca_file: {config.ca_file}: {error}") from error
        self._http = httpx.Client(
            base_url=config.url.rstrip("/"),
            timeout=config.timeout_s,
            verify=verify,
            trust_env=False,
            headers={"user-agent": f"lclstream-arp/{__version__}"},
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> AirflowClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise AirflowUnavailableError(
                f"Airflow at {self._config.url} does not answer ({type(error).__name__}: {error})"
            ) from error

    def log_in(self) -> None:
        """Get a token.

        Raises:
            AirflowUnavailableError: Airflow does not answer, or does not accept user and password.
            ConfigError: the password file cannot be used.
        """
        body = {"username": self._config.username, "password": self._config.password()}
        response = self._exchange("POST", "/auth/token", json=body)
        if response.is_success:
            try:
                self._token = str(response.json()["access_token"])
                return
            except (ValueError, KeyError, TypeError):
                raise AirflowUnavailableError(f"{self._config.url}/auth/token answered without a token") from None
        if response.status_code >= _SERVER_ERROR:
            raise AirflowUnavailableError(f"{self._config.url}/auth/token answered {response.status_code}")
        raise AirflowUnavailableError(
            f"Airflow does not accept user {self._config.username!r} with the password in {self._config.password_file} "
            f"({response.status_code}): correct the file",
            answered_with=response.status_code,
        )

    def _call(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **arguments: Any
    ) -> httpx.Response:
        """One call with a valid token; any status below 500 but 401 and 429 is the caller's."""
        for attempt in range(2):
            if self._token is None:
                self.log_in()
            bearer = {"authorization": f"Bearer {self._token}"}
            response = self._exchange(method, path, headers=bearer | (headers or {}), **arguments)
            if response.status_code != _UNAUTHORIZED:
                break
            # Tokens expire, and Airflow forgets them when its secret changes.
            self._token = None
            if attempt:
                raise AirflowUnavailableError(
                    f"Airflow does not accept the token it gave a moment ago: {_detail(response)}"
                )
        if response.status_code == _TOO_MANY or response.status_code >= _SERVER_ERROR:
            own = response.status_code if response.status_code == _SERVER_ERROR else None
            raise AirflowUnavailableError(
                f"Airflow answered {response.status_code} to {method} {path}: {_detail(response)}", answered_with=own
            )
        return response

    def _refusal(self, response: httpx.Response, what: str) -> AirflowRefusalError:
        detail = _detail(response)
        return AirflowRefusalError(
            f"Airflow refuses {what} with {response.status_code}: {detail}", status=response.status_code, detail=detail
        )

    def create_dag_run(self, dag_id: str, dag_run_id: str, conf: dict[str, Any]) -> bool:
        """Make a DAG run; True when it was made now, False when it was there.

        Raises:
            AirflowUnavailableError: asking again with the same id is safe, whatever became of this request.
            AirflowRefusalError: there is no such DAG, it cannot be triggered, or we may not.
        """
        path = f"/api/v2/dags/{quote(dag_id, safe='')}/dagRuns"
        # Not httpx's `json=`: it cannot send half a surrogate pair, which a run's parameter may hold.
        body = json.dumps({"dag_run_id": dag_run_id, "logical_date": None, "conf": conf}, allow_nan=False)
        response = self._call("POST", path, content=body.encode(), headers={"content-type": "application/json"})
        if response.is_success:
            return True
        if response.status_code == _CONFLICT:
            return False
        raise self._refusal(response, f"a DAG run of {dag_id}")

    def dag_run(self, dag_id: str, dag_run_id: str) -> dict[str, Any]:
        """The DAG run as Airflow knows it (`state`, `conf`, …).

        Raises:
            AirflowUnavailableError: Airflow could not be asked.
            AirflowRefusalError: there is none, or we may not see it.
        """
        response = self._call("GET", self._run_path(dag_id, dag_run_id))
        if not response.is_success:
            raise self._refusal(response, f"DAG run {dag_run_id} of {dag_id}")
        document: dict[str, Any] = response.json()
        return document

    def changed_dag_runs(self, since: datetime) -> Iterator[dict[str, Any]]:
        """The DAG runs of all DAGs that changed since a time, those that changed first coming first.

        Raises:
            AirflowUnavailableError: Airflow could not be asked.
            AirflowRefusalError: we may not list them.
        """
        offset = 0
        while True:
            query = {"updated_at_gte": since.isoformat(), "limit": _PAGE, "offset": offset, "order_by": "updated_at"}
            response = self._call("GET", "/api/v2/dags/~/dagRuns", params=query)
            if not response.is_success:
                raise self._refusal(response, "a list of DAG runs")
            page: list[dict[str, Any]] = response.json()["dag_runs"]
            yield from page
            if len(page) < _PAGE:
                return
            offset += _PAGE

    def task_states(self, dag_id: str, dag_run_id: str) -> list[str | None]:
        """The states of a DAG run's tasks; None for one that has not begun.

        Raises:
            AirflowUnavailableError: Airflow could not be asked.
            AirflowRefusalError: there is no such DAG run, or we may not see it.
        """
        response = self._call("GET", f"{self._run_path(dag_id, dag_run_id)}/taskInstances", params={"limit": 1000})
        if not response.is_success:
            raise self._refusal(response, f"the tasks of {dag_run_id}")
        return [entry["state"] for entry in response.json()["task_instances"]]

    def page(self, dag_id: str, dag_run_id: str) -> str:
        """Address of the DAG run's page in Airflow."""
        return f"{self._config.url.rstrip('/')}/dags/{quote(dag_id, safe='')}/runs/{quote(dag_run_id, safe='')}"

    def fail_dag_run(self, dag_id: str, dag_run_id: str, *, note: str) -> None:
        """Mark a DAG run failed, which stops its tasks, and say why in its note.

        Raises:
            AirflowUnavailableError: Airflow could not be asked.
            AirflowRefusalError: there is none, or we may not.
        """
        response = self._call("PATCH", self._run_path(dag_id, dag_run_id), json={"state": "failed", "note": note})
        if not response.is_success:
            raise self._refusal(response, f"to fail DAG run {dag_run_id} of {dag_id}")

    @staticmethod
    def _run_path(dag_id: str, dag_run_id: str) -> str:
        return f"/api/v2/dags/{quote(dag_id, safe='')}/dagRuns/{quote(dag_run_id, safe='')}"
