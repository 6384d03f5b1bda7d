"""Adds the page "Streams" to Airflow's navigation, a tab to every DAG run, and the pools that our DAGs need."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from airflow.plugins_manager import AirflowPlugin

from lclstream_airflow import pools

PREFIX = "/lclstream"


class _Page:
    """The pages' application, imported when the first request comes: workers load plugins, too, and serve no pages."""

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        from lclstream_airflow.page import app

        await app(scope, receive, send)


class LCLStreamPlugin(AirflowPlugin):
    """The plugin; the entry point `airflow.plugins` leads here."""

    name = "lclstream"
    listeners = [pools]  # noqa: RUF012
    fastapi_apps = [{"app": _Page(), "url_prefix": PREFIX, "name": "LCLStream"}]  # noqa: RUF012
    external_views = [  # noqa: RUF012
        {
            "name": "Streams",
            "href": f"{PREFIX}/",
            "destination": "nav",
            "category": "browse",
            "url_route": "lclstream",
        },
        {
            "name": "Stream",
            "href": f"{PREFIX}/runs/{{DAG_ID}}/{{RUN_ID}}",
            "destination": "dag_run",
            "url_route": "lclstream-run",
        },
    ]
