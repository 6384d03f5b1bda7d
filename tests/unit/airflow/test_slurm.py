"""Slurm's words through the job service, and the operator for users of LCLS' job interface, both ways."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred

from lclstream.jobs.client import JobClient
from lclstream_airflow.hooks.jid import JobInterfaceHook
from lclstream_airflow.operators import remote
from lclstream_airflow.operators.jid import JIDSlurmOperator
from lclstream_airflow.operators.slurm import SlurmOperator
from lclstream_airflow.triggers.jid import JobInterfaceTrigger

SECRET = "Bearer s3cr3t-t0ken-of-the-run"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TAKE_OVER_PAUSE_S", 0.05)
    monkeypatch.setattr(remote, "START_PATIENCE_S", 3.0)


@pytest.fixture
def task(context: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """A context of its own for each test: the job service is shared."""
    context["ti"].run_id = request.node.name
    context["ti"].max_tries = 1
    return context


def slurm(script: str = "#!/bin/sh\ntrue\n", **arguments: Any) -> SlurmOperator:
    return SlurmOperator(
        **{"task_id": "reduce", "script": script, "poll_interval": 0.05, "deferrable": False, **arguments}
    )


# --- SlurmOperator


def test_arguments_and_directives_become_a_specification(jobs: JobClient, task: dict[str, Any]) -> None:
    script = "#!/bin/bash\n#SBATCH -N 4 -J theirs -A lcls:old\n#SBATCH --time=2:00:00\nsrun work\n"
    work = slurm(
        script, account="lcls:mfx", partition="milano", nodes="2", ntasks_per_node=4, gpus_per_task=1,
        walltime=datetime.timedelta(minutes=90), sbatch_options="--mem=4G --constraint 'a&b'", exclusive=True,
    )  # fmt: skip
    work.prepare(task)
    assert work.job == {
        "name": "theirs",
        "script": script,
        "backend": "default",
        "resources": {
            "exclusive_node_use": True, "node_count": 2, "processes_per_node": 4, "gpu_cores_per_process": 1,
            "duration": 90,
        },
        "attributes": {
            "--account": "lcls:mfx", "--partition": "milano", "--mem": "4G", "--constraint": "a&b",
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("walltime", "minutes"), [(5, 5), (1.5, 1.5), ("1:00:00", 60), ("2-0", 2880), (datetime.timedelta(seconds=90), 1.5)]
)
def test_every_form_of_a_walltime(jobs: JobClient, task: dict[str, Any], walltime: Any, minutes: float) -> None:
    work = slurm(walltime=walltime)
    work.prepare(task)
    assert isinstance(work.job, dict)
    assert work.job["resources"]["duration"] == minutes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"script": "true"}, "'true' is neither a script"),
        ({"script": "/not/there.sh"}, "/not/there.sh cannot be read"),
        ({"nodes": "many"}, "--nodes=many"),
        ({"walltime": "soon"}, "time 'soon'"),
        ({"sbatch_options": ["milano"]}, "'milano'"),
        ({"script": "#!/bin/sh\n#SBATCH -o out\ntrue"}, "--output and --error"),
        # The backend of these tests is no cluster, and says so.
        ({"partition": "milano"}, "--partition"),
    ],
)
def test_what_is_wrong_fails_with_its_name(
    jobs: JobClient, task: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(AirflowFailException) as failed:
        slurm(**arguments).execute(task)
    assert message in str(failed.value)


def test_a_script_file_runs_through_the_job_service(jobs: JobClient, task: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "job.sh"
    file.write_text("#!/bin/sh\n#SBATCH --time=5\necho '{\"events\": 3}' > result.json\n")
    done = slurm(str(file), result_file="result.json").execute(task)
    assert done["result"] == {"events": 3}


# --- JIDSlurmOperator through the job service


@pytest.fixture
def lute(tmp_path: Path) -> Path:
    """A workflow's folder whose submit script does what such scripts do: it ends with ``sbatch … --wrap``."""
    folder = tmp_path / "lute" / "launch_scripts"
    folder.mkdir(parents=True)
    submit = folder / "submit_slurm.sh"
    submit.write_text(
        "#!/bin/bash\nset -e\nexport PREPARED=yes\n"
        'sbatch --output=x.out --wrap "echo $PREPARED \\$EXPERIMENT \\$RUN_NUM args: $*; echo auth=\\$Authorization; '
        'echo counters=\\$JID_UPDATE_COUNTERS; $LAST"\n'
    )
    submit.chmod(0o755)
    return tmp_path / "lute"


