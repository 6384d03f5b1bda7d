"""What all sections of the configuration share."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

#: numpy's names of numbers and strings: numpy itself must not be needed for checking a configuration.
_DTYPE = (
    r"^(native|str_?|bytes_?|bool_?|u?byte|u?short|int_|u?int[cp]?|u?long|u?longlong|half|single|double|longdouble|float"
    r"|complex|csingle|cdouble|clongdouble|u?int(8|16|32|64)|float(16|32|64|128)|complex(64|128|256)"
    r"|[<>=|]?([?bBhHiIlLqQpPnNefdgFDG]|b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU][0-9]{0,6}))$"
)


def _known(name: str) -> str:
    if not re.fullmatch(_DTYPE, name):
        raise ValueError(
            "is no numpy dtype of numbers or strings; valid are e.g. float32, uint16, str, U100 and native"
        )
    return name


def _native(name: Any) -> Any:
    # numpy takes None for "as it is", and so does the original engine.
    return "native" if name is None else name


DtypeName = Annotated[
    str, BeforeValidator(_native), AfterValidator(_known), Field(json_schema_extra={"pattern": _DTYPE})
]


class Section(BaseModel):
    """A section of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")
