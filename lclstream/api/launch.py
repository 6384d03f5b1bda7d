"""What a transfer runs: the engine's configuration and the specifications of the two kinds of job. No I/O here."""

from __future__ import annotations

import json
import logging
import re
import shlex
import threading
import warnings
from pathlib import Path
from typing import Any

from lclstream.api.callbacks import new_secret
from lclstream.api.config import ApiConfig, BufferConfig
from lclstream.api.store import Role
from lclstream.api.tables import TransferRow
from lclstream.config_file import ConfigError
from lclstream.jobs.models import JobSpec, ResourceSpec
from lclstreamer.config import ConfigurationError, ConfigurationWarning, Parameters, from_mapping

log = logging.getLogger(__name__)

#: The engine's configuration in the engine job's work folder.
CONFIG_FILE = "lclstreamer.json"
#: The buffer's last status document in the buffer job's work folder.
SUMMARY_FILE = "buffer.json"
#: Who may push and pull, in the buffer job's work folder: issuers' names are long, and `ps` is for everybody.
ACCESS_FILE = "access.json"

# Python 3.11's warnings.catch_warnings() changes the whole process; two requests must not do it at the same time.
_warnings = threading.Lock()
_PLACE = re.compile(r"(?P<place>[\w\-\[\]]+(\.[\w\-\[\]]+)*): (?P<problem>.+)", re.DOTALL)


