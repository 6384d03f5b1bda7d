"""What `lclstreamer --list` prints: every component type with its options."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lclstreamer import models


def listing() -> str:
    """All component types, by section of the configuration."""
    lines: list[str] = []
    for section, components in models.COMPONENTS.items():
        lines.append(f"{section}:")
        for model in components:
            lines += _component(model)
        lines.append("")
    for name, value in sorted(models.announced().items()):
        lines.append(f"from another package: {name} ({value})")
    return "\n".join(lines).rstrip()


def _component(model: type[BaseModel]) -> list[str]:
    summary = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    lines = [f"  {model.__name__}: {summary}"]
    for name, info in model.model_fields.items():
        if name == "type":
            continue
        if info.default_factory is not None:
            default = "the current folder"
        elif info.default is PydanticUndefined:
            default = "required"
        else:
            default = f"default {'null' if info.default is None else info.default}"
        text = f"    {name} ({_type(info.annotation)}, {default})"
        lines.append(f"{text}: {info.description}" if info.description else text)
    return lines


def _type(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    parts = typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(map(str, parts))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _type(part) for part in parts)
    if origin is typing.Annotated:
        return _type(parts[0])
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))
