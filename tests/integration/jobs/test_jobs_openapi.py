"""Whatever a client sends, the service answers with what its own description says, and never with its own failure."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lclstream.jobs.models import JobSpec
from lclstream.security.http import client as http_client

pytestmark = pytest.mark.integration


@pytest.mark.timeout(240)
def test_no_request_makes_the_service_fail(service: Any, until_final: Any) -> None:
    service.start()
    client = service.client()
    jobid = client.submit(JobSpec(script="echo 1 > file"))
    until_final(client, jobid)
    member = service.credentials("alice")
    with http_client(service.url, member) as raw:
        schema = schemathesis.openapi.from_dict(raw.get("/v2/openapi.json").json())
    tls = {
        "cert": (str(member.certificate), str(member.key)),
        "verify": str(member.folder / "known_servers" / "org.crt"),
    }
    for offered in schema.get_all_operations():
        operation = offered.ok()
        strategy = operation.as_strategy()

        @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=strategy, existing=st.booleans(), chosen=st.sampled_from(["file", "stdout.1", "job", "default"]))
        def send(case: Any, existing: bool, chosen: str) -> None:
            if existing and "jobid" in case.path_parameters:
                case.path_parameters["jobid"] = jobid
                if "name" in case.path_parameters:
                    case.path_parameters["name"] = chosen
            if case.path == "/v2/jobs" and case.method == "POST":
                # Scripts made up by chance are not to be run.
                case.query = {"submit": "false"}
            response = case.call(base_url=service.url, timeout=60, **tls)
            assert response.status_code < 500, f"{case.as_curl_command()} answered {response.status_code}"

        send()
    assert client.state(jobid).is_final
    assert "Traceback" not in service.child.output()
