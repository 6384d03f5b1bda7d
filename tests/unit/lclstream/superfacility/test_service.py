"""The stand-in, seen by the published client."""

from __future__ import annotations

import asyncio
import io
import time
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

pytest.importorskip("lclstream.superfacility.client", reason="needs pip install 'lclstream[superfacility]'")

from sfapi_client import AsyncClient
from sfapi_client.compute import Machine
from sfapi_client.exceptions import SfApiError
from sfapi_client.jobs import JobState


def use(service: Any, work: Callable[[Any], Coroutine[Any, Any, Any]], key: Path | None = None) -> Any:
    """Do something with the published client, within a bound."""

    async def run() -> Any:
        client = AsyncClient(
            key=key or service.key, api_base_url=service.api_url, token_url=service.token_url, wait_interval=1
        )
        async with asyncio.timeout(60), client:
            return await work(client)

    return asyncio.run(run())


def script(body: str, *options: str) -> str:
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {option}" for option in options), body, ""])


def test_the_published_client_submits_waits_and_reads_the_output(superfacility: Any) -> None:
    async def work(client: Any) -> Any:
        machine = await client.compute(Machine.perlmutter)
        job = await machine.submit_job(script("echo out of $SLURM_JOB_ID", "-J mine -t 5 -N 1", "--output=said-%j.txt"))
        assert await job.complete() == JobState.COMPLETED
        assert job.jobid.isdigit()
        (found,) = await machine.ls(f"{superfacility.home}/said-{job.jobid}.txt")
        return job.jobid, (await found.download()).read()

    number, said = use(superfacility, work)
    assert said == f"out of {number}\n"


def test_squeue_shows_live_jobs_and_sacct_all(superfacility: Any) -> None:
    name = uuid.uuid4().hex

    async def work(client: Any) -> Any:
        machine = await client.compute("perlmutter")
        job = await machine.submit_job(script("sleep 300", f"--job-name={name}", "--account=m1234"))
        live = [one for one in await machine.jobs(user="ada", command="squeue") if one.name == name]
        await job.cancel(wait=True)
        gone = [one for one in await machine.jobs(user="ada", command="squeue") if one.name == name]
        ended = [one for one in await machine.jobs(user="ada", command="sacct") if one.jobname == name]
        return job.jobid, live, gone, ended

    number, live, gone, ended = use(superfacility, work)
    assert [one.jobid for one in live] == [number]
    assert live[0].state in (JobState.PENDING, JobState.RUNNING)
    assert gone == []
    assert [(one.jobid, one.state) for one in ended] == [(number, JobState.CANCELLED)]


@pytest.mark.parametrize(
    ("body", "options", "state"),
    [("exit 3", [], JobState.FAILED), ("sleep 300", ["--time=0:01"], JobState.TIMEOUT)],
)
def test_a_job_ends_in_the_words_of_slurm(superfacility: Any, body: str, options: list[str], state: Any) -> None:
    async def work(client: Any) -> Any:
        job = await (await client.compute("perlmutter")).submit_job(script(body, *options))
        return await job.complete()

    assert use(superfacility, work) == state


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (script("true", "--nodes=many"), "--nodes=many"),
        (script("true", "--output=%x.out"), "%x is not known"),
        (script("true", "--output=../out"), "leads out of the folder"),
        (script("true", "--chdir=/etc"), "/etc"),
        (script("true", "-N 3"), "one node"),
    ],
)  # fmt: skip
def test_a_script_that_is_no_job_is_refused_with_the_reason(superfacility: Any, text: str, words: str) -> None:
    async def work(client: Any) -> Any:
        with pytest.raises(SfApiError) as refused:
            await (await client.compute("perlmutter")).submit_job(text)
        return refused.value.message

    assert words in use(superfacility, work)


def test_a_script_among_the_users_files_gets_its_arguments(superfacility: Any) -> None:
    async def work(client: Any) -> Any:
        machine = await client.compute("perlmutter")
        (home,) = await machine.ls(str(superfacility.home), directory=True)
        file = io.BytesIO(b'#!/bin/sh\necho "$1|$2"\n')
        file.filename = "job.sh"  # type: ignore[attr-defined]
        path = await home.upload(file)
        job = await machine.submit_job(path, args=["two words", "$HOME"])
        assert await job.complete() == JobState.COMPLETED
        return (superfacility.home / f"slurm-{job.jobid}.out").read_text()

    # The published client sends a script's arguments as one form field each.
    assert use(superfacility, work) == "two words|$HOME\n"


