"""What Airflow asks a provider package: connection types with their forms, operators, links, the page in the UI."""

from __future__ import annotations

from typing import Any

from lclstream import __version__

_CREDENTIALS = {
    "label": "Certificate folder",
    "description": (
        "Path of a certificate folder (made by `certified init`) on the workers and triggerers. It says who we are and "
        "whom we trust; nothing secret goes into this form."
    ),
    "schema": {"type": "string", "minLength": 1},
}


def _prefix(default: str) -> dict[str, Any]:
    return {
        "label": "Path prefix",
        "description": f"Path before the service's routes; empty means {default!r}.",
        "schema": {"type": ["string", "null"]},
    }


def _optional(label: str, description: str) -> dict[str, Any]:
    return {"label": label, "description": description, "schema": {"type": ["string", "null"]}}


#: Of NERSC's API.
_SUPERFACILITY = {
    "key_file": {
        "label": "Key file",
        "description": (
            "Path of the key file made in NERSC's Iris (client id and secret key, mode 0600) on the workers and "
            "triggerers. Nothing secret goes into this form."
        ),
        "schema": {"type": "string", "minLength": 1},
    },
    "token_url": _optional("Token address", "Where tokens come from; empty means NERSC's, or /c2id/token of the host."),
    "machine": _optional("Machine", "Machine for tasks that name none; empty means 'perlmutter'."),
    "job_page": _optional("Job page", "Address of a page about a job, with {machine} and {job_id}; for the link."),
    "prefix": _prefix("/api/v1.2"),
}
#: Of the ARP's job interface.
_JID = {
    "token_file": _optional(
        "Token file",
        "Path of a file (mode 0600) with a bearer token on the workers and triggerers; empty: the DAG run's own token "
        "is used, and waiting takes a worker. Nothing secret goes into this form.",
    ),
    "prefix": _prefix("/arps3dfjid/jid/ws"),
}


def _connection(
    kind: str,
    hook: str,
    name: str,
    port: int,
    prefix: str,
    *,
    fields: dict[str, Any] | None = None,
    host: str = "dtn.example.org",
) -> dict[str, Any]:
    return {
        "connection-type": kind,
        "hook-class-name": hook,
        "hook-name": name,
        "conn-fields": fields or {"credentials": _CREDENTIALS, "prefix": _prefix(prefix)},
        "ui-field-behaviour": {
            "hidden-fields": ["schema", "login", "password", "extra"],
            "relabeling": {},
            "placeholders": {"host": host, "port": str(port)},
        },
    }


def get_provider_info() -> dict[str, Any]:
    """The provider's description; the entry point `apache_airflow_provider` leads here."""
    parts = "lclstream_airflow"
    return {
        "package-name": "lclstream",
        "name": "LCLStream",
        "description": "Streams of detector data from an X-ray laser to any computing centre.",
        "versions": [__version__],
        "hooks": [
            {
                "integration-name": "LCLStream",
                "python-modules": [
                    f"{parts}.hooks.{name}" for name in ("lclstream", "psik", "elog", "superfacility", "jid")
                ],
            }
        ],
        "triggers": [
            {
                "integration-name": "LCLStream",
                "python-modules": [
                    f"{parts}.triggers.{name}"
                    for name in ("lclstream", "psik", "session", "elog", "superfacility", "jid")
                ],
            }
        ],
        "operators": [
            {
                "integration-name": "LCLStream",
                "python-modules": [
                    f"{parts}.operators.{name}"
                    for name in (
                        *("lclstream", "psik", "engine", "session", "reconcile"),
                        *("slurm", "superfacility", "jid", "elog"),
                    )
                ],
            }
        ],
        "sensors": [
            {
                "integration-name": "LCLStream",
                "python-modules": [f"{parts}.sensors.{name}" for name in ("buffer", "session", "elog")],
            }
        ],
        "connection-types": [
            _connection("lclstream", f"{parts}.hooks.lclstream.LCLStreamHook", "LCLStream transfers", 8446, "/v1"),
            _connection("psik", f"{parts}.hooks.psik.PsikHook", "Psi-k jobs", 8447, "/v2"),
            _connection("elog", f"{parts}.hooks.elog.ElogHook", "Elog", 8448, ""),
            _connection(
                "superfacility",
                f"{parts}.hooks.superfacility.SuperfacilityHook",
                "Superfacility API (NERSC)",
                443,
                "/api/v1.2",
                fields=_SUPERFACILITY,
                host="https://api.nersc.gov",
            ),
            _connection(
                "jid",
                f"{parts}.hooks.jid.JobInterfaceHook",
                "Job interface (ARP)",
                443,
                "/arps3dfjid/jid/ws",
                fields=_JID,
                host="https://psdm.slac.stanford.edu",
            ),
        ],
        "extra-links": [f"{parts}.links.{name}" for name in ("TransferLink", "JobLink", "RunLink")],
    }
