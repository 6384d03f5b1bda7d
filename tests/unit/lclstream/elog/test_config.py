from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lclstream.config_file import ConfigError
from lclstream.elog.config import load

DOCS = Path(__file__).parents[4] / "docs"
GOOD: dict[str, Any] = {"credentials": "~/c", "kafka": {"bootstrap_servers": "127.0.0.1:9092"}}


def written(folder: Path, document: object) -> Path:
    path = folder / "elog.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def test_options_replace_what_the_file_says(tmp_path: Path) -> None:
    config = load(written(tmp_path, GOOD | {"port": 1}), port=2, host=None)
    assert (config.port, config.host) == (2, "127.0.0.1")
    assert config.credentials == Path.home() / "c"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"experiments": ["mfx 1"]}, r"experiments\.0: .*, not 'mfx 1'"),
        ({"locations": {"s3df": {"jid_prefix": "http://x"}}}, "locations.s3df.jid_prefix"),
        ({"kafka": {}}, "kafka.bootstrap_servers: is missing"),
        ({"colour": "red"}, "colour: no such key"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(written(tmp_path, GOOD | change))


@pytest.mark.parametrize(("text", "why"), [("a: [", "no YAML"), ("- 1", "must be a mapping")])
def test_a_file_that_is_no_configuration_is_said(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load(written(tmp_path, text))


def test_the_example_is_correct_and_on_the_page() -> None:
    path = DOCS / "examples" / "elog-service.yaml"
    load(path)
    assert path.read_text() in (DOCS / "elog.md").read_text()
