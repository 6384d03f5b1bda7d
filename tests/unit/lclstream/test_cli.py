"""The `lclstream` command lists every command without importing any, and says what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lclstream import cli


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for name in cli._COMMANDS:
        assert name in result.output


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_every_command_teaches_with_help(name: str) -> None:
    result = CliRunner().invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output
    assert len(result.output) > 400


def test_help_imports_no_service() -> None:
    program = "import sys, lclstream.cli as c; c.app(['--help'], standalone_mode=False); " + (
        "print('heavy:', sorted({m.split('.')[0] for m in sys.modules} & {'fastapi', 'numpy', 'sqlalchemy', 'h5py'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout


def test_an_unknown_command_is_refused() -> None:
    assert CliRunner().invoke(cli.app, ["bogus"]).exit_code == 2


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entry = cli._Command("lclstream_missing_service", "app", "services", "")
    monkeypatch.setitem(cli._COMMANDS, "missing", entry._replace(module="a_package_nobody_has"))
    with pytest.raises(SystemExit) as stopped:
        cli._load("missing")
    assert stopped.value.code == 2
    assert "pip install 'lclstream[services]'" in capsys.readouterr().err


def test_version_is_printed() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.output.startswith("lclstream ")
