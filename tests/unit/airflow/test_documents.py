from __future__ import annotations

from pathlib import Path

import pytest

from lclstream_airflow.operators.documents import DocumentError, load_document


def test_an_object_its_text_and_its_file_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("lclstreamer:\n  source_identifier: exp=mfx,run=7\n")
    expected = {"lclstreamer": {"source_identifier": "exp=mfx,run=7"}}
    assert load_document(expected, {}, "config") == expected
    assert load_document(path.read_text(), {}, "config") == expected
    assert load_document('{"lclstreamer": {"source_identifier": "exp=mfx,run=7"}}', {}, "config") == expected
    assert load_document(str(path), {}, "config") == expected
    # `{{ params.x | tojson }}` makes a JSON text of a path.
    assert load_document(f'"{path}"', {}, "config") == expected


def test_places_are_filled_everywhere_and_keep_their_type() -> None:
    document = {
        "run": "{{ run }}",
        "name": "r{{ run:04d }} of {{ experiment }}",
        "script": "pull {{ url | quote }}",
        "list": [{"deep": "{{experiment}}"}, 3, None],
    }
    values = {"run": 7, "experiment": "mfx", "url": "tcp://h:1; rm -rf /"}
    assert load_document(document, values, "job") == {
        "run": 7,
        "name": "r0007 of mfx",
        "script": "pull 'tcp://h:1; rm -rf /'",
        "list": [{"deep": "mfx"}, 3, None],
    }
    assert load_document({"name": "r{{ run:04d }}"}, {"run": "7"}, "job") == {"name": "r0007"}


def test_a_value_is_never_read_as_a_template() -> None:
    assert load_document({"a": "x{{ run }}"}, {"run": "{{ run }}"}, "job") == {"a": "x{{ run }}"}
    assert load_document({"a": "{% raw %} ${#list} {# no comment #}"}, {}, "job") == {
        "a": "{% raw %} ${#list} {# no comment #}"
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"script": "{{ nowhere }}"}, r"job: script: nobody gives a value for \{\{ nowhere \}\}; known names: run"),
        ({"a": {"b": ["{{ run:04d }}"]}}, r"job: a\.b\[0\]: .*with 'seven'"),
        ("relative/job.yaml", "neither an object nor an absolute path"),
        ("/nowhere/job.yaml", "/nowhere/job.yaml cannot be read on this worker"),
        ("a: [1", "neither JSON nor YAML"),
        ("- 1\n- 2", "an object is needed"),
        ("", "an object is needed"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(source: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        load_document(source, {"run": "seven"}, "job")
