"""Whenever a run of any experiment has results in the logbook, do something with them."""

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, AssetAlias, task

with DAG(dag_id="follow_results", schedule=AssetAlias("lclstream_results"), dagrun_timeout=timedelta(hours=1)):

    @task
    def look(triggering_asset_events: Any = None) -> list[dict[str, Any]]:
        # Several runs may have come since the last time.
        facts = [event.extra for events in triggering_asset_events.values() for event in events]
        for fact in facts:
            print(fact["experiment"], fact["run"], fact["parameters"])
        return facts

    look()
