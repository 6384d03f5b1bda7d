"""The configuration of the Superfacility stand-in: one YAML file, checked before anything starts."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lclstream import config_file
from lclstream.config_file import ConfigError, FilePath
from lclstream.jobs.config import LocalBackend, SbatchOption, SlurmBackend

#: Paths the published client and NERSC's own service have.
API_PATH = "/api/v1.2"
TOKEN_PATH = "/c2id/token"  # noqa: S105 - a path

#: The published client knows no other machines.
MachineName = Literal["perlmutter", "dtns", "dtn01"]
MachineBackend = Annotated[LocalBackend | SlurmBackend, Field(discriminator="type")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Model):
    """Where the service listens.

    Attributes:
        host: address; other than the loopback address only with `tls`.
        port: port.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8449, ge=1, le=65535)


class Tls(_Model):
    """The service's certificate. Clients show none: they have tokens.

    Attributes:
        certificate: PEM file, the chain.
        key: PEM file.
    """

    certificate: FilePath
    key: FilePath


class Client(_Model):
    """A program that may ask for tokens.

    Attributes:
        id: its id, 13 letters and digits, as the published client demands.
        user: on whose behalf it works.
        public_key: PEM file with its RSA public key (`lclstream superfacility client` makes both halves).
    """

    id: str = Field(pattern=r"^[A-Za-z0-9]{13}$")
    user: str = Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")
    public_key: FilePath


class Project(_Model):
    """A project (repository) of the users.

    Attributes:
        name: such as ``m1234``.
        description: a sentence.
        users: who belongs to it.
    """

    name: str
    description: str = ""
    users: list[str] = []


class SuperfacilityConfig(_Model):
    """The service.

    Attributes:
        listen: where it listens.
        url: its address as clients write it; from `listen` by default. Part of what clients sign.
        tls: its certificate; none: plain HTTP, on the loopback address only.
        state: folder for its jobs' records; apart from `files`.
        files: folder that holds one folder a user: what users see, up- and download, and where jobs run.
        machines: where jobs run, by the name of NERSC's machine it stands for.
        clients: who may ask for tokens.
        projects: for ``account/projects``.
        status: YAML file with states and outages of machines, read at each request; everything is active without it.
        ignore_options: options of sbatch that scripts may have and that mean nothing on this site's cluster, such as
            ``--constraint``; a local machine ignores all but nodes, processes, cores and time.
        token_s: how long a token is good for, in seconds.
        download_bytes: largest file to download.
        upload_bytes: largest body of a request.
        cancel_jobs_on_exit: whether stopping the service ends its jobs.
    """

    listen: Listen = Listen()
    url: str | None = Field(default=None, pattern=r"^https?://[^/]+$")
    tls: Tls | None = None
    state: FilePath
    files: FilePath
    machines: dict[MachineName, MachineBackend] = Field(default={"perlmutter": LocalBackend()}, min_length=1)
    clients: list[Client] = Field(min_length=1)
    projects: list[Project] = []
    status: FilePath | None = None
    ignore_options: list[SbatchOption] = []
    token_s: float = Field(default=600.0, gt=0, le=86400)
    download_bytes: int = Field(default=64 << 20, ge=1024)
    upload_bytes: int = Field(default=256 << 20, ge=1024)
    cancel_jobs_on_exit: bool = False

    @model_validator(mode="after")
    def _checked(self) -> SuperfacilityConfig:
        if self.tls is None and not _is_loopback(self.listen.host):
            raise ValueError(
                f"listen.host: {self.listen.host}: tokens would travel in plain text; set `tls`, or listen at 127.0.0.1"
            )
        ids = [client.id for client in self.clients]
        if len(set(ids)) != len(ids):
            raise ValueError("clients: the same id is there twice")
        state, files = (path.expanduser().resolve() for path in (self.state, self.files))
        if state.is_relative_to(files) or files.is_relative_to(state):
            raise ValueError(f"state ({self.state}) and files ({self.files}) lie inside each other; keep them apart")
        return self

    @property
    def base_url(self) -> str:
        """The service's address as clients write it."""
        host = f"[{self.listen.host}]" if ":" in self.listen.host else self.listen.host
        return self.url or f"{'https' if self.tls else 'http'}://{host}:{self.listen.port}"

    def public_keys(self) -> dict[str, RSAPublicKey]:
        """The clients' keys, by their ids.

        Raises:
            ConfigError: a file cannot be read, or holds no RSA public key.
        """
        keys = {}
        for client in self.clients:
            try:
                key = load_pem_public_key(client.public_key.expanduser().read_bytes())
            except (OSError, ValueError, UnsupportedAlgorithm) as error:
                raise ConfigError(f"clients: {client.id}: {client.public_key}: {error}") from error
            if not isinstance(key, RSAPublicKey):
                raise ConfigError(f"clients: {client.id}: {client.public_key} holds no RSA key")
            keys[client.id] = key
        return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load(path: Path) -> SuperfacilityConfig:
    """Read the configuration file.

    Raises:
        ConfigError: it cannot be read, or a value in it cannot be used.
    """
    return config_file.load(SuperfacilityConfig, path)
