"""`lclstream get` when there is nothing to get."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from lclstream.stream_cli import get_app

GOOD = "event_source: {type: InternalEventSource}\n"


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The command sets up logging for its process; here that is the test's."""
    root, httpx = logging.getLogger(), logging.getLogger("httpx")
    handlers, levels = root.handlers[:], (root.level, httpx.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    httpx.setLevel(levels[1])


@pytest.mark.parametrize(
    ("text", "options", "code", "words"),
    [
        ("a: [1", {}, 2, "stream.yaml"),
        ("- 1\n", {}, 2, "holds list"),
        (None, {}, 2, "stream.yaml"),
        (GOOD, {"--credentials": "/nowhere/at/all"}, 2, "/nowhere/at/all"),
        (GOOD, {"--names": "same.h5"}, 2, "--names"),
        (GOOD, {}, 3, "cannot be reached"),
    ],
)
def test_what_cannot_be_asked_for_is_told_with_the_right_code(
    tmp_path, sites, free_port, caplog, text, options, code, words
):
    config = tmp_path / "stream.yaml"
    if text is not None:
        config.write_text(text)
    credentials = sites["s3df"].member("alice").folder
    given = {"--server": f"https://127.0.0.1:{free_port()}", "--credentials": str(credentials), **options}
    result = CliRunner().invoke(get_app, [str(config), *(word for pair in given.items() for word in pair)])
    assert result.exit_code == code, result.output
    assert words in caplog.text
