"""The signer's configuration file.

::

    authority: /etc/lclstream/authority     # CA.crt and CA.key, as `certified init` makes them
    validity_h: 12
    operators: [ada]
    revoked_files: [/etc/lclstream/api/revoked.yaml]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lclstream import config_file
from lclstream.config_file import FilePath
from lclstream.security.rate import Rate

#: Where the socket is unless somebody says otherwise.
SOCKET = Path("/run/lclstream/signer.sock")

_Hours = Annotated[float, Field(gt=0, le=720, allow_inf_nan=False)]
_Login = Annotated[str, Field(min_length=1, max_length=255)]


class SignerConfig(BaseModel):
    """What a signer is told.

    Attributes:
        authority: folder with the signing certificate ``CA.crt`` and its key ``CA.key`` (mode 0600).
        socket: where to listen. Only root or the signer's own user may be able to write to its folder.
        database: SQLAlchemy URL of the table of signatures.
        validity_h: hours a certificate is valid unless the user asks for fewer or more.
        max_validity_h: hours a user may ask for at most; 30 days is the upper bound.
        allow_root: whether root gets certificates, too. Root can become every user, and then has that user's name.
        refused: logins that get none.
        operators: logins that may revoke everybody's certificates and see all signatures; root always may.
        services: services whose addresses users are told, by name.
        services_issuer: certificate (PEM) of the issuer of these services' certificates, when it is not the authority.
        revoked_files: lists of revoked certificates to keep up to date, such as ``revoked.yaml`` in the services'
            certificate folders on this machine.
        rate: how often one user may have a key signed.
    """

    model_config = ConfigDict(extra="forbid")

    authority: FilePath = Field(description="the folder with CA.crt and CA.key (--authority)")
    socket: FilePath = SOCKET
    database: str = "sqlite:////var/lib/lclstream/signer.sqlite"
    validity_h: _Hours = 12.0
    max_validity_h: _Hours = 24.0
    allow_root: bool = False
    refused: list[_Login] = Field(default_factory=list)
    operators: list[_Login] = Field(default_factory=list)
    services: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")], Annotated[str, Field(pattern="^https://")]] = (
        Field(default_factory=dict)
    )
    services_issuer: FilePath | None = None
    revoked_files: list[FilePath] = Field(default_factory=list)
    rate: Rate = Rate(per_s=1 / 60, burst=20)

    @model_validator(mode="after")
    def _bounded(self) -> SignerConfig:
        if self.validity_h > self.max_validity_h:
            raise ValueError(
                f"validity_h ({self.validity_h:g}) is more than max_validity_h ({self.max_validity_h:g}): "
                "raise max_validity_h, or lower validity_h"
            )
        return self


def load(path: Path | None, **options: object) -> SignerConfig:
    """Read a configuration file; options that are not None win over it.

    Raises:
        ConfigError: the file cannot be read, or a value is wrong; the message says which.
    """
    return config_file.load(SignerConfig, path, options)
