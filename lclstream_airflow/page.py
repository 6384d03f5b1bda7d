"""The pages that the plugin adds to Airflow's user interface.

They run in Airflow's API server and ask the services with the certificate of the connection, so the folder must be
there, too. Who may see them is decided by Airflow: a DAG run's page needs the right to read that DAG's XComs, the list
of all transfers the right to read the runs of all DAGs.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import requires_access_dag
from airflow.models.xcom import XComModel
from fastapi import Depends, FastAPI, Query
from fastapi.responses import HTMLResponse
from sqlalchemy import select

from lclstream_airflow.hooks.lclstream import LCLStreamHook
from lclstream_airflow.hooks.patience import PeerError
from lclstream_airflow.hooks.psik import PsikHook
from lclstream_airflow.overview import Row, job_row, session_rows, transfer_row, transfer_rows

#: Seconds between two looks of an open page.
REFRESH_S = 3
_LATEST = 20
_STYLE = """
:root { color-scheme: light dark; font: 14px system-ui, sans-serif; }
body { margin: 1.5rem; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .45rem .7rem; border-bottom: 1px solid #8884; vertical-align: top; }
th { font-weight: 600; opacity: .7; } td:last-child { font-weight: 600; } p { opacity: .8; }
"""

app = FastAPI(title="LCLStream", docs_url=None, redoc_url=None, openapi_url=None)


@app.get(
    "/",
    response_class=HTMLResponse,
    # Without a DAG Airflow would take `dag_id` of the query, and show everybody's to who may read that one.
    dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.RUN, param_dag_id="~"))],
)
def transfers(
    connection: str = Query(LCLStreamHook.default_conn_name), jobs: str = Query(PsikHook.default_conn_name)
) -> str:
    """The sessions at a computing centre, and the latest transfers of a transfer service."""
    try:
        rows = [*session_rows(jobs), *transfer_rows(connection, _LATEST)]
    except (PeerError, ValueError) as error:
        return _page("Streams", [], f"The transfer service cannot be asked: {error}")
    return _page("Streams", rows, "No transfer has been made yet.")


@app.get(
    "/runs/{dag_id}/{run_id:path}",
    response_class=HTMLResponse,
    dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.XCOM))],
)
def run(dag_id: str, run_id: str, session: SessionDep) -> str:
    """The transfers and jobs of one DAG run."""
    found = session.execute(
        select(XComModel.key, XComModel.value)
        .where(XComModel.dag_id == dag_id, XComModel.run_id == run_id, XComModel.key.in_(("transfer_at", "job_at")))
        .order_by(XComModel.timestamp)
    )
    rows = []
    for entry in found:
        place = XComModel.deserialize_value(entry)
        if entry.key == "transfer_at":
            rows.append(transfer_row(place["connection"], int(place["id"])))
        else:
            rows.append(job_row(place["connection"], str(place["id"])))
    return _page(f"{dag_id} · {run_id}", rows, "This run has asked for no stream and no job yet.")


def _page(title: str, rows: Iterable[Row], otherwise: str) -> str:
    lines = []
    for row in rows:
        cells = [row.what, row.state, row.counts, row.speed, row.waits_for or "nothing"]
        lines.append(
            f"<tr title='{_text(row.where)}'>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
        )
    head = "<tr><th>what</th><th>state</th><th>messages</th><th>speed</th><th>waits for</th></tr>"
    body = f"<table>{head}{''.join(lines)}</table>" if lines else f"<p>{_text(otherwise)}</p>"
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{_text(title)}</title>"
        f"<meta http-equiv='refresh' content='{REFRESH_S}'><style>{_STYLE}</style></head>"
        f"<body><h2>{_text(title)}</h2>{body}</body></html>"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)
