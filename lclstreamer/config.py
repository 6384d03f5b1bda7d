"""The configuration file: the model of all of it, and how it is read.

Importing this module needs pydantic and PyYAML only.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Annotated, Any, Self, cast

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from lclstreamer import identifiers, models
from lclstreamer._older_spellings import modernise
from lclstreamer.errors import ConfigurationError
from lclstreamer.models import (
    DataSourceSection,
    EventSourceSection,
    HandlerSection,
    PipelineSection,
    SerializerSection,
)
from lclstreamer.section import Section

__all__ = [
    "ConfigurationError",
    "ConfigurationWarning",
    "OlderSpellingWarning",
    "Parameters",
    "from_mapping",
    "load",
    "schema",
]


#: Data sources that give the event's time.
_TIMES = ("Psana1Timestamp", "Psana2Timestamp", "HDF5Timestamp")


class ConfigurationWarning(FutureWarning):
    """A configuration is not taken as it is written; the text says how."""


class OlderSpellingWarning(ConfigurationWarning):
    """A configuration uses a spelling of an earlier version; the text gives the present one."""


def _one_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "one"


class Parameters(Section):
    """The whole configuration of an engine run."""

    source_identifier: str = Field(description="which data, in the words of the event source")
    skip_incomplete_events: bool = Field(
        description="leave out events of which a data source gave nothing; otherwise missing values are filled and "
        "marked"
    )
    event_source: EventSourceSection
    data_sources: dict[str, DataSourceSection] = Field(description="name: what to read from every event")
    processing_pipeline: Annotated[
        Annotated[PipelineSection, Tag("one")] | Annotated[list[PipelineSection], Tag("list"), Field(min_length=1)],
        Discriminator(_one_or_list),
    ] = Field(description="one pipeline, or a list of them applied in order")
    data_serializer: SerializerSection
    data_handlers: list[HandlerSection] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _older_spellings(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data, changes = modernise(data)
        for change in changes:
            warnings.warn(change, OlderSpellingWarning, stacklevel=2)
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = [*self._source_problems(), *self._pipeline_problems(), *self._serializer_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        self._leave_out_absent_fields()
        return self

    def _leave_out_absent_fields(self) -> None:
        """As in the original: a file of several detectors serves for runs that do not have all of them."""
        serializer = self.data_serializer
        if not isinstance(serializer, models.HDF5BinarySerializer):
            return
        names, _ = self._names_after()
        absent = self._absent_fields(names)
        for name in absent:
            warnings.warn(
                _no_data_source(name, names, f", nothing is stored at {serializer.fields[name]}"),
                ConfigurationWarning,
                stacklevel=2,
            )
        if absent:
            fields = {name: path for name, path in serializer.fields.items() if name not in absent}
            self.data_serializer = serializer.model_copy(update={"fields": fields})

    def _names_after(self) -> tuple[list[str], dict[str, str]]:
        """The names that events have after the pipelines, and those that pipelines have replaced, with their types."""
        names, replaced = list(self.data_sources), dict[str, str]()
        for section in self.pipelines:
            names = _after(section, names, replaced)
        return names, replaced

    def _absent_fields(self, names: list[str]) -> list[str]:
        """Fields of which there is nothing to store; none can be told where pipelines of other packages make names."""
        made = any(isinstance(section, models.ThirdParty) for section in self.pipelines)
        return [] if made else [name for name in self.data_serializer.fields if name not in names]

    def _source_problems(self) -> list[str]:
        kind = self.event_source.type
        problems = []
        try:
            if kind == "Psana2EventSource":
                identifiers.parse_psana2(self.source_identifier)
            elif kind == "Psana1EventSource":
                identifiers.parse_psana1(self.source_identifier)
            elif kind == "HDF5EventSource":
                identifiers.parse_files(self.source_identifier)
        except ValueError as error:
            problems.append(f"source_identifier: {error}")
        for name, section in self.data_sources.items():
            for family in ("Psana1", "Psana2", "HDF5"):
                if section.type.startswith(family) and kind != f"{family}EventSource":
                    problems.append(
                        f"data_sources.{name}.type: {section.type} reads events of {family}EventSource only, "
                        f"and event_source.type is {kind}"
                    )
        return problems

    def _pipeline_problems(self) -> list[str]:
        problems = []
        names, replaced = list(self.data_sources), dict[str, str]()
        made = False
        for number, section in enumerate(self.pipelines):
            made = made or isinstance(section, models.ThirdParty)
            for key in ("data_source", "frame_number", "sector_number"):
                wanted = getattr(section, key, None)
                if wanted is not None and wanted not in names and not made:
                    place = f"processing_pipeline[{number}]" if len(self.pipelines) > 1 else "processing_pipeline"
                    gone = f" here: {replaced[wanted]} has replaced it" if wanted in replaced else ""
                    problems.append(
                        f"{place}.{key}: {wanted!r} is no data source{gone}; there are {', '.join(names)}"
                        + models.nearest(wanted, names)
                    )
            names = _after(section, names, replaced)
        batching = [section.type for section in self.pipelines if getattr(section, "batch_size", None) is not None]
        if len(batching) > 1:
            problems.append(
                f"processing_pipeline: {' and '.join(batching)} both batch; only one pipeline of a list may"
            )
        return problems

    def _serializer_problems(self) -> list[str]:
        serializer = self.data_serializer
        names, replaced = self._names_after()
        if isinstance(serializer, models.HDF5BinarySerializer):
            absent = self._absent_fields(names)
            problems = [
                f"data_serializer.fields.{name}: {replaced[name]} has replaced {name}; there are {', '.join(names)}"
                for name in absent
                if name in replaced
            ]
            if len(absent) == len(serializer.fields):
                problems += [_no_data_source(name, names) for name in absent if name not in replaced]
            timed = [name for name, section in self.data_sources.items() if section.type in _TIMES]
            ragged = [
                name
                for section in self.pipelines
                if not isinstance(section, models.ThirdParty)
                for name in getattr(section, "makes_ragged", ())
            ]
            return problems + serializer.collisions(timed, ragged, not self.skip_incomplete_events)
        if isinstance(serializer, models.SimplonBinarySerializer):
            needed = [
                "timestamp",
                "detector_data",
                "detector_geometry",
                "run_info",
                serializer.data_source_to_serialize,
            ]
            missing = [name for name in dict.fromkeys(needed) if name not in names]
            if missing:
                return [
                    f"data_sources: {serializer.type} needs {', '.join(missing)} as well; there are {', '.join(names)}"
                ]
        return []

    @property
    def pipelines(self) -> list[Any]:
        """The pipelines in order, also when the file gives one without a list."""
        return self.processing_pipeline if isinstance(self.processing_pipeline, list) else [self.processing_pipeline]

    def sha256(self) -> str:
        """Fingerprint of the configuration's content; the spelling and order in the file do not matter."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _no_data_source(name: str, names: list[str], result: str = "") -> str:
    return (
        f"data_serializer.fields.{name}: no data source has this name{result}; there are {', '.join(names)}"
        + models.nearest(name, names)
    )


