"""The run processor's status over HTTPS, for people, Prometheus and the logbook.

The server runs in a thread of its own and only reads what :class:`.Observation` holds.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import Body, Depends, FastAPI, HTTPException
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from lclstream import __version__
from lclstream.arp.config import StatusConfig
from lclstream.arp.logbook_jobs import KillError
from lclstream.arp.observation import Observation
from lclstream.elog.models import WorkflowJob
from lclstream.security.credentials import Credentials
from lclstream.security.identity import Identity
from lclstream.security.server import Limits, peer_identity, server_for

log = logging.getLogger("lclstream.arp")

_START_S = 10.0


class CannotListenError(OSError):
    """The status address cannot be listened at."""


Killer = Callable[[str, WorkflowJob, str], dict[str, Any]]


def create_app(observation: Observation, killer: Killer | None = None, kill_logins: Sequence[str] = ()) -> FastAPI:
    """``GET /status`` (JSON), ``GET /metrics`` (Prometheus), and the logbook's ``POST /jid/ws/{experiment}/kill_job``.

    Every caller shows a certificate.

    Args:
        observation: what is shown.
        killer: ends the DAG run of a job (experiment, job, who asks); None: jobs cannot be killed here.
        kill_logins: who may ask for that.
    """
    app = FastAPI(title="LCLStream run processor", version=__version__, dependencies=[Depends(peer_identity)])

    @app.get("/status")
    def status() -> dict[str, Any]:
        """Lag, decisions by kind, the last event, and what is waited for."""
        return observation.document()

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """The same numbers for Prometheus."""
        return Response(observation.prometheus(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/jid/ws/{experiment}/kill_job")
    def kill_job(
        experiment: str,
        job: Annotated[WorkflowJob, Body()],
        caller: Annotated[Identity, Depends(peer_identity)],
    ) -> dict[str, Any]:
        """End the DAG run of a logbook's job; the logbook asks for it when somebody kills the job there."""
        if killer is None:
            return {"success": False, "errormsg": "this run processor shows no jobs in the logbook"}
        if caller.login not in kill_logins:
            log.warning("%s may not kill jobs (status.kill_logins: %s)", caller.login, ", ".join(kill_logins))
            raise HTTPException(403, f"{caller.login} may not kill jobs: status.kill_logins does not name this login")
        try:
            return {"success": True, "value": killer(experiment, job, caller.login)}
        except KillError as error:
            return {"success": False, "errormsg": str(error)}

    return app


def _bound(config: StatusConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise CannotListenError(
            f"cannot listen at {config.host}:{config.port}: {error.strerror}: choose another status.port"
        ) from error


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    server.run(sockets=[listener])


@contextmanager
def served(app: FastAPI, config: StatusConfig, credentials: Credentials) -> Iterator[str]:
    """Serve while the block runs; gives the URL.

    Raises:
        CannotListenError: the address is in use, or not ours.
    """
    with _bound(config) as listener:
        port = listener.getsockname()[1]
        server = server_for(app, host=config.host, port=port, credentials=credentials, limits=Limits(rate=config.rate))
        thread = threading.Thread(target=_run, args=(server, listener), name="arp-status", daemon=True)
        thread.start()
        deadline = time.monotonic() + _START_S
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not server.started:
            raise CannotListenError(f"the status server at {config.host}:{port} did not start")
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"https://{host}:{port}"
        log.info("status at %s/status", url)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(10)