def conf(lute: object = "/lute", **more: Any) -> dict[str, Any]:
    return {
        "experiment": "mfxl1234", "run_id": "7", "user": "ada", "lute_location": str(lute),
        "lute_params": {"config_file": "/conf/mfx.yaml", "debug": True}, "slurm_params": ["--ntasks=1", "--time=5"],
        "ARP_ROOT_JOB_ID": "root", "ARP_LOCATION": "S3DF", "JID_UPDATE_COUNTERS": "https://jid/counters",
        "Authorization": SECRET, **more,
    }  # fmt: skip


def jid(task: dict[str, Any], given: dict[str, Any], **arguments: Any) -> JIDSlurmOperator:
    task["dag_run"] = SimpleNamespace(conf=given)
    return JIDSlurmOperator(**{"task_id": "group.PeakFinder", "poke_interval": 0.05, "deferrable": False, **arguments})


def test_a_managed_task_runs_in_the_allocation_of_the_job_service(
    jobs: JobClient, task: dict[str, Any], lute: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = jid(task, conf(lute)).execute(task)
    assert done["state"] == "completed"
    log = task["ti"].xcoms["log"]
    expected = "yes mfxl1234 7 args: --taskname PeakFinder --config /conf/mfx.yaml --debug --ntasks=1 --time=5\n"
    assert expected in log
    assert "counters=https://jid/counters" in log
    # The token is neither in the job's environment nor in what Airflow keeps.
    assert "auth=\n" in log
    assert SECRET.split()[1] not in json.dumps(task["ti"].xcoms) + capsys.readouterr().out


def test_the_token_reaches_the_job_only_when_asked_to(jobs: JobClient, task: dict[str, Any], lute: Path) -> None:
    jid(task, conf(lute), pass_authorization=True).execute(task)
    # Even then what the job prints of it does not go into XCom.
    assert "auth=Bearer ***" in task["ti"].xcoms["log"]


def test_a_task_whose_log_says_that_it_failed_has_failed(jobs: JobClient, task: dict[str, Any], lute: Path) -> None:
    words = "echo INFO:lute.execution.executor:Task failed with return code: 1"
    with pytest.raises(AirflowException, match="its log says that the task failed"):
        jid(task, conf(lute), environment={"LAST": words}).execute(task)


def test_a_task_whose_job_fails_has_failed(jobs: JobClient, task: dict[str, Any], lute: Path) -> None:
    with pytest.raises(AirflowException, match="is failed: 4"):
        jid(task, conf(lute), environment={"LAST": "exit 4"}).execute(task)


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        (["--ntasks=12"], {"max_cores": 4}, ["--ntasks=4"]),
        (["--ntasks=2"], {"max_cores": 4}, ["--ntasks=2"]),
        (["--account=a"], {"max_cores": 4}, ["--account=a", "--ntasks=1"]),
        (["--nodes=8", "--account=a"], {"max_nodes": 1}, ["--nodes=0-1", "--account=a"]),
        (["--account=a"], {"max_nodes": 1}, ["--account=a", "--nodes=0-1"]),
        (["--partition=x"], {"require_partition": "milano"}, ["--partition=milano"]),
        (["--partition=x"], {}, ["--partition=x"]),
        (["--ntasks-per-node=9", "--ntasks=9"], {"max_cores": 2}, ["--ntasks-per-node=9", "--ntasks=2"]),
    ],
)
def test_a_tasks_own_limits_win_over_the_conf(given: list[str], arguments: dict[str, Any], expected: list[str]) -> None:
    assert JIDSlurmOperator(task_id="x", **arguments)._limited(given) == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lute_params": {}}, "no lute_params"),
        ({"lute_params": {"debug": True}}, "config_file is missing"),
        ({"slurm_params": []}, "no slurm_params"),
        ({"slurm_params": "--ntasks=1"}, "a list of options"),
    ],
)
def test_a_conf_that_lacks_something_is_explained(
    jobs: JobClient, task: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(AirflowFailException, match=message):
        jid(task, conf(**more)).execute(task)


# --- JIDSlurmOperator through the job interface


class Interface:
    """The job interface's REST over documents a test decides about; a real HTTP server."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str | None, Any]] = []
        self.statuses = ["RUNNING", "DONE"]
        self.log = "all well\n"
        self.drop_next_start = False
        self.refuse = ""
        interface = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                path = self.path.removeprefix("/arps3dfjid/jid/ws/")
                interface.calls.append((path, self.headers["authorization"], body))
                if self.headers["authorization"] != SECRET:
                    self.send_error(401)
                    return
                answer = interface.answer(path, body)
                if answer is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: Any) -> Any:
        if self.refuse:
            return {"success": False, "errormsg": self.refuse}
        if path == "job_statuses":
            for one in body:
                job = self.jobs.get(one["tool_id"])
                if job is not None and job["status"] not in ("DONE", "FAILED", "EXITED") and self.statuses:
                    job["status"] = self.statuses.pop(0)
            return {
                "success": True,
                "value": [self.jobs[one["tool_id"]] for one in body if one["tool_id"] in self.jobs],
            }
        if path == "mfxl1234/start_job":
            number = str(1000 + len(self.jobs))
            self.jobs[number] = {**body, "tool_id": number, "status": "SUBMITTED", "token": "leaked"}
            if self.drop_next_start:
                self.drop_next_start = False
                return None
            return {"success": True, "value": self.jobs[number]}
        if path == "mfxl1234/job_log_file":
            return {"success": True, "value": self.log}
        if path == "mfxl1234/kill_job":
            self.jobs[body["tool_id"]]["status"] = "EXITED"
            return {"success": True, "value": self.jobs[body["tool_id"]]}
        return {"success": False, "errormsg": f"no {path}"}

    def started(self) -> int:
        return sum(path.endswith("start_job") for path, _, _ in self.calls)


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interface]:
    """A job interface, with the connection `jid_default` to it."""
    made = Interface()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.05,))
    thread.start()
    connect(monkeypatch, made.url)
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join(20)
    assert not thread.is_alive()


def connect(monkeypatch: pytest.MonkeyPatch, url: str, **extra: Any) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_JID_DEFAULT", json.dumps({"conn_type": "jid", "host": url, "extra": extra}))


def rest(task: dict[str, Any], given: dict[str, Any] | None = None, **arguments: Any) -> JIDSlurmOperator:
    return jid(task, given or conf(), **{"job_conn_id": "jid_default", "user": "mfxopr", **arguments})


def test_the_interface_gets_what_it_always_got(interface: Interface, task: dict[str, Any]) -> None:
    done = rest(task, max_cores=2, require_partition="milano").execute(task)
    assert done["state"] == "DONE"
    assert task["ti"].xcoms["log"] == "all well\n"
    path, authorization, document = interface.calls[0]
    assert (path, authorization) == ("mfxl1234/start_job", SECRET)
    expected = {
        "arp_root_job_id": "root", "experiment": "mfxl1234", "run_num": "7", "user": "ada", "status": "", "tool_id": "",
    }  # fmt: skip
    assert {name: document[name] for name in expected} == expected
    definition = document["def"]
    assert definition["executable"] == "/lute/launch_scripts/submit_slurm.sh"
    assert definition["parameters"] == (
        "--taskname PeakFinder --config /conf/mfx.yaml --debug --ntasks=1 --time=5 --partition=milano"
    )
    assert (definition["name"], definition["trigger"], definition["location"]) == ("PeakFinder", "MANUAL", "S3DF")
    assert definition["run_as_user"] == "mfxopr"
    assert {"_id", "def_id"} <= set(document)


def test_no_token_is_kept_anywhere(
    interface: Interface, task: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    interface.log = f"the task printed {SECRET}\n"
    rest(task).execute(task)
    kept = json.dumps(task["ti"].xcoms) + json.dumps(task["task_state_store"])
    assert SECRET.split()[1] not in kept
    assert "leaked" not in kept


@pytest.mark.parametrize("status", ["FAILED", "EXITED"])
def test_every_end_but_done_fails(interface: Interface, task: dict[str, Any], status: str) -> None:
    interface.statuses = [status]
    interface.log = "beam lost\n"
    with pytest.raises(AirflowException, match=rf"(?s)is {status}; its log ends with:\nbeam lost"):
        rest(task).execute(task)


def test_a_token_file_allows_to_wait_in_the_triggerer(
    interface: Interface, task: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET.split()[1] + "\n")
    file.chmod(0o600)
    connect(monkeypatch, interface.url, token_file=str(file))
    given = conf()
    del given["Authorization"]
    work = rest(task, given, deferrable=True)
    with pytest.raises(TaskDeferred) as deferred:
        work.execute(task)
    path, arguments = deferred.value.trigger.serialize()
    assert path.endswith("JobInterfaceTrigger")
    assert SECRET.split()[1] not in json.dumps(arguments)
    event = asyncio.run(JobInterfaceTrigger(**arguments).wait())
    # Airflow goes on with a new object.
    again = rest(task, given, deferrable=True)
    assert again.resume_execution("execute_complete", {"event": event}, task)["state"] == "DONE"
    assert task["ti"].xcoms["log"] == "all well\n"
    file.chmod(0o644)
    good, words = JobInterfaceHook().test_connection()
    assert not good
    assert "chmod 600" in words


def test_without_a_token_file_the_wait_stays_in_the_worker(interface: Interface, task: dict[str, Any]) -> None:
    assert rest(task, deferrable=True).execute(task)["state"] == "DONE"


def test_a_task_that_runs_again_finds_its_job(interface: Interface, task: dict[str, Any]) -> None:
    interface.statuses = []
    first = rest(task)
    first.prepare(task)
    first._start_or_find(task)
    interface.statuses = ["RUNNING", "RUNNING", "DONE"]
    assert rest(task).execute(task)["job_id"] == "1000"
    assert interface.started() == 1


def test_a_kill_kills_the_job(interface: Interface, task: dict[str, Any]) -> None:
    interface.statuses = []
    work = rest(task)
    work.prepare(task)
    work._start_or_find(task)
    work.on_kill()
    assert interface.jobs["1000"]["status"] == "EXITED"


def test_a_start_without_an_answer_is_not_repeated(interface: Interface, task: dict[str, Any]) -> None:
    interface.drop_next_start = True
    with pytest.raises(AirflowFailException, match="whether the job was started is not known"):
        rest(task).execute(task)
    assert interface.started() == 1


def test_what_the_interface_refuses_is_told(interface: Interface, task: dict[str, Any]) -> None:
    interface.refuse = "no such account"
    with pytest.raises(AirflowFailException, match="no such account"):
        rest(task).execute(task)


def test_a_refused_token_is_told_without_it(interface: Interface, task: dict[str, Any]) -> None:
    with pytest.raises(AirflowException, match="refused our token") as refused:
        rest(task, conf(Authorization="Bearer wr0ng-t0ken")).execute(task)
    assert "wr0ng" not in str(refused.value)


def test_without_any_token_nothing_is_sent(interface: Interface, task: dict[str, Any]) -> None:
    with pytest.raises(AirflowFailException, match="names no token_file"):
        rest(task, conf(Authorization=None)).execute(task)
    assert interface.calls == []


def test_the_test_button_of_the_interface(
    interface: Interface, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET)
    os.chmod(file, 0o600)
    connect(monkeypatch, interface.url, token_file=str(file))
    assert JobInterfaceHook().test_connection() == (
        True, f"The job interface at {interface.url}/arps3dfjid/jid/ws answers.",
    )  # fmt: skip
    for extra, message in (
        ({"token_file": "relative"}, "token_file (extra)"),
        ({"token_file": str(tmp_path / "none")}, "No such file"),
        ({"prefix": "x"}, "prefix (extra)"),
    ):
        connect(monkeypatch, interface.url, **extra)
        good, words = JobInterfaceHook().test_connection()
        assert not good
        assert message in words
    connect(monkeypatch, "http://jid.example.org")
    assert "plain text" in JobInterfaceHook().test_connection()[1]


def test_another_type_of_connection_is_refused(task: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps({"conn_type": "http", "host": "x"}))
    with pytest.raises(AirflowFailException, match="'psik' or 'jid'"):
        jid(task, conf(), job_conn_id="other").execute(task)


def test_a_deadline_holds(interface: Interface, task: dict[str, Any]) -> None:
    interface.statuses = []
    began = time.monotonic()
    with pytest.raises(AirflowException, match="took longer than it was given"):
        rest(task, wait_timeout_s=0.3).execute(task)
    assert time.monotonic() - began < 60
    assert interface.jobs["1000"]["status"] == "EXITED"