def _after(section: Any, names: list[str], replaced: dict[str, str]) -> list[str]:
    """The names that events have after a pipeline; one that it replaces is put into `replaced` with its type."""
    made: list[str] = [] if isinstance(section, models.ThirdParty) else getattr(section, "makes", [])
    if not made:
        return names
    replaced[section.data_source] = section.type
    return [name for name in names if name != section.data_source] + made


def schema() -> dict[str, Any]:
    """The JSON schema of the configuration file."""
    return Parameters.model_json_schema()


def load(path: Path | str) -> Parameters:
    """Read a configuration file, YAML or JSON.

    Raises:
        ConfigurationError: the file cannot be read, or what is in it is not valid; the text has a line for each
            mistake with the file, the place in it, the value, and what would be valid.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(
            f"configuration file {path} does not exist; name one with --config FILE (`lclstreamer --help` shows an "
            "example)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"configuration file {path} cannot be read: {error}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"configuration file {path} is not YAML: {error}") from None
    return from_mapping(data, origin=str(path))


def from_mapping(data: Any, *, origin: str = "configuration") -> Parameters:
    """Check a configuration that is already a mapping.

    Args:
        data: what YAML or JSON gave.
        origin: how errors call it, usually the file's path.

    Raises:
        ConfigurationError: as in :func:`load`.
    """
    if not isinstance(data, dict):
        raise ConfigurationError(
            f"{origin}: a mapping with the keys {', '.join(Parameters.model_fields)} is needed, not "
            f"{'an empty file' if data is None else type(data).__name__}"
        )
    try:
        return Parameters.model_validate(data)
    except ValidationError as error:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modern, _ = modernise(data)
        found = [line for one in error.errors() for line in _explain(cast("dict[str, Any]", one), modern).split("\n")]
        lines = [f"{origin}: {line}" for line in found]
        raise ConfigurationError("\n".join(dict.fromkeys(lines))) from None


def _explain(error: dict[str, Any], data: dict[str, Any]) -> str:
    place, node, section = _place(error, data)
    kind = error["type"]
    if kind == "missing":
        return f"{place}: this key is missing"
    if kind == "extra_forbidden":
        known = _known_keys(section, node)
        key = str(error["loc"][-1])
        return f"{place}: unknown key; known here: {', '.join(known)}{models.nearest(key, known)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = error["input"].get("type") if isinstance(error["input"], dict) else None
        valid = [model.__name__ for model in models.COMPONENTS.get(section, ())] + sorted(models.announced())
        if given is None:
            return f"{place}: `type:` is missing; valid types: {', '.join(valid)}"
        return f"{place}.type: {given!r} is not a type; valid: {', '.join(valid)}{models.nearest(str(given), valid)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not place:
        return message
    value = "" if isinstance(error["input"], dict) else f"{error['input']!r}: "
    return f"{place}: {value}{message[:1].lower()}{message[1:]}"


def _place(error: dict[str, Any], data: dict[str, Any]) -> tuple[str, Any, str]:
    """The place in the file, the mapping there, and the top section; pydantic's own words in `loc` are left out."""
    node: Any = data
    holder: Any = data
    words: list[str] = []
    for number, item in enumerate(error["loc"]):
        last = number == len(error["loc"]) - 1
        if isinstance(node, dict) and item in node:
            holder, node = node, node[item]
        elif isinstance(node, list) and isinstance(item, int) and item < len(node):
            holder, node = node, node[item]
            words[-1] = f"{words[-1]}[{item}]"
            continue
        elif not (last and error["type"] == "missing"):
            continue
        words.append(str(item))
    section = words[0].partition("[")[0] if words else ""
    return ".".join(words), holder, section


def _known_keys(section: str, node: Any) -> list[str]:
    model: type[BaseModel] | None = Parameters
    if isinstance(node, dict) and "type" in node:
        model = models.model_of(section, node["type"])
    return list(model.model_fields) if model else []
