"""Make the certificates and passwords of all containers, once.

One site signs everybody, under the names the containers have. Every file is readable by its owner only, the user our
containers run as.
"""

import json
import os
import secrets
import shutil
from pathlib import Path

from lclstream.security.authority import LOOPBACK_HOSTS, SiteAuthority

FOLDER = Path("/certificates")
SERVICES = ("elog", "jobs", "api", "arp", "airflow", "beamline")


def write(path: Path, text: str) -> None:
    """Write a file of mode 0600."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


if not (FOLDER / "made").exists():
    shutil.rmtree(FOLDER / "s3df", ignore_errors=True)
    authority = SiteAuthority(FOLDER / "s3df", "s3df")
    for service in SERVICES:
        authority.member(service, hosts=(service, *LOOPBACK_HOSTS))
    postgres, airflow = secrets.token_urlsafe(24), secrets.token_urlsafe(12)
    write(FOLDER / "postgres-password", postgres)
    write(FOLDER / "pgpass", f"postgres:5432:*:lclstream:{postgres}\n")
    write(FOLDER / "airflow-password", airflow)
    write(Path("/airflow/passwords.json"), json.dumps({"admin": airflow}))
    write(FOLDER / "airflow-jwt", secrets.token_urlsafe(64))
    (FOLDER / "made").touch()
