from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka import Producer

from lclstream.kafka import EmbeddedKafka

pytestmark = pytest.mark.integration

STREAM = "mfx1__r{:04d}__start_of_run__stream"
REDUCE = "mfx1__r{:04d}__end_of_run__reduce"


def test_a_run_that_starts_and_ends_makes_one_dag_run_each_and_commits_after_the_answer(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    child = start_arp()
    end = {"end_time": datetime.now(UTC).isoformat()}
    topics.send(
        "runs",
        run_message(7, params={"x": float("nan"), "A\uff0eB": float("inf")}, unknown_field=1),
        run_message(7, "Update", params={"gas": 1}),
        run_message(7, "Update", **end, duration=60.0, file_catalog=[]),
        run_message(7, "Update", **end, params={"events": 200}),
        run_message(6, "Update", end_time="2026-03-01T12:01:00+00:00", params={"reprocessed": True}),
    )
    wait_until(lambda: topics.committed("arp") == 5, 60, "commit of all five messages")
    assert airflow.ids() == [STREAM.format(7), REDUCE.format(7)]
    assert [status for *_, status in airflow.attempts] == [200, 200]
    conf = airflow.conf(STREAM.format(7))
    assert {key: conf[key] for key in ("experiment", "run", "trigger", "definition", "location", "job_id")} == {
        "experiment": "mfx1",
        "run": 7,
        "trigger": "START_OF_RUN",
        "definition": "stream",
        "location": "s3df",
        "job_id": None,
    }
    assert conf["run_document"]["params"] == {"x": "NaN", "A\uff0eB": "Infinity"}
    assert conf["run_document"]["unknown_field"] == 1
    for text in ("made " + STREAM.format(7), "no trigger of 2 workflow(s) fits", REDUCE.format(7) + " was there"):
        assert text in child.output()
    child.signal(signal.SIGTERM)
    assert child.wait(60) == 0


def test_messages_that_cannot_be_used_go_to_the_dead_letter_topic_with_the_reason(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    airflow.dags = {"reduce_run"}
    start_arp()
    no_number = run_message(1)
    del no_number["value"]["num"]
    topics.send("runs", b"{not json", b"\xff\xfe", no_number, run_message(1), run_message(2, "Update"))
    letters = topics.read("arp-dead-letter", 4)
    wait_until(lambda: topics.committed("arp") == 5, 60, "commit of all messages")
    assert [(letter["topic"], letter["offset"]) for letter in letters] == [("runs", number) for number in range(4)]
    assert "not JSON" in letters[0]["reason"]
    assert letters[0]["value"] == "{not json"
    assert letters[1]["value_base64"] == "//4="
    assert "num: Field required" in letters[2]["reason"]
    assert "404: fake answer 404 for stream_run" in letters[3]["reason"]


def test_while_airflow_fails_the_event_waits_and_the_group_keeps_its_partitions(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any, status_of: Any
) -> None:
    airflow.stop()
    child = start_arp(status={"port": 0}, kafka={"session_timeout_s": 6})
    topics.send("runs", run_message(1))
    child.wait_for_output("does not answer", 60)
    # Longer than the session: only a consumer that goes on polling keeps its partitions.
    child.wait_for_output("trying again in 5.00 s", 60)
    state = status_of(child)
    assert state["state"] == "retrying"
    assert state["lag"] == 1
    assert state["oldest_age_s"] > 1
    (age,) = re.findall(r"^lclstream_arp_oldest_event_age_seconds (\S+)", status_of(child, "/metrics"), re.MULTILINE)
    assert float(age) > 1
    assert "does not answer" in state["waiting"]["reason"]
    airflow.faults.extend([500, "made-then-drop"])
    airflow.start()
    wait_until(lambda: topics.committed("arp") == 1, 60, "commit")
    assert airflow.ids() == [STREAM.format(1)]
    assert [status for *_, status in airflow.attempts] == [500, 200, 409]
    assert "no longer reading" not in child.output()
    assert status_of(child)["decisions"] == {"made": 0, "existed": 1, "not_for_us": 0, "dead_letter": 0}


def test_a_lost_token_is_renewed_and_neither_token_nor_password_is_logged(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    child = start_arp()
    topics.send("runs", run_message(1))
    wait_until(lambda: len(airflow.ids()) == 1, 60, "first DAG run")
    airflow.tokens.clear()
    topics.send("runs", run_message(2))
    wait_until(lambda: len(airflow.ids()) == 2, 60, "second DAG run")
    assert airflow.token_requests == 2
    assert "token-" not in child.output()
    assert airflow.password not in child.output()


def test_a_password_that_was_changed_is_read_again_and_nothing_is_lost(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any, tmp_path: Path
) -> None:
    child = start_arp()
    airflow.tokens.clear()
    airflow.password = "new"
    topics.send("runs", run_message(1))
    child.wait_for_output("does not accept user 'arp'", 60)
    (tmp_path / "password").write_text("new")
    wait_until(lambda: airflow.ids() == [STREAM.format(1)], 60, "DAG run")


def test_an_event_that_airflow_always_fails_on_does_not_hold_up_the_others_for_ever(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    airflow.faults.extend([500] * 3)
    start_arp(airflow={"server_errors_at_most_s": 0.5})
    topics.send("runs", run_message(1), run_message(2))
    (letter,) = topics.read("arp-dead-letter", 1)
    assert "given up after 0.5 s" in letter["reason"]
    assert "answered 500" in letter["reason"]
    wait_until(lambda: airflow.ids() == [STREAM.format(2)], 60, "the next event's DAG run")


def test_killed_between_creation_and_commit_the_next_one_finds_the_dag_run(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    child = start_arp()
    airflow.on_made = lambda _: os.kill(child.pid, signal.SIGKILL)
    topics.send("runs", run_message(1))
    assert child.wait(60) == -signal.SIGKILL
    assert topics.committed("arp") < 0
    airflow.on_made = None
    start_arp()
    wait_until(lambda: topics.committed("arp") == 1, 60, "commit")
    assert [status for *_, status in airflow.attempts] == [200, 409]


def test_run_numbers_that_are_text_and_ends_that_come_before_starts_make_one_dag_run_each(
    start_arp: Any, airflow: Any, run_message: Any, wait_until: Any
) -> None:
    end = {"end_time": "2026-03-01T12:01:00+00:00", "duration": 60.0}
    with EmbeddedKafka(["runs", "file_catalog", "workflow_jobs", "arp-dead-letter"], partitions=2) as broker:
        start_arp(kafka={"bootstrap_servers": broker.bootstrap_servers})
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})

        def send(partition: int, *messages: Any) -> None:
            for message in messages:
                producer.produce("runs", json.dumps(message).encode(), partition=partition)
            assert producer.flush(60) == 0

        names = ["grid7_0012", "0007", 7]
        ends = [run_message(name, "Update", **end) for name in names]
        send(1, *ends)
        wait_until(lambda: len(airflow.ids()) == 3, 60, "DAG runs of the ends")
        send(0, *(run_message(name) for name in names), *ends)
        wait_until(lambda: len(airflow.ids()) == 6, 60, "DAG runs of the starts")
    assert len(set(airflow.ids())) == 6
    assert {status for *_, status in airflow.attempts} == {200}
    numbers = [conf["conf"]["run"] for conf in airflow.dag_runs.values()]
    assert numbers == [*names, *names]


def test_a_broker_that_goes_away_and_comes_back_loses_no_event(
    start_arp: Any, airflow: Any, broker: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    child = start_arp()
    topics.send("runs", run_message(1))
    wait_until(lambda: len(airflow.ids()) == 1, 60, "first DAG run")
    broker.set_down()
    child.wait_for_output("WARNING lclstream.arp: Kafka at", 60)
    broker.set_up()
    topics.send("runs", run_message(2))
    wait_until(lambda: airflow.ids() == [STREAM.format(1), STREAM.format(2)], 60, "second DAG run")


def test_a_stop_does_not_wait_for_an_airflow_that_hangs_and_the_event_comes_again(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    child = start_arp()
    asked, answer = threading.Event(), threading.Event()

    def hang(_: str) -> None:
        asked.set()
        answer.wait(240)

    airflow.on_made = hang
    topics.send("runs", run_message(1))
    assert asked.wait(60)
    child.signal(signal.SIGTERM)
    assert child.wait(60) == 143
    assert "its event will come again" in child.output()
    answer.set()
    assert topics.committed("arp") < 0


def test_two_in_a_group_share_the_partitions_and_one_takes_over_when_the_other_is_killed(
    start_arp: Any, airflow: Any, start: Any, run_message: Any, wait_until: Any
) -> None:
    with EmbeddedKafka(["runs", "file_catalog", "workflow_jobs", "arp-dead-letter"], partitions=4) as broker:
        kafka = {"bootstrap_servers": broker.bootstrap_servers}
        first = start_arp(kafka=kafka)
        second = start_arp(kafka=kafka)
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})

        def send(numbers: range) -> None:
            for number in numbers:
                for _ in range(2):
                    producer.produce("runs", json.dumps(run_message(number)).encode(), partition=number % 4)
            assert producer.flush(60) == 0

        send(range(1, 21))
        wait_until(lambda: len(airflow.ids()) == 20, 60, "20 DAG runs")
        first.signal(signal.SIGKILL)
        first.wait(60)
        send(range(21, 41))
        wait_until(lambda: len(airflow.ids()) == 40, 60, "40 DAG runs")
        assert sorted(airflow.ids()) == [STREAM.format(number) for number in range(1, 41)]
        second.signal(signal.SIGINT)
        assert second.wait(60) == 0


def test_without_kafka_it_says_so_and_exits_with_3_in_time(start_arp: Any, free_port: Callable[[], int]) -> None:
    address = f"127.0.0.1:{free_port()}"
    child = start_arp(wait=False, kafka={"bootstrap_servers": address}, start_timeout_s=2)
    assert child.wait(60) == 3
    assert f"no Kafka broker answers at {address}" in child.output()


def test_a_port_in_use_is_said(start_arp: Any, broker: Any) -> None:
    port = int(broker.bootstrap_servers.split(":")[1])
    child = start_arp(wait=False, status={"port": port})
    assert child.wait(60) == 3
    assert f"cannot listen at 127.0.0.1:{port}" in child.output()


def test_a_wrong_password_is_said_at_the_start(start_arp: Any, airflow: Any) -> None:
    airflow.password = "other"
    child = start_arp(wait=False)
    assert child.wait(60) == 2
    assert "does not accept user 'arp'" in child.output()


def test_a_password_others_can_read_is_refused(start: Any, write_config: Any, tmp_path: Path) -> None:
    config = write_config()
    (tmp_path / "password").chmod(0o644)
    child = start(sys.executable, "-m", "lclstream.arp.cli", "--config", str(config))
    assert child.wait(60) == 2
    assert "chmod 600" in child.output()


def test_status_and_metrics_tell_lag_decisions_and_the_last_event(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any, status_of: Any
) -> None:
    child = start_arp(status={"port": 0})
    topics.send("runs", run_message(1), run_message(1), run_message(2, "Update"), b"?")
    wait_until(lambda: topics.committed("arp") == 4, 60, "commit")
    wait_until(lambda: sum(status_of(child)["decisions"].values()) == 4, 60, "four decisions")
    state = status_of(child)
    assert state["decisions"] == {"made": 1, "existed": 1, "not_for_us": 1, "dead_letter": 1}
    assert state["last_event"]["message"] == "runs[0]@3"
    assert (state["state"], state["location"], state["group"]) == ("running", "s3df", "arp")
    wait_until(lambda: status_of(child)["lag"] == 0, 60, "no lag")
    text = status_of(child, "/metrics")
    assert 'lclstream_arp_events_total{decision="made"} 1.0' in text
    assert 'lclstream_arp_lag{partition="0",topic="runs"} 0.0' in text


def test_a_definition_added_to_the_file_counts_from_the_next_event_on(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any, tmp_path: Path
) -> None:
    child = start_arp()
    path = tmp_path / "definitions.yaml"
    definitions = yaml.safe_load(path.read_text())
    path.write_text("definitions: [")
    topics.send("runs", run_message(1))
    child.wait_for_output("the 2 definition(s) read before still hold", 60)
    definitions["definitions"][0]["name"] = "second"
    path.write_text(yaml.safe_dump(definitions))
    topics.send("runs", run_message(2))
    wait_until(lambda: len(airflow.ids()) == 2, 60, "DAG runs")
    assert airflow.ids() == [STREAM.format(1), "mfx1__r0002__start_of_run__second"]


def test_a_group_that_starts_now_ignores_what_was_before_and_remembers_where_it_began(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    topics.send("runs", run_message(1))
    child = start_arp(kafka={"start": "latest"})
    child.signal(signal.SIGKILL)
    child.wait(60)
    topics.send("runs", run_message(2))
    start_arp(kafka={"start": "latest"})
    wait_until(lambda: airflow.ids() == [STREAM.format(2)], 60, "the DAG run of what came meanwhile")


def test_a_group_that_starts_now_reads_a_topic_that_is_made_later_from_its_beginning(
    start_arp: Any, airflow: Any, run_message: Any, wait_until: Any, make_topics: Any
) -> None:
    with EmbeddedKafka(["arp-dead-letter"]) as broker:
        kafka = {"bootstrap_servers": broker.bootstrap_servers, "start": "latest"}
        child = start_arp(wait=False, kafka=kafka)
        child.wait_for_output("Subscribed topic not available: runs", 60)
        # Killed before its first commit: the next one sees the topic, and must not take it for an old one.
        airflow.on_made = lambda _: os.kill(child.pid, signal.SIGKILL)
        topics = make_topics(broker)
        topics.send("runs", run_message(1), run_message(2), partition=0)
        assert child.wait(90) == -signal.SIGKILL
        airflow.on_made = None
        start_arp(kafka=kafka)
        wait_until(lambda: topics.committed("arp") == 2, 60, "commit")
    assert airflow.ids() == [STREAM.format(1), STREAM.format(2)]


def test_a_group_that_started_now_goes_on_with_what_the_broker_still_has_when_its_place_is_gone(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    child = start_arp(kafka={"start": "latest"})
    topics.send("runs", run_message(1))
    wait_until(lambda: topics.committed("arp") == 1, 60, "commit")
    child.signal(signal.SIGTERM)
    assert child.wait(60) == 0
    # The embedded broker drops the oldest messages of a partition when it has more than 5 MB.
    topics.send("runs", *(run_message(2, "Update", params={"filling": "x" * 500_000}) for _ in range(15)))
    topics.send("runs", run_message(3))
    low, high = topics.held("runs")
    assert low > 1
    start_arp(kafka={"start": "latest"})
    wait_until(lambda: topics.committed("arp") == high, 60, "commit of all there are")
    assert airflow.ids() == [STREAM.format(1), STREAM.format(3)]


def test_a_dead_letter_that_would_be_too_large_says_reason_and_place_and_begins_as_the_message_does(
    start_arp: Any, airflow: Any, topics: Any, run_message: Any, wait_until: Any
) -> None:
    start_arp()
    # Each quote needs two bytes in the letter.
    topics.send("runs", b'"' * 700_000, b"\xff" * 900_000, run_message(1))
    text, binary = topics.read("arp-dead-letter", 2)
    wait_until(lambda: topics.committed("arp") == 3, 60, "commit")
    assert airflow.ids() == [STREAM.format(1)]
    assert "not JSON" in text["reason"]
    assert [(letter["topic"], letter["offset"], letter["size"]) for letter in (text, binary)] == [
        ("runs", 0, 700_000),
        ("runs", 1, 900_000),
    ]
    assert set(text["value"]) == {'"'}
    assert binary["value_base64"].startswith("////")