class RequestRefusedError(ValueError):
    """A configuration or a number of ranks that cannot be run.

    Attributes:
        problems: for each mistake the path of the field, and what is wrong with it.
    """

    def __init__(self, problems: list[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("; ".join(f"{'.'.join(place)}: {problem}" for place, problem in problems))
        self.problems = problems


def with_buffers(config: dict[str, Any], inputs: list[str], service: ApiConfig) -> dict[str, Any]:
    """The engine's configuration with the buffers as its only data handler: nobody writes files on our nodes."""
    handler: dict[str, Any] = {
        "type": "BinaryDataStreamingDataHandler",
        "urls": inputs,
        "role": "client",
        "library": service.engine.library,
        "socket_type": "push",
        "send_timeout_s": service.engine.patience_s,
        "drain_timeout_s": service.engine.patience_s,
    }
    if service.ports.scheme == "tls+tcp":
        handler["tls"] = engine_certificates(service)
    return {**config, "data_handlers": [handler]}


def checked(config: dict[str, Any], service: ApiConfig) -> tuple[Parameters, list[str]]:
    """Validate what a user sent with the engine's own models; its data handlers do not matter.

    Returns:
        The configuration, and notes about what is not taken as it is written.

    Raises:
        RequestRefusedError: with the path of each wrong field.
    """
    with _warnings, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConfigurationWarning)
        try:
            parameters = from_mapping(
                with_buffers(config, [f"{service.ports.scheme}://127.0.0.1:1"], service), origin="body"
            )
        except ConfigurationError as error:
            raise RequestRefusedError([_problem(line) for line in str(error).splitlines()]) from error
        except Exception as error:
            # A document so strange that the models stumble over it is the sender's mistake, not this service's failure.
            log.warning("a configuration was refused because checking it failed", exc_info=True)
            problem = f"the engine's models cannot read it ({type(error).__name__}: {error})"
            raise RequestRefusedError([(("body",), problem)]) from error
    return parameters, [str(one.message) for one in caught if issubclass(one.category, ConfigurationWarning)]


def _problem(line: str) -> tuple[tuple[str, ...], str]:
    text = line.removeprefix("body: ")
    match = _PLACE.fullmatch(text)
    if match is None:
        return ("body",), text
    return ("body", *match["place"].replace("[", ".").replace("]", "").split(".")), match["problem"]


def sending_ranks(parameters: Parameters, ranks: int) -> int:
    """How many of the engine's ranks send: the buffer waits for that many before it believes in the end of the stream.

    Raises:
        RequestRefusedError: psana's own division needs three ranks, of which two only organise.
    """
    source = parameters.event_source
    if getattr(source, "division", None) != "psana":
        return ranks
    if ranks < 3:
        problem = f"`division: psana` needs at least 3 ranks, not {ranks}: ask for `?ranks=3`, or use `division: index`"
        raise RequestRefusedError([(("query", "ranks"), problem)])
    return ranks - 2


def buffer_name(transfer: int, position: int) -> str:
    """The name a transfer's buffer says in its status, by which it is told from a stranger on the same port."""
    return f"transfer-{transfer}-{position}"


def buffer_job(transfer: TransferRow, position: int, service: ApiConfig) -> JobSpec:
    """The specification of a transfer's buffer job."""
    buffer = service.buffer
    endpoint = transfer.endpoints[position]
    folder = _buffer_folder(service)
    values = {
        "name": buffer_name(transfer.id, position),
        "input": endpoint["input"],
        "output": endpoint["output"],
        "status": endpoint["status"],
        "capacity": buffer.capacity,
        "producers": transfer.producers,
        "grace_s": f"{buffer.grace_s:g}",
        "drain_s": f"{buffer.drain_s:g}",
        "sentinel": transfer.sentinel,
        "certificate": folder / "id.crt",
        "key": folder / "id.key",
        "ca": issuer_of_status_readers(buffer, folder),
        "summary": SUMMARY_FILE,
    }
    kept = spill_folder(transfer, position, service)
    spill = "" if kept is None else f"--spill {shlex.quote(str(kept))}"
    access = f"--config {ACCESS_FILE}" if buffer_files(transfer) else ""
    return JobSpec(
        name=f"{buffer_name(transfer.id, position)}-buffer",
        script=_filled(buffer.script, values, spill=spill, access=access),
        environment=buffer.environment,
        resources=ResourceSpec(duration=buffer.duration_min, node_count=1, processes_per_node=1),
        backend=buffer.backend,
        attributes=buffer.attributes,
        **_callback(Role.buffer, service),
    )


def buffer_files(transfer: TransferRow) -> dict[str, bytes]:
    """Files in the work folder of a transfer's buffer jobs, by name."""
    lists = {side: persons for side, persons in (transfer.access or {}).items() if persons is not None}
    return {ACCESS_FILE: json.dumps({"tls": lists}, indent=1).encode()} if lists else {}


def engine_job(transfer: TransferRow, service: ApiConfig) -> JobSpec:
    """The specification of a transfer's engine job."""
    engine = service.engine
    return JobSpec(
        name=f"transfer-{transfer.id}-engine",
        script=_filled(engine.script, {"ranks": transfer.ranks, "config": CONFIG_FILE}),
        environment=engine.environment,
        resources=ResourceSpec(
            duration=engine.duration_min,
            node_count=engine.nodes,
            process_count=transfer.ranks,
            cpu_cores_per_process=engine.cpu_cores_per_rank,
        ),
        backend=engine.backend,
        attributes=engine.attributes,
        **_callback(Role.engine, service),
    )


def issuer_of_status_readers(buffer: BufferConfig, folder: Path) -> Path:
    """The certificate that signed the certificates with which a buffer's status may be read.

    Raises:
        ConfigError: the folder trusts several issuers and the configuration names none.
    """
    return _issuer(
        buffer.issuer,
        folder / "known_clients",
        "name the one that signed the service's own certificate with `buffer: {issuer: PATH}`",
    )


def engine_certificates(service: ApiConfig) -> dict[str, str]:
    """Paths of the files with which the engine speaks to encrypted buffers, as its configuration has them.

    Raises:
        ConfigError: the folder trusts several issuers and the configuration names none.
    """
    folder = engine_folder(service)
    issuer = _issuer(
        service.engine.issuer,
        folder / "known_servers",
        "name the one that signed the buffer's certificate with `engine: {issuer: PATH}`",
    )
    return {"certificate": str(folder / "id.crt"), "key": str(folder / "id.key"), "ca": str(issuer)}


def engine_folder(service: ApiConfig) -> Path:
    """The engine's certificate folder, on the machine it runs on."""
    if service.engine.credentials is not None:
        return service.engine.credentials.expanduser().absolute()
    return _buffer_folder(service)


def _buffer_folder(service: ApiConfig) -> Path:
    return (service.buffer.credentials or service.credentials).expanduser().absolute()


def _issuer(named: Path | None, folder: Path, remedy: str) -> Path:
    if named is not None:
        return named.expanduser().absolute()
    issuers = sorted(folder.glob("*.crt"))
    organisation = folder / "org.crt"
    if organisation in issuers:
        return organisation
    if len(issuers) != 1:
        raise ConfigError(f"{folder} holds {len(issuers)} issuers (*.crt), and none is called org.crt: {remedy}")
    return issuers[0]


def spill_folder(transfer: TransferRow, position: int, service: ApiConfig) -> Path | None:
    """Where a transfer's buffer keeps what nobody pulls; None when it does not."""
    if not transfer.spill or service.buffer.spill is None:
        return None
    # A new database counts from 1 again, and a buffer gives out whatever it finds in its folder: never another owner's.
    name = f"{buffer_name(transfer.id, position)}-{round(1000 * transfer.created)}"
    return service.buffer.spill.expanduser().absolute() / name


def _filled(template: str, values: dict[str, object], **options: str) -> str:
    return template.format(**{name: shlex.quote(str(value)) for name, value in values.items()}, **options)


def _callback(role: Role, service: ApiConfig) -> dict[str, Any]:
    name = "forwarder" if role is Role.buffer else "producer"
    return {"callback": f"{service.callback_base}/{name}", "cb_secret": new_secret()}
