"""Configurations and job specifications as tasks get them: an object, its text, or the path of a file.

Files and conf come from people who may not be allowed to write DAGs. So places in them are filled by plain replacement
of known names, never by Jinja, whose expressions could read every connection and variable of Airflow.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

#: ``{{ run }}``, ``{{ run:04d }}``, ``{{ uri | quote }}``
_PLACE = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*(?::([^}|\s]*))?\s*(\|\s*quote)?\s*\}\}")
#: A description of work is never longer; a path to something else was meant.
_LONGEST = 2_000_000


class DocumentError(ValueError):
    """A document cannot be read, is no object, or has a place nobody fills; the message says which and where."""


def load_document(source: Mapping[str, Any] | str, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The document as an object, with its places filled.

    :param source: an object, its text in JSON or YAML, or the absolute path of a file with such a text
    :param values: what ``{{ name }}`` stands for in the document's texts. ``{{ run:04d }}`` takes a format of Python,
        ``{{ uri | quote }}`` quotes for a shell; a text that is nothing but a place becomes the value itself
    :param what: what it is, for messages, such as "job"
    :raises DocumentError: see there
    """
    where = what
    document: Any = source
    if isinstance(document, str):
        document = _parse(document, what)
        if isinstance(document, str):
            path = Path(document)
            where = f"{what} {path}"
            document = _parse(_read(path, what), where)
    if not isinstance(document, Mapping):
        raise DocumentError(f"{where}: an object is needed (keys and values), not {type(document).__name__}")
    filled = _fill(document, values, where, "")
    assert isinstance(filled, dict)
    return filled


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DocumentError(f"{where}: neither JSON nor YAML: {error}") from error


def _read(path: Path, what: str) -> str:
    if not path.is_absolute():
        raise DocumentError(
            f"{what}: {str(path)!r} is neither an object nor an absolute path; a relative one would depend on where "
            "the worker was started"
        )
    try:
        if path.stat().st_size > _LONGEST:
            raise DocumentError(f"{what}: {path} has more than {_LONGEST} bytes: is it the right file?")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(f"{what}: {path} cannot be read on this worker: {error}") from error


def _fill(value: Any, values: Mapping[str, Any], where: str, at: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _fill(inner, values, where, f"{at}.{key}" if at else str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_fill(inner, values, where, f"{at}[{index}]") for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> Any:
        name = match.group(1)
        if name not in values:
            known = ", ".join(sorted(values)) or "none"
            raise DocumentError(f"{where}: {at}: nobody gives a value for {match.group(0)}; known names: {known}")
        return values[name]

    def text(match: re.Match[str]) -> str:
        found, spec, quoted = look_up(match), match.group(2), match.group(3)
        if spec:
            try:
                found = format(int(found) if spec[-1:] in "bcdoxX" else found, spec)
            except ValueError as error:
                raise DocumentError(f"{where}: {at}: {match.group(0)} with {found!r}: {error}") from error
        return shlex.quote(str(found)) if quoted else str(found)

    whole = _PLACE.fullmatch(value.strip())
    if whole is not None and not whole.group(2) and not whole.group(3):
        return look_up(whole)
    return _PLACE.sub(text, value)