def test_files_are_confined_to_the_users_folder(superfacility: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    superfacility.home.mkdir(parents=True, exist_ok=True)
    (superfacility.home / "link").unlink(missing_ok=True)
    (superfacility.home / "link").symlink_to(secret)

    async def work(client: Any) -> None:
        base = f"{superfacility.api_url}/utilities"
        http = await client._http_client()
        for path in (str(secret), f"{superfacility.home}/link", f"{superfacility.home}/%2e%2e/bob/file"):
            got = (await http.get(f"{base}/download/perlmutter/{path}", params={"binary": True})).json()
            assert got["status"] == "ERROR"
            assert got["file"] is None
            put = await http.put(f"{base}/upload/perlmutter/{path}", files={"file": b"x"})
            if not path.endswith("link"):
                assert put.json()["status"] == "ERROR"
            assert (await http.get(f"{base}/ls/perlmutter/{path}")).json()["status"] in ("ERROR", "OK")

    use(superfacility, work)
    assert secret.read_text() == "secret"


def test_binary_files_come_back_as_they_were_sent(superfacility: Any) -> None:
    data = bytes(range(256)) * 100

    async def work(client: Any) -> Any:
        machine = await client.compute("perlmutter")
        (home,) = await machine.ls(str(superfacility.home), directory=True)
        path = await (home / "data.bin").upload(io.BytesIO(data))
        with pytest.raises(SfApiError):
            await path.download()
        return (await path.download(binary=True)).read()

    assert use(superfacility, work) == data


def test_states_and_outages_are_the_files(superfacility: Any) -> None:
    outage = {
        "start_at": "2026-03-01T08:00:00Z", "end_at": "2026-03-01T18:00:00Z", "description": "Cooling",
        "status": "Planned",
    }  # fmt: skip
    superfacility.say("degraded", notes=["slow"], outages=[outage])

    async def work(client: Any) -> Any:
        resources = client.resources
        states = await resources.status()
        assert (await resources.status("perlmutter")).status.value == "degraded"
        assert (await resources.planned_outages())["perlmutter"][0].description == "Cooling"
        assert [one.notes for one in await resources.notes("perlmutter")] == ["slow"]
        return states["perlmutter"].notes, await resources.outages("perlmutter")

    notes, outages = use(superfacility, work)
    assert notes == ["slow"]
    assert [(one.description, one.status.value) for one in outages] == [("Cooling", "Planned")]


def test_a_machine_that_is_away_takes_no_jobs(superfacility: Any) -> None:
    superfacility.say("unavailable")

    async def work(client: Any) -> int:
        http = await client._http_client()
        form = {"job": script("true"), "isPath": "false"}
        return int((await http.post(f"{superfacility.api_url}/compute/jobs/perlmutter", data=form)).status_code)

    assert use(superfacility, work) == 503


def test_the_account_is_the_tokens(superfacility: Any) -> None:
    async def work(client: Any) -> Any:
        user = await client.user()
        return user.name, [one.name for one in await user.projects()], [one.clientId for one in await user.clients()]

    assert use(superfacility, work) == ("ada", ["m1234"], [superfacility.client_id])


def test_without_a_token_there_is_nothing(superfacility: Any) -> None:
    for path in ("compute/jobs/perlmutter", "tasks", "account", "utilities/ls/perlmutter//", "account/clients"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic YTpi"}):
            assert httpx.get(f"{superfacility.api_url}/{path}", headers=headers, timeout=60).status_code == 401


def assertion(service: Any, **claims: Any) -> str:
    identity, _, key = service.key.read_text().partition("\n")
    now = int(time.time())
    given = {
        "iss": identity, "sub": identity, "aud": service.token_url, "iat": now, "exp": now + 60,
        "jti": uuid.uuid4().hex, **claims,
    }  # fmt: skip
    return jwt.encode({name: value for name, value in given.items() if value is not None}, key, algorithm="RS256")


def ask(service: Any, signed: str) -> httpx.Response:
    form = {
        "grant_type": "client_credentials",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "client_assertion": signed,
    }
    return httpx.post(service.token_url, data=form, timeout=60)


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": "https://elsewhere.example.org/token"},
        {"exp": 1_000_000_000},
        {"exp": int(time.time()) + 100_000},
        {"exp": None},
        {"jti": None},
        {"iss": "somebodyelse1"},
        {"sub": "somebodyelse1"},
    ],
)
def test_an_assertion_with_a_wrong_claim_gives_no_token(superfacility: Any, claims: dict[str, Any]) -> None:
    answer = ask(superfacility, assertion(superfacility, **claims))
    assert answer.status_code == 401
    assert answer.json()["error"] == "invalid_client"


def test_an_assertion_is_good_once(superfacility: Any) -> None:
    signed = assertion(superfacility)
    assert ask(superfacility, signed).status_code == 200
    assert ask(superfacility, signed).status_code == 401


def test_an_assertion_of_another_key_or_none_gives_no_token(superfacility: Any, tmp_path: Path) -> None:
    from lclstream.superfacility.keys import make_client

    _, other, _ = make_client(tmp_path, "other")
    key = other.read_text().partition("\n")[2]
    claims = jwt.decode(assertion(superfacility), options={"verify_signature": False})
    assert ask(superfacility, jwt.encode(claims, key, algorithm="RS256")).status_code == 401
    assert ask(superfacility, jwt.encode(claims, None, algorithm="none")).status_code == 401
    public = (superfacility.key.parent / "airflow.pub").read_bytes()
    assert ask(superfacility, _hs256(claims, public)).status_code == 401


def _hs256(claims: dict[str, Any], key: bytes) -> str:
    """A token signed with the public key as if it were a shared secret, which a careless server would believe."""
    import base64
    import hashlib
    import hmac
    import json

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    head = f"{part(json.dumps({'alg': 'HS256', 'typ': 'JWT'}).encode())}.{part(json.dumps(claims).encode())}"
    return f"{head}.{part(hmac.new(key, head.encode(), hashlib.sha256).digest())}"
