"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lclstream.jobs.config import Callbacks, JobLimits, JobsConfig, Keep, LocalBackend, PsikBackend, SlurmBackend
from lclstream.jobs.machine import table_as_markdown

REPOSITORY = Path(__file__).resolve().parents[4]
PAGE = (REPOSITORY / "docs" / "jobs.md").read_text()


def test_the_states_table_is_the_codes() -> None:
    assert table_as_markdown() in PAGE


def test_the_configuration_shown_is_the_example() -> None:
    assert (REPOSITORY / "docs" / "examples" / "jobs-site.yaml").read_text() in PAGE


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        (JobsConfig, ""),
        (Callbacks, "callbacks."),
        (JobLimits, "limits."),
        (Keep, "keep."),
        (LocalBackend, ""),
        (SlurmBackend, ""),
        (PsikBackend, ""),
    ],
)
def test_every_setting_is_explained_and_shown(model: Any, prefix: str) -> None:
    example = (REPOSITORY / "docs" / "examples" / "jobs-site.yaml").read_text()
    for name in model.model_fields:
        assert re.search(rf"`{re.escape(prefix + name)}\b", PAGE), f"docs/jobs.md does not explain {prefix}{name}"
        if (model, name) not in ((PsikBackend, "credentials"), (SlurmBackend, "reservation_id")):
            assert re.search(rf"\b{name}:", example), f"jobs-site.yaml does not show {name}"
