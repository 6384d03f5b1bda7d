"""Every example configuration is valid, and its classes can be used; those that need no data are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lclstreamer import config, registry

EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "docs" / "examples").glob("engine-*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_every_class_in_it_is_there(path: Path) -> None:
    parameters = config.load(path)
    registry.resolve("event_source", parameters.event_source)
    registry.resolve("data_serializer", parameters.data_serializer)
    for section in (*parameters.data_sources.values(), *parameters.pipelines, *parameters.data_handlers):
        registry.resolve(path.name, section)


def test_examples_are_there() -> None:
    assert len(EXAMPLES) >= 8


def test_the_internal_example_runs_as_it_is(tmp_path: Path) -> None:
    path = next(path for path in EXAMPLES if path.stem == "engine-internal")
    command = [sys.executable, "-m", "lclstreamer.cli", "--config", str(path), "--num-events", "25"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in (tmp_path / "output").iterdir()) == [f"test_r0_{n}.h5" for n in range(3)]
