from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lclstream.config_file import ConfigError
from lclstream.superfacility import standing
from lclstream.superfacility.cli import app
from lclstream.superfacility.config import load
from lclstream.superfacility.keys import make_client

REPOSITORY = Path(__file__).resolve().parents[4]


def write(path: Path, **changes: Any) -> Path:
    client = {"id": "0123456789abc", "user": "ada", "public_key": str(path / "airflow.pub")}
    document = {"state": str(path / "state"), "files": str(path / "files"), "clients": [client], **changes}
    (path / "config.yaml").write_text(yaml.safe_dump(document))
    return path / "config.yaml"


def test_the_example_is_valid_and_is_what_the_page_shows() -> None:
    example = REPOSITORY / "docs" / "examples" / "superfacility.yaml"
    load(example)
    assert example.read_text().strip() in (REPOSITORY / "docs" / "superfacility.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"listen": {"host": "0.0.0.0"}}, "set `tls`, or listen at 127.0.0.1"),
        ({"machines": {"cori": {"type": "local"}}}, "machines.cori"),
        ({"clients": []}, "clients"),
        ({"clients": [{"id": "short", "user": "ada", "public_key": "x"}]}, "clients.0.id"),
        ({"clients": [{"id": "0123456789abc", "user": "../x", "public_key": "x"}]}, "clients.0.user"),
        ({"files": "state/files", "state": "state"}, "lie inside each other"),
        ({"ignore_options": ["constraint"]}, "ignore_options"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_configuration_names_the_key(
    tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as wrong:
        load(write(tmp_path, **changes))
    assert message in str(wrong.value)


def test_a_key_that_is_none_is_named(tmp_path: Path) -> None:
    settings = load(write(tmp_path))
    with pytest.raises(ConfigError, match="No such file"):
        settings.public_keys()
    (tmp_path / "airflow.pub").write_text("no key")
    with pytest.raises(ConfigError, match=r"0123456789abc: .*airflow\.pub"):
        settings.public_keys()


def test_a_clients_secret_half_is_its_own_and_never_overwritten(tmp_path: Path) -> None:
    client_id, secret, public = make_client(tmp_path / "keys", "airflow")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert secret.read_text().startswith(f"{client_id}\n-----BEGIN")
    assert "PRIVATE" not in public.read_text()
    with pytest.raises(FileExistsError):
        make_client(tmp_path / "keys", "airflow")


def test_the_command_tells_what_is_wrong_by_its_exit_code(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["client", "airflow", "--folder", str(tmp_path)]).exit_code == 0
    assert run(app, ["client", "airflow", "--folder", str(tmp_path)]).exit_code == 2
    assert run(app, ["serve", "--config", str(tmp_path / "none.yaml")]).exit_code == 2


def test_a_broken_file_of_states_is_no_state(tmp_path: Path) -> None:
    file = tmp_path / "status.yaml"
    assert standing.read(file, ["perlmutter"])["perlmutter"].status == "active"
    file.write_text("perlmutter: {status: sleepy}")
    with pytest.raises(ConfigError, match="sleepy"):
        standing.read(file, ["perlmutter"])
