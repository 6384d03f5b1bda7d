"""Tags on jobs: given with the submission, found in lists, kept over a restart of the service."""

from __future__ import annotations

from typing import Any

import pytest

from lclstream.jobs.models import JobSpec
from lclstream.security.http import client as http_client

pytestmark = pytest.mark.integration

JOB = JobSpec(script="true")
TAGS = {"dag_id": "stream_run", "run_id": "mfx:r0007 (später)", "try": "1"}


def test_a_job_is_found_again_by_its_tags(service: Any, sites: Any, until_final: Any) -> None:
    service.start()
    client = service.client()
    tagged = client.submit(JOB, idempotency_key="k", tags=TAGS)
    assert client.submit(JOB, idempotency_key="k", tags={**TAGS, "try": "2"}) == tagged
    made = client.create(JOB, tags={"dag_id": "stream_run"})
    plain = client.submit(JOB)
    assert [job.jobid for job in client.list(tags={"dag_id": "stream_run", "try": "1"})] == [tagged]
    assert client.list(tags={"try": "2"}) == [], "a repeated submission changes nothing"
    until_final(client, tagged)
    assert {job.jobid for job in client.list()} == {tagged, made, plain}
    with pytest.raises(ValueError, match="is not NAME:VALUE"):
        client.submit(JOB, tags={"a name": "x"})
    with http_client(client.url, sites["s3df"].member("alice")) as raw:
        assert raw.get("/v2/jobs", params={"tag": "no colon"}).status_code == 422
    service.kill()
    service.start()
    (job,) = service.client().list(tags={"run_id": TAGS["run_id"]})
    assert (job.jobid, job.tags) == (tagged, TAGS)
