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


def _connection(kind: str, hook: str, name: str, port: int, prefix: str) -> dict[str, Any]:
    return {
        "connection-type": kind,
        "hook-class-name": hook,
        "hook-name": name,
        "conn-fields": {"credentials": _CREDENTIALS, "prefix": _prefix(prefix)},
        "ui-field-behaviour": {
            "hidden-fields": ["schema", "login", "password", "extra"],
            "relabeling": {},
            "placeholders": {"host": "dtn.example.org", "port": str(port)},
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
                "python-modules": [f"{parts}.hooks.{name}" for name in ("lclstream", "psik", "elog")],
            }
        ],
        "triggers": [
            {
                "integration-name": "LCLStream",
                "python-modules": [f"{parts}.triggers.{name}" for name in ("lclstream", "psik", "elog")],
            }
        ],
        "operators": [
            {
                "integration-name": "LCLStream",
                "python-modules": [f"{parts}.operators.{name}" for name in ("lclstream", "psik", "elog")],
            }
        ],
        "sensors": [
            {
                "integration-name": "LCLStream",
                "python-modules": [f"{parts}.sensors.{name}" for name in ("buffer", "elog")],
            }
        ],
        "connection-types": [
            _connection("lclstream", f"{parts}.hooks.lclstream.LCLStreamHook", "LCLStream transfers", 8446, "/v1"),
            _connection("psik", f"{parts}.hooks.psik.PsikHook", "Psi-k jobs", 8447, "/v2"),
            _connection("elog", f"{parts}.hooks.elog.ElogHook", "Elog", 8448, ""),
        ],
        "extra-links": [f"{parts}.links.{name}" for name in ("TransferLink", "JobLink", "RunLink")],
    }
