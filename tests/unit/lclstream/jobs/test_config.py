"""A configuration that cannot work is refused at once, with file, key and value."""

from __future__ import annotations

from pathlib import Path

import pytest

from lclstream.config_file import ConfigError
from lclstream.jobs.config import Callbacks, load

REPOSITORY = Path(__file__).resolve().parents[4]


def written(folder: Path, text: str) -> Path:
    path = folder / "jobs.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "docs" / "examples").glob("jobs-*.yaml")), ids=lambda path: path.name
)
def test_every_example_is_a_valid_configuration(path: Path) -> None:
    load(path)


def test_there_are_examples() -> None:
    assert list((REPOSITORY / "docs" / "examples").glob("jobs-*.yaml"))


def test_options_override_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "prefix: /a\ncredentials: /c\nlisten: {host: 10.0.0.1, port: 1234}\n")
    config = load(path, prefix=Path("/b"), port=99, host=None, cancel_jobs_on_exit=True)
    assert config.prefix == Path("/b")
    assert (config.listen.host, config.listen.port) == ("10.0.0.1", 99)
    assert config.cancel_jobs_on_exit


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("credentials: /c\n", ["prefix", "missing"]),
        ("prefix: /p\ncredentials: /c\ncolour: blue\n", ["colour", "no such key"]),
        ("prefix: /p\ncredentials: /c\nlisten: {port: 99999}\n", ["listen.port", "65535", "99999"]),
        ("prefix: /p\ncredentials: /c\nbackends: {}\n", ["backends"]),
        ("prefix: /p\ncredentials: /c\nbackends: {a: {type: torque}}\n", ["backends.a", "torque"]),
        ("prefix: /p\ncredentials: /c\ncallbacks: {allow: ['http://host/']}\n", ["http://host/", "https"]),
        ("prefix: /p\ncredentials: /c\ndirectories: [data]\n", ["data", "absolute"]),
        ("prefix: /p/jobs\ncredentials: /c\ndirectories: [/p]\n", ["/p", "prefix"]),
        ("prefix: /p\ncredentials: /c/me\ndirectories: [/c]\n", ["/c", "credentials"]),
        ("- a list\n", ["mapping"]),
        ("a: [", ["YAML"]),
    ],
)
def test_a_wrong_configuration_names_file_key_and_remedy(tmp_path: Path, text: str, words: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load(tmp_path / "nowhere.yaml")


ALLOWED = Callbacks(allow=["https://api.example.org:8446/v1/callback", "https://other.example.org/"])


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example.org:8446/v1/callback",
        "https://api.example.org:8446/v1/callback/producer",
        "https://API.example.org:8446/v1/callback/producer?x=1",
        "https://other.example.org/any/thing",
        "https://other.example.org:443/any",
    ],
)
def test_a_callback_below_an_allowed_prefix_is_permitted(url: str) -> None:
    assert ALLOWED.permit(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example.org:8446/v1/callback",
        "https://api.example.org/v1/callback",
        "https://api.example.org:8446/v1/callbacks",
        "https://api.example.org:8446/v1/callback/../admin",
        "https://api.example.org:8446/v1/callback/%2e%2e/admin",
        "https://api.example.org:8446/v1/callback/%252e%252e/admin",
        "https://api.example.org:8446@evil.example.org/v1/callback",
        "https://other.example.org.evil.example.org/",
        "https://other.example.org:x/",
        "https://other.example.org/a\\b",
        "https://other.example.org/a b",
        "https://[::1/",
        "file:///etc/passwd",
        "",
    ],
)
def test_any_other_callback_is_not(url: str) -> None:
    assert not ALLOWED.permit(url)


def test_no_callback_is_allowed_by_default() -> None:
    assert not Callbacks().permit("https://api.example.org/")
