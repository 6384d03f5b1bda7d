from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from lclstream.arp.config import AirflowConfig, ArpConfig, load
from lclstream.arp.definitions import FileDefinitions
from lclstream.config_file import ConfigError

GOOD: dict[str, Any] = {
    "kafka": {"bootstrap_servers": "127.0.0.1:9092"},
    "definitions": {"elog": "https://127.0.0.1:8448"},
    "airflow": {"url": "http://127.0.0.1:8080", "username": "arp", "password_file": "/x"},
    "location": "s3df",
    "credentials": "/c",
}


def written(folder: Path, document: object) -> Path:
    path = folder / "arp.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def test_the_smallest_configuration_is_enough(tmp_path: Path) -> None:
    config = load(written(tmp_path, GOOD))
    assert config.kafka.topics == ["runs", "file_catalog", "workflow_jobs"]
    assert config.logbook_url == "https://127.0.0.1:8448"
    assert config.status is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"location": ""}, "location: .*at least 1 character"),
        ({"kafka": {"bootstrap_servers": "x", "topic": "runs"}}, "kafka.topic: no such key; did you mean topics"),
        ({"kafka": {"bootstrap_servers": "x", "topics": ["experiments"]}}, "kafka.topics.0"),
        ({"definitions": {}}, "definitions: .*either elog .* or file"),
        ({"definitions": {"elog": "http://127.0.0.1:8448"}}, "definitions.elog: .*https"),
        ({"airflow": GOOD["airflow"] | {"url": "http://airflow.slac:8080"}}, "airflow: .*unencrypted"),
        ({"credentials": None}, "credentials: the folder"),
        ({"recorder_files": "("}, "recorder_files: .*regular expression"),
        ({"elog": "https://other:1"}, "only for definitions from a file"),
        ({"status": {"port": 70000}}, r"status.port: .*, not 70000"),
    ],
)
def test_a_wrong_key_is_named_with_its_value_and_what_would_be_right(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as error:
        load(written(tmp_path, GOOD | change))
    assert str(tmp_path / "arp.yaml") in str(error.value)


@pytest.mark.parametrize(("text", "why"), [("a: [", "no YAML"), ("- 1", "must be a mapping")])
def test_a_file_that_is_no_configuration_is_said(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(written(tmp_path, text))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")


def test_plain_http_to_another_machine_must_be_allowed_by_name(tmp_path: Path) -> None:
    airflow = GOOD["airflow"] | {"url": "http://airflow:8080", "allow_plain_http": True}
    assert load(written(tmp_path, GOOD | {"airflow": airflow})).airflow.url == "http://airflow:8080"


@pytest.mark.parametrize(("mode", "text", "why"), [(0o644, "x", "chmod 600"), (0o600, " \n", "is empty")])
def test_the_password_file_is_checked(tmp_path: Path, mode: int, text: str, why: str) -> None:
    path = tmp_path / "password"
    path.write_text(text)
    path.chmod(mode)
    config = AirflowConfig(url="http://127.0.0.1:8080", username="arp", password_file=path)
    with pytest.raises(ConfigError, match=why):
        config.password()


def test_the_password_is_its_text_without_the_line_end(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("a b\n")
    path.chmod(0o600)
    assert AirflowConfig(url="http://127.0.0.1:8080", username="arp", password_file=path).password() == "a b"


DEFINITION = {"name": "a", "executable": "airflow:a", "trigger": "START_OF_RUN", "location": "s3df"}


def test_definitions_in_a_file_hold_for_the_experiments_they_name(tmp_path: Path) -> None:
    entries = [DEFINITION, DEFINITION | {"name": "b", "experiments": ["tmo*"]}]
    source = FileDefinitions(written(tmp_path, {"definitions": entries}), logbook=False)
    assert [entry.name for entry in source.of("mfx1", fresh=True)] == ["a"]
    assert [entry.name for entry in source.of("tmox1", fresh=True)] == ["a", "b"]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (DEFINITION | {"trigger": "SOMETIMES"}, "definitions.0.trigger"),
        (DEFINITION | {"colour": "red"}, "definitions.0.colour"),
        (DEFINITION | {"parameters": "{"}, "definitions.0: .*not JSON"),
        (DEFINITION | {"trigger": "RUN_PARAM_IS_VALUE"}, "needs run_param_name"),
        (DEFINITION | {"trigger": "ALL_FILES_TRANSFERRED"}, "set `elog`"),
    ],
)
def test_a_definition_that_could_never_work_is_refused_at_the_start(
    tmp_path: Path, entry: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        FileDefinitions(written(tmp_path, {"definitions": [entry]}), logbook=False)


DOCS = Path(__file__).parents[4] / "docs"


@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("arp-*.yaml")), ids=lambda path: path.name)
def test_every_example_is_correct(path: Path) -> None:
    if "definitions" in path.stem:
        FileDefinitions(path, logbook=True)
    else:
        load(path)


@pytest.mark.parametrize("name", ["arp-elog", "arp-definitions"])
def test_the_page_shows_the_examples_as_they_are(name: str) -> None:
    assert (DOCS / "examples" / f"{name}.yaml").read_text() in (DOCS / "arp.md").read_text()


def test_the_page_names_every_setting() -> None:
    page = (DOCS / "arp.md").read_text()

    def names(model: type[BaseModel]) -> set[str]:
        found: set[str] = set()
        for name, field in model.model_fields.items():
            inner = [kind for kind in get_args(field.annotation) or (field.annotation,) if isinstance(kind, type)]
            models = [kind for kind in inner if issubclass(kind, BaseModel)]
            found |= {f"{name}.{below}" for kind in models for below in names(kind)} if models else {name}
        return found

    assert [name for name in sorted(names(ArpConfig)) if f"`{name}`" not in page] == []
