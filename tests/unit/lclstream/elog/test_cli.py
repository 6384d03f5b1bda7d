from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lclstream.elog import cli, run_cli


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "kafka: is missing: the broker (--kafka)"),
        (["--credentials", "/none", "--kafka", "127.0.0.1:9"], "certificate folder /none does not exist"),
        (["--config", "/none.yaml"], "No such file"),
    ],
)
def test_a_wrong_command_line_is_said(options: list[str], said: str, caplog: pytest.LogCaptureFixture) -> None:
    assert CliRunner().invoke(cli.app, options).exit_code == 2
    assert said in caplog.text


def test_a_wrong_key_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tmp_path / "elog.yaml"
    config.write_text("credentials: /c\nkafka: {bootstrap_servers: x, topics: [runs]}\n")
    assert CliRunner().invoke(cli.app, ["--config", str(config)]).exit_code == 2
    assert f"{config}, line 2: kafka.topics: no such key" in caplog.text


def test_a_database_that_cannot_be_opened_is_said(sites: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    folder = str(sites["s3df"].member("elog").folder)
    options = ["--credentials", folder, "--kafka", "127.0.0.1:9", "--database", "sqlite:////none/elog.sqlite"]
    assert CliRunner().invoke(cli.app, options).exit_code == 3
    assert "database sqlite:////none/elog.sqlite cannot be opened" in caplog.text


@pytest.mark.parametrize("assignment", ["energy", "=5"])
def test_a_parameter_that_is_no_assignment_is_said(assignment: str) -> None:
    done = CliRunner().invoke(run_cli.app, ["start", "mfx1", "--param", assignment])
    assert done.exit_code == 2
    assert "NAME=VALUE" in done.stderr


@pytest.mark.parametrize("command", ["start", "end"])
def test_a_missing_certificate_folder_is_said(command: str) -> None:
    done = CliRunner().invoke(run_cli.app, [command, "mfx1", "--credentials", "/none"])
    assert done.exit_code == 2
    assert "certificate folder /none does not exist" in done.stderr
