"""What all sections of the configuration share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_DTYPE = (
    r"^(native|str|bool|int|float|complex|single|double|half|u?int(8|16|32|64)?|float(16|32|64)|complex(64|128)"
    r"|[<>=|]?[?bhilquBHILQefdcFDSU][0-9]{0,2})$"
)
DtypeName = Annotated[str, Field(pattern=_DTYPE)]


class Section(BaseModel):
    """A section of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")
