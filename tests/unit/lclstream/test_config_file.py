"""A wrong configuration file is told of in lines that name file, line, key and value, and what would be valid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lclstream import config_file
from lclstream.config_file import ConfigError, Document, FilePath


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Listen(_Section):
    host: str = "127.0.0.1"
    port: int = Field(default=1, ge=1, le=65535)


class Slow(_Section):
    type: Literal["slow"]
    pause_s: float = 1.0


class Fast(_Section):
    type: Literal["fast"]
    rate: int | float = 2
    key: FilePath | None = None


class Site(_Section):
    credentials: FilePath = Field(description="the folder of the service's certificate")
    listen: Listen = Listen()
    ways: dict[str, Annotated[Slow | Fast, Field(discriminator="type")]] = {}
    lists: list[FilePath] = []
    database: str = "sqlite://"

    @field_validator("database")
    @classmethod
    def _known(cls, url: str) -> str:
        if not url.startswith("sqlite:"):
            raise ValueError(f"{url}: only sqlite: is known here")
        return url


def written(folder: Path, text: str) -> Path:
    path = folder / "site.yaml"
    path.write_text(text, encoding="utf-8")
    return path


FINE = "credentials: me\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("listen: {port: 5}\n", "line 1: credentials: is missing: the folder of the service's certificate"),
        ("", ": credentials: is missing: the folder of the service's certificate"),
        (FINE + "listen:\n  host: x\n  port: 70000\n",
         "line 4: listen.port: Input should be less than or equal to 65535, not 70000"),
        (FINE + "listen:\n  hots: x\n", "line 3: listen.hots: no such key; did you mean host?"),
        (FINE + "zzz: 1\n", "line 2: zzz: no such key; there are credentials, database, listen, lists, ways"),
        (FINE + "listen:\n", "line 2: listen: must be a mapping of keys to values, not nothing"),
        (FINE + "ways:\n  a:\n    type: slow\n    paus_s: 3\n",
         "line 5: ways.a.paus_s: no such key; did you mean pause_s?"),
        # The member of a union that was tried is no key of the file.
        (FINE + "ways:\n  a:\n    type: slow\n    pause_s: soon\n",
         "line 5: ways.a.pause_s: Input should be a valid number, unable to parse string as a number, not 'soon'"),
        (FINE + "ways: {a: {type: fats}}\n", "line 2: ways.a: Input tag 'fats' found"),
        (FINE + "lists:\n  - a\n  - 7\n", "line 4: lists.1: Input is not a valid path"),
        (FINE + "database: 'mysql://ada:hush@db/x'\n", "line 2: database: mysql://ada:***@db/x: only sqlite: is known"),
        (FINE + "credentials: you\n",
         "line 2, column 1: is no YAML: the key credentials is given twice, first in line 1"),
        ("a: [1,\nb: 2", "line 2, column 5: is no YAML: expected ',' or ']'"),
        ("a: 'x\n\n", "line 3, column 1: is no YAML: found unexpected end of stream (while scanning a quoted scalar, "
         "which began in line 1)"),
        ("a: \x07\n", ": is no YAML: unacceptable character"),
        ("a: 2026-13-45\n", ": is no YAML: month must be in 1..12"),
        ("[" * 5000, ": is no YAML: maximum recursion depth exceeded"),
        ("- a\n", ": must be a mapping of keys to values, at least credentials, and it holds ['a']"),
        ("!!python/object:os.system {}\n", "line 1, column 1: is no YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_file_line_key_and_value(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config_file.load(Site, path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "hush" not in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.load(Site, written(tmp_path, "colour: blue\nlisten: {port: 0}\n"))
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == ["credentials", "listen.port", "colour"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        config_file.load(Site, tmp_path / "nowhere.yaml")
    (tmp_path / "latin").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match="latin: is no text in UTF-8"):
        config_file.load(Site, tmp_path / "latin")


def test_paths_in_a_file_are_relative_to_it_and_those_of_options_to_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    path = written(tmp_path, "credentials: me\nlists: [~/x, /y]\nways: {a: {type: fast, key: k}}\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "/home/ada")
    site = config_file.load(Site, Path("../site.yaml"))
    assert site.credentials == here / ".." / "me"
    assert site.lists == [Path("/home/ada/x"), Path("/y")]
    assert config_file.load(Site, path).ways["a"] == Fast(type="fast", key=tmp_path / "k")
    assert config_file.load(Site, path, {"credentials": Path("you")}).credentials == here / "you"
    assert config_file.load(Site, None, {"credentials": Path("you")}).credentials == here / "you"


def test_options_win_over_the_file_and_are_named_when_they_are_wrong(tmp_path: Path) -> None:
    path = written(tmp_path, "credentials: me\nlisten: {host: h, port: 2}\n")
    site = config_file.load(Site, path, {"listen.port": 3, "database": None})
    assert (site.listen.host, site.listen.port, site.database) == ("h", 3, "sqlite://")
    assert config_file.load(Site, written(tmp_path, FINE), {"listen.port": 3}).listen.port == 3
    with pytest.raises(ConfigError, match=r"^the command line: listen\.port: .*, not 0$"):
        config_file.load(Site, path, {"listen.port": 0})
    with pytest.raises(ConfigError, match=r"^the command line: credentials: is missing"):
        config_file.load(Site, None)
    with pytest.raises(ConfigError, match=r"line 2: listen: must be a mapping of keys to values, not 7$"):
        config_file.load(Site, written(tmp_path, FINE + "listen: 7\n"), {"listen.port": 3})


def test_a_document_from_elsewhere_is_told_of_without_lines() -> None:
    with pytest.raises(ConfigError, match=r"^the form: listen\.port: "):
        config_file.validate(Site, Document("the form", {"credentials": "x", "listen": {"port": 0}}))


def test_merge_keys_of_yaml_are_no_double_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "x: &x {a: 1}\ny: {<<: *x, a: 2, b: 3}\n")
    assert config_file.read(path).value["y"] == {"a": 2, "b": 3}
