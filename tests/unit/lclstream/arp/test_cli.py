from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lclstream.arp import cli


def written(folder: Path, **changes: Any) -> Path:
    password = folder / "password"
    password.write_text("x")
    password.chmod(0o600)
    definitions = folder / "definitions.yaml"
    definitions.write_text("definitions: []")
    document = {
        "location": "s3df",
        "kafka": {"bootstrap_servers": "127.0.0.1:9"},
        "definitions": {"file": str(definitions)},
        "airflow": {"url": "http://127.0.0.1:9", "username": "arp", "password_file": str(password)},
    }
    path = folder / "arp.yaml"
    path.write_text(yaml.safe_dump(document | changes))
    return path


def test_check_reads_everything_and_connects_to_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["--config", str(written(tmp_path)), "--check"])
    assert done.exit_code == 0
    assert "correct" in done.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": "red"}, "colour: no such key"),
        ({"definitions": {"file": "/none.yaml"}}, "/none.yaml: cannot be read"),
        (
            {"airflow": {"url": "http://127.0.0.1:9", "username": "arp", "password_file": "/none"}},
            "airflow.password_file: /none: No such file",
        ),
        ({"status": {"port": 0}}, "credentials: the folder"),
    ],
)
def test_check_says_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    done = CliRunner().invoke(cli.app, ["--config", str(written(tmp_path, **changes)), "--check"])
    assert done.exit_code == 2
    assert said in caplog.text
