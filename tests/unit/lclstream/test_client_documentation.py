"""docs/client.md knows every option, and its Python is Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

from lclstream.consumers.cli import app as consume_app
from lclstream.stream_cli import get_app, pull_app, push_app

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "client.md").read_text()
SECTIONS = {part.splitlines()[0].strip(): part for part in PAGE.split("\n## ")[1:]}


def options(app: typer.Typer, command: str | None = None) -> list[str]:
    found = typer.main.get_command(app)
    if command:
        found = found.commands[command]
    return [
        max(each.opts, key=len)
        for each in found.params
        if each.param_type_name == "option" and "--help" not in each.opts
    ]


@pytest.mark.parametrize(
    ("section", "app", "command"),
    [
        ("lclstream get", get_app, None),
        ("lclstream pull", pull_app, None),
        ("lclstream push", push_app, None),
        ("lclstream consume run-summary", consume_app, "run-summary"),
    ],
)
def test_every_option_is_documented_and_no_other(section, app, command):
    table = "\n".join(line for line in SECTIONS[section].splitlines() if line.startswith("| `"))
    names = set(re.findall(r"--[a-z][a-z-]+", table))
    assert names == set(options(app, command))


def test_the_python_examples_compile():
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert examples
    for example in examples:
        ast.parse(example)
