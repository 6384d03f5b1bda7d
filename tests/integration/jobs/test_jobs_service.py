"""The job service keeps Psi-k's contract: states, files, logs, ownership, refusals."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobSpec, JobState, ResourceSpec
from lclstream.security.authority import SiteAuthority
from lclstream.security.errors import AuthenticationError, ServiceError
from lclstream.security.http import client as http_client

pytestmark = pytest.mark.integration

COMPLETE = ["new", "queued", "active", "completed"]


def states(history: list[Any]) -> list[str]:
    return [line.state.value for line in history]


def refused(call: Callable[[], object]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        call()
    return caught.value


def test_a_script_sees_what_psik_promises_and_runs_in_its_folder(
    running: Any, client: JobClient, until_final: Any
) -> None:
    jobid = client.submit(
        JobSpec(
            name="one",
            script='echo "$base|$jobndx|$jobid|$nodes|$mpirun|$COLOUR|$PWD"; echo oops >&2; echo r > result',
            environment={"COLOUR": "blue"},
            resources=ResourceSpec(process_count=2),
        )
    )
    history = until_final(client, jobid)
    assert states(history) == COMPLETE
    assert history[-1].info == "0"
    base = running.prefix / jobid
    logs = client.logs(jobid)
    assert logs["stdout.1"].strip() == f"{base}|1|{history[1].info}|1|mpiexec -n 2|blue|{base}/work"
    assert logs["stderr.1"] == "oops\n"
    assert client.download(jobid, "result") == b"r\n"
    assert client.files(jobid)["result"].size == 2
    assert client.scripts(jobid)["job"].startswith('echo "$base|')
    summary = client.list()[0]
    assert (summary.jobid, summary.name, summary.state) == (jobid, "one", JobState.completed)


def test_forty_jobs_at_once_all_have_complete_ordered_histories(
    running: Any, client: JobClient, until_final: Any
) -> None:
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda n: client.submit(JobSpec(script=f"exit {n % 2}")), range(40)))
    assert len(set(jobs)) == 40
    for number, jobid in enumerate(jobs):
        history = until_final(client, jobid)
        assert states(history) == ["new", "queued", "active", "failed" if number % 2 else "completed"]
        assert [line.time for line in history] == sorted(line.time for line in history)
        assert history[-1].info == str(number % 2)
        # The history on disk is the same.
        kept = (running.prefix / jobid / "status.csv").read_text().splitlines()
        assert [row.split(",")[2] for row in kept] == states(history)
    assert len(client.list()) == 40
    assert len(client.list(state=JobState.failed)) == 20
    assert [job.jobid for job in client.list(index=5, limit=3)] == sorted(jobs, reverse=True)[5:8]
    assert client.list(backend="other") == []


def test_files_uploaded_before_the_start_are_there(running: Any, client: JobClient, until_final: Any) -> None:
    jobid = client.create(JobSpec(script="cat input.txt deep/er.bin"))
    assert client.state(jobid) is JobState.new
    client.upload(jobid, "input.txt", b"from outside\n")
    client.upload(jobid, "deep/er.bin", b"\xff\x00")
    client.start(jobid)
    client.start(jobid)
    assert states(until_final(client, jobid)) == COMPLETE
    assert client.log_part(jobid, "stdout.1").data == b"from outside\n\xff\x00"
    assert client.download(jobid, "deep/er.bin") == b"\xff\x00"
    client.start(jobid)
    assert states(client.history(jobid)) == COMPLETE


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "way/evil.txt"])
def test_an_upload_outside_the_jobs_folder_is_refused(running: Any, client: JobClient, name: str) -> None:
    jobid = client.create(JobSpec(script="true"))
    (running.prefix / jobid / "work" / "way").symlink_to(running.folder)
    assert refused(lambda: client.upload(jobid, name, b"evil")).status == 403
    assert not list(running.folder.rglob("evil.txt"))


def test_a_download_does_not_follow_links_or_dots(running: Any, client: JobClient, until_final: Any) -> None:
    jobid = client.submit(
        JobSpec(script="ln -s ../spec.json spec; ln -s .. up; ln -s ../spec.json $base/log/spec; mkfifo p")
    )
    until_final(client, jobid)
    for path in ("spec", "up/spec.json", "../spec.json", "%2e%2e/spec.json", "..%2fspec.json"):
        assert refused(lambda path=path: client.download(jobid, path)).status in (403, 404)  # type: ignore[misc]
    assert refused(lambda: client.log_part(jobid, "spec")).status == 403
    assert refused(lambda: client.download(jobid, "p")).status in (404, 422)
    assert "spec" not in client.logs(jobid)
    assert client.files(jobid).keys() == set()


def test_logs_are_read_by_byte_range_while_they_grow(
    running: Any, client: JobClient, until_final: Any, wait_until: Callable[..., None]
) -> None:
    jobid = client.submit(JobSpec(script="printf abc; while [ ! -e go ]; do sleep 0.02; done; printf defghi"))
    wait_until(lambda: client.logs(jobid).get("stdout.1") == "abc", 60, "first words")
    part = client.log_part(jobid, "stdout.1")
    client.upload(jobid, "go", b"")
    until_final(client, jobid)
    rest = client.log_part(jobid, "stdout.1", offset=part.end)
    assert (part.data, rest.data, rest.end) == (b"abc", b"defghi", 9)
    assert client.logs(jobid, "stdout.1", offset=2, limit=3) == {"stdout.1": "cde"}
    assert client.logs(jobid, "stdout.1", offset=-2) == {"stdout.1": "hi"}
    assert client.log_part(jobid, "stdout.1", offset=100).data == b""
    assert refused(lambda: client.logs(jobid, "nothing")).status == 404


def test_cancel_ends_a_running_job_and_all_its_processes(
    running: Any, client: JobClient, until_final: Any, until_state: Any, wait_until: Callable[..., None]
) -> None:
    jobid = client.submit(JobSpec(script="setsid sleep 300 & sleep 300"))
    until_state(client, jobid, JobState.active)
    client.cancel(jobid)
    history = until_final(client, jobid)
    assert states(history) == ["new", "queued", "active", "canceled"]
    wait_until(lambda: running.processes() == [], 60, "end of all processes")
    client.cancel(jobid)
    assert client.history(jobid) == history


def test_cancel_kills_a_job_that_ignores_sigterm(
    client: JobClient, until_final: Any, wait_until: Callable[..., None]
) -> None:
    jobid = client.submit(JobSpec(script="trap '' TERM; echo on; while :; do sleep 0.1; done"))
    wait_until(lambda: client.logs(jobid).get("stdout.1") == "on\n", 60, "first words")
    client.cancel(jobid)
    # Long before its duration, ten minutes, is over.
    assert states(until_final(client, jobid))[-1] == "canceled"


def test_cancel_of_a_job_that_was_never_started(running: Any, client: JobClient, until_final: Any) -> None:
    jobid = client.create(JobSpec(script="true"))
    client.cancel(jobid)
    assert states(until_final(client, jobid)) == ["new", "canceled"]
    assert refused(lambda: client.start(jobid)).status == 409


def test_cancel_has_no_effect_on_a_finished_job(running: Any, client: JobClient, until_final: Any) -> None:
    jobid = client.submit(JobSpec(script="exit 3"))
    history = until_final(client, jobid)
    client.cancel(jobid)
    assert client.history(jobid) == history
    assert history[-1].info == "3"


def test_a_job_ends_with_its_duration(running: Any, client: JobClient, until_final: Any) -> None:
    jobid = client.submit(JobSpec(script="sleep 300", resources=ResourceSpec(duration=0.01)))
    history = until_final(client, jobid)
    assert history[-1].state is JobState.failed
    assert history[-1].info == "duration of 0.01 min exceeded"


def test_the_same_request_again_gives_the_same_job(service: Any, until_final: Any) -> None:
    service.start()
    client = service.client()
    spec = JobSpec(script="echo x >> $base/count")
    with ThreadPoolExecutor(8) as pool:
        jobs = set(pool.map(lambda _: client.submit(spec, idempotency_key="dag/run/task"), range(16)))
    assert len(jobs) == 1
    (jobid,) = jobs
    until_final(client, jobid)
    service.kill()
    service.start()
    assert service.client().submit(spec, idempotency_key="dag/run/task") == jobid
    assert (service.prefix / jobid / "count").read_text() == "x\n"
    assert refused(lambda: client.submit(JobSpec(script="other"), idempotency_key="dag/run/task")).status == 409
    # A key is its owner's: somebody else's job under the same key is another one.
    assert service.client("bob").submit(spec, idempotency_key="dag/run/task") != jobid


def test_another_users_job_is_not_there(running: Any, client: JobClient) -> None:
    alice, bob, ops = client, running.client("bob"), running.client("ops")
    jobid = alice.create(JobSpec(script="true"))
    for call in (
        lambda: bob.state(jobid),
        lambda: bob.history(jobid),
        lambda: bob.cancel(jobid),
        lambda: bob.start(jobid),
        lambda: bob.logs(jobid),
        lambda: bob.log_part(jobid, "console"),
        lambda: bob.files(jobid),
        lambda: bob.download(jobid, "x"),
        lambda: bob.upload(jobid, "x", b""),
        lambda: bob.scripts(jobid),
    ):
        assert refused(call).status == 404
    assert bob.list() == []
    assert ops.state(jobid) is JobState.new
    assert alice.state(jobid) is JobState.new
    assert bob.list(others=True) == []


def test_an_introduced_stranger_is_not_the_local_user_of_the_same_login(
    running: Any, sites: dict[str, SiteAuthority]
) -> None:
    jobid = running.client("emmy").create(JobSpec(script="true"))
    stranger = sites["olcf"].member("emmy")
    sites["s3df"].introduce(stranger, service="s3df", url=running.url)
    with JobClient(running.url, stranger) as client:
        assert refused(lambda: client.history(jobid)).status == 404
        assert refused(lambda: client.cancel(jobid)).status == 404
        assert client.list() == []
    assert [job.jobid for job in running.client("emmy").list()] == [jobid]


def test_an_operator_sees_and_ends_jobs_but_does_not_read_or_change_them(
    running: Any, client: JobClient, until_final: Any
) -> None:
    ops = running.client("ops")
    jobid = client.create(JobSpec(script="true"))
    assert jobid in [job.jobid for job in ops.list(others=True)]
    assert jobid not in [job.jobid for job in ops.list()]
    assert ops.logs(jobid) == {}
    for call in (lambda: ops.files(jobid), lambda: ops.scripts(jobid), lambda: ops.upload(jobid, "x", b"")):
        error = refused(call)
        assert error.status == 403
        assert "one must be its owner" in error.detail
    ops.cancel(jobid)
    assert states(until_final(client, jobid)) == ["new", "canceled"]


def test_a_certificate_of_an_unknown_site_is_refused(running: Any, sites: dict[str, SiteAuthority]) -> None:
    stranger = sites["olcf"].member("stranger")
    known = stranger.folder / "known_servers" / "s3df.crt"
    known.write_bytes(sites["s3df"].certificate_pem)
    try:
        with JobClient(running.url, stranger) as client, pytest.raises(AuthenticationError):
            client.backends()
    finally:
        known.unlink()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=sites["s3df"].certificate_pem.decode())
    # In TLS 1.3 a client without a certificate learns only when it reads that nobody talks to it.
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", running.port), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted,
        contextlib.suppress(OSError),
    ):
        encrypted.sendall(b"GET /v2/backends HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = encrypted.recv(100)
    assert answer == b""


def test_what_is_not_allowed_is_refused_in_words(running: Any, client: JobClient) -> None:
    allowed = Path(running.settings["directories"][0])
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"backend": "torque"}, 404, "default"),
        ({"attributes": {"--uid": "0"}}, 403, "--uid"),
        ({"directory": "/etc"}, 403, "/etc"),
        ({"directory": str(allowed / ".." / "jobs")}, 403, "directories"),
        ({"directory": str(allowed / "nothing")}, 422, "nothing"),
        ({"callback": "https://evil.example.org/"}, 403, "callbacks.allow"),
        ({"resources": {"duration": 61}}, 422, "61"),
        ({"resources": {"node_count": 2}}, 422, "one node"),
    ]
    for change, status, words in cases:
        error = refused(lambda change=change: client.submit({"script": "true", **change}))  # type: ignore[misc]
        assert error.status == status, change
        assert words in error.detail
    assert client.list() == []


def test_a_job_may_run_in_an_allowed_folder(running: Any, client: JobClient, until_final: Any) -> None:
    scratch = Path(running.settings["directories"][0]) / "alice"
    scratch.mkdir()
    jobid = client.submit(JobSpec(script="pwd; echo 1 > made", directory=str(scratch)))
    assert states(until_final(client, jobid)) == COMPLETE
    assert client.logs(jobid)["stdout.1"].strip() == str(scratch)
    assert client.download(jobid, "made") == b"1\n"


def test_wrong_requests_are_answered_in_words_and_without_secrets(running: Any) -> None:
    client = running.client("carol")
    jobid = client.create(JobSpec(script="true"))
    json_header = {"content-type": "application/json"}
    with http_client(running.url, running.credentials("carol")) as raw:
        assert raw.get("/v2/jobs/nonsense").status_code == 400
        assert raw.get("/v2/jobs/1.5").status_code == 404
        assert raw.get("/v2/jobs?state=asleep").status_code == 422
        assert raw.post("/v2/jobs", content=b"{", headers=json_header).status_code == 400
        wrong = raw.post("/v2/jobs", json={"script": "true", "cb_secret": "hush-hush", "resources": "x"})
        assert wrong.status_code == 422
        assert "hush-hush" not in wrong.text
        assert "resources" in wrong.text
        surrogate = raw.post("/v2/jobs", content=b'{"script": "\\ud800", "\\ud800": 1}', headers=json_header)
        assert surrogate.status_code == 422
        assert raw.post("/v2/jobs", json={"script": "x" * 30000}).status_code == 413
        pieces = (b'{"script": "' + b"x" * 1000 for _ in range(40))
        assert raw.post("/v2/jobs", content=pieces, headers=json_header).status_code == 413
        assert raw.post("/v2/jobs", json={"script": "true"}, headers={"idempotency-key": ""}).status_code == 422
        # Published clients may write a slash at the end.
        assert raw.get("/v2/jobs/").status_code == 200
        assert raw.get("/v2/backends/default").json()["status"] == "active"
        assert raw.get("/v2/backends?name=default").json().keys() == {"default"}
        assert raw.get("/v2/backends/other").status_code == 404
        unsigned = raw.post("/v2/jobs/callback", json={"jobid": jobid, "jobndx": 1, "state": "completed"})
        assert unsigned.status_code == 403
        assert raw.post(f"/v2/jobs/{jobid}/files", files={"files": ("a", b"x" * 60000)}).status_code == 413
    assert client.state(jobid) is JobState.new
    assert len(client.list()) == 1


def test_a_secret_is_never_answered_or_logged(running: Any, until_final: Any) -> None:
    client = running.client("dave")
    jobid = client.submit(
        {
            "script": "true",
            "callback": "https://127.0.0.1:1/",
            "cb_secret": "hush-hush",
            "cb_headers": {"x-token": "psst-psst"},
        }
    )
    until_final(client, jobid)
    with http_client(running.url, running.credentials("dave")) as raw:
        paths = ["", f"/{jobid}", f"/{jobid}/logs", f"/{jobid}/scripts", f"/{jobid}/files", f"/{jobid}/state"]
        answers = [raw.get(f"/v2/jobs{path}") for path in paths]
    assert all(answer.status_code == 200 for answer in answers)
    text = running.child.output() + "".join(answer.text for answer in answers)
    assert "hush-hush" not in text
    assert "psst-psst" not in text


def test_a_port_in_use_ends_with_3_and_says_so(running: Any, start: Callable[..., Any]) -> None:
    second = start("lclstream", "jobs", "--config", running.folder / "jobs.yaml", "--prefix", running.folder / "other")
    assert second.wait(60) == 3
    assert f"127.0.0.1:{running.port}" in second.output()


def test_a_prefix_in_use_ends_with_3_and_says_so(
    running: Any, start: Callable[..., Any], free_port: Callable[..., int]
) -> None:
    second = start("lclstream", "jobs", "--config", running.folder / "jobs.yaml", "--port", free_port())
    assert second.wait(60) == 3
    assert "another job service" in second.output()


def test_wrong_configurations_end_with_2(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("prefix: /p\ncredentials: /nowhere\ncolour: blue\n")
    wrong = start("lclstream", "jobs", "--config", tmp_path / "wrong.yaml")
    missing = start("lclstream", "jobs", "--credentials", tmp_path / "nowhere", "--prefix", tmp_path / "p")
    assert wrong.wait(60) == 2
    assert "colour: no such key" in wrong.output()
    assert missing.wait(60) == 2
    assert "certified init" in missing.output()


def test_the_example_of_the_documentation_runs(running: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "jobs.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    code = code.replace("https://127.0.0.1:8447", running.url)
    code = code.replace("~/.config/lclstream/alice", str(running.credentials("alice").folder))
    exec(compile(code, "docs/jobs.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "['new', 'queued', 'active', 'completed']" in printed
    assert "hello" in printed
    assert "sum.txt" in printed


def test_the_service_offers_its_own_description(running: Any) -> None:
    with http_client(running.url, running.credentials("alice")) as raw:
        document = raw.get("/v2/openapi.json").json()
    assert "/v2/jobs/{jobid}/files/{name}" in document["paths"]
