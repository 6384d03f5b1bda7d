"""Examples and the table of options are what the program takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from lclstream.api.config import ApiConfig, load_config

DOCS = Path(__file__).parents[4] / "docs"


@pytest.mark.parametrize("example", sorted((DOCS / "examples").glob("api-*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_configuration(example: Path) -> None:
    load_config(example)


def keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= keys(inner, f"{name}.")
        else:
            found.add(prefix + name)
    return found


def test_every_option_is_documented_and_nothing_else() -> None:
    rows = [line.split("|")[1] for line in (DOCS / "transfers.md").read_text().splitlines() if line.startswith("| `")]
    told = set()
    for row in rows:
        section = ""
        for word in re.findall(r"`([a-z_.]+)`", row):
            section = word.rpartition(".")[0] or section
            told.add(f"{section}{word}" if word.startswith(".") else word)
    assert keys(ApiConfig) <= told, "add the option to the table in docs/transfers.md"
    assert {word for word in told if "." in word} <= keys(ApiConfig), "the table has an option that does not exist"
