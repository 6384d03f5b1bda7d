"""Configuration files: a YAML mapping, checked against a model, with options of the command line over it.

What is wrong is said in lines of the form ``FILE, line N: KEY: what is wrong, not VALUE``. A relative path in a file is
relative to the file, one given as an option to the working directory; ``~`` is the home folder. In models, fields that
hold paths are :data:`FilePath`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError, ValidationInfo

Model = TypeVar("Model", bound=BaseModel)
_Place = Sequence[int | str]

#: A password inside a URL, such as that of a database.
_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]+@")
_LONGEST_VALUE = 200


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names file, key, value and what would be valid."""


def _anchored(path: Path, info: ValidationInfo) -> Path:
    path = path.expanduser()
    folder: Path | None = (info.context or {}).get("folder")
    return path if folder is None else folder / path


#: A path in a configuration file: relative to the file's own folder.
FilePath = Annotated[Path, AfterValidator(_anchored)]


class _Loader(yaml.SafeLoader):
    """YAML without surprises: a key that is given twice is an error, where YAML would forget the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and lines.setdefault(key.value, line) != line:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice, first in line {lines[key.value]}", key.start_mark
                )
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class Document:
    """What a file holds, and where in it.

    Attributes:
        source: how errors call it: the file's path.
        value: what the YAML says; None for an empty file.
        node: the same with line numbers.
    """

    source: str
    value: Any
    node: yaml.Node | None = None

    def line(self, place: _Place) -> int | None:
        """The line of a key, or of the nearest thing around it; None where there are no lines."""
        *_, found = _steps(self.node, place)
        return None if found is None else found.start_mark.line + 1

    def where(self, place: _Place) -> str:
        """File, line and key, as every error begins."""
        line = self.line(place)
        key = _key(self.node, place)
        return f"{self.source}{f', line {line}' if line else ''}: {f'{key}: ' if key else ''}"


def read(path: Path) -> Document:
    """The YAML of a file.

    Raises:
        ConfigError: it cannot be read, or is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_told_by_yaml(error)}") from error
    except (ValueError, RecursionError) as error:
        # Such as a thirteenth month, or thousands of brackets.
        raise ConfigError(f"{path}: is no YAML: {error}") from error
    return Document(str(path), value, node)


def load(model: type[Model], path: Path | None, options: Mapping[str, object] | None = None) -> Model:
    """A configuration from a file and from options, which win.

    Args:
        model: what it has to be.
        path: the file, or None when the options say everything.
        options: values by key, with dots for those inside a section (``listen.port``); None: not given.

    Raises:
        ConfigError: the file cannot be read, or a value in it or in the options cannot be used. All that is wrong is
            told at once.
    """
    document = Document("the command line", {}) if path is None else read(path)
    return validate(model, document, options, folder=None if path is None else path.absolute().parent)


def validate(
    model: type[Model],
    document: Document,
    options: Mapping[str, object] | None = None,
    *,
    folder: Path | None = None,
) -> Model:
    """The same for a document that was read already.

    Args:
        model: what it has to be.
        document: what was read.
        options: as in :func:`load`.
        folder: what relative paths in it are relative to; None: the working directory.

    Raises:
        ConfigError: as in :func:`load`.
    """
    content = {} if document.value is None else document.value
    if not isinstance(content, dict):
        needed = " and ".join(name for name, field in model.model_fields.items() if field.is_required())
        raise ConfigError(
            f"{document.source}: must be a mapping of keys to values{f', at least {needed}' if needed else ''}, and it "
            f"holds {_shown(content)}"
        )
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for key, value in given.items():
        # Somebody who types a path means the folder he is in.
        content = _with(content, key.split("."), value.expanduser().absolute() if isinstance(value, Path) else value)
    try:
        return model.model_validate(content, context={"folder": folder})
    except ValidationError as error:
        lines = [_explain(model, document, problem, given) for problem in error.errors(include_url=False)]
        raise ConfigError(_PASSWORD.sub(r"\1:***@", "\n".join(lines))) from error


def _with(content: Any, keys: Sequence[str], value: object) -> Any:
    """The content with one value replaced; what is no section stays, for the model to complain of."""
    if not keys:
        return value
    if content is None:
        content = {}
    if not isinstance(content, dict):
        return content
    return {**content, keys[0]: _with(content.get(keys[0]), keys[1:], value)}


def _explain(model: type[BaseModel], document: Document, problem: Any, options: Mapping[str, object]) -> str:
    place: tuple[int | str, ...] = problem["loc"]
    kind = problem["type"]
    from_option = ".".join(map(str, place)) in options
    where = f"the command line: {'.'.join(map(str, place))}: " if from_option else document.where(place)
    value = problem.get("input")
    if kind == "missing":
        return f"{where}is missing{_meaning(model, place)}"
    if kind == "extra_forbidden":
        return f"{where}no such key{_similar(model, place)}"
    said = str(problem["msg"]).removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        said = "must be a mapping of keys to values"
    # Our own checks name the value where it helps, and a whole section would only hide what is said of it.
    if isinstance(value, dict | list) or (kind == "value_error" and str(value) in said):
        return f"{where}{said}"
    return f"{where}{said}, not {_shown(value)}"


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _models_at(model: type[BaseModel], place: _Place) -> list[type[BaseModel]]:
    """The models whose field the last part of a place may be. Parts that are no fields are names, numbers or tags."""
    found = [model]
    for part in place[:-1]:
        fields = [one.model_fields[part] for one in found if part in one.model_fields]
        found = [inner for field in fields for inner in _models_in(field.annotation)] or found
    return found


def _meaning(model: type[BaseModel], place: _Place) -> str:
    for one in _models_at(model, place):
        field = one.model_fields.get(str(place[-1]))
        if field is not None and field.description:
            return f": {field.description}"
    return ""


def _similar(model: type[BaseModel], place: _Place) -> str:
    names = {name for one in _models_at(model, place) for name in one.model_fields}
    close = difflib.get_close_matches(str(place[-1]), names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names))}"


def _steps(node: yaml.Node | None, place: _Place) -> Iterator[yaml.Node | None]:
    """The nodes on the way to a place; the way stays where it is at a part that is not in the file."""
    yield node
    for part in place:
        if isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == str(part)), node)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        yield node


def _key(node: yaml.Node | None, place: _Place) -> str:
    """The keys as they are in the file. pydantic also names the member of a union it tried."""
    if node is None:
        return ".".join(map(str, place))
    on_the_way = list(_steps(node, place))
    last = len(place) - 1
    return ".".join(
        str(part)
        for number, part in enumerate(place)
        if on_the_way[number] is not on_the_way[number + 1]
        or (number == last and isinstance(on_the_way[number], yaml.MappingNode))
    )


def _told_by_yaml(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        # What was being read when it went wrong often began lines before.
        began = error.context_mark
        context = f" ({error.context}, which began in line {began.line + 1})" if error.context and began else ""
        return f", line {mark.line + 1}, column {mark.column + 1}: is no YAML: {error.problem}{context}"
    return f": is no YAML: {error}"
