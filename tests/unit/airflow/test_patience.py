from __future__ import annotations

import pytest

from lclstream.security.errors import AuthenticationError, ServiceError, UnreachableError
from lclstream_airflow.hooks.patience import Patience, insist


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pauses_grow_and_end_at_the_limit() -> None:
    clock = Clock()
    patience = Patience(20, first_s=1, longest_s=4, clock=clock)
    pauses = []
    while (pause := patience.pause_after(UnreachableError("away"))) is not None:
        pauses.append(pause)
        clock.now += pause
    assert clock.now == pytest.approx(20)
    assert 0.75 <= pauses[0] <= 1.25
    assert max(pauses) <= 4 * 1.25
    assert len(pauses) < 12


def test_a_success_starts_the_count_again() -> None:
    clock = Clock()
    patience = Patience(10, clock=clock)
    assert patience.pause_after(UnreachableError("away")) is not None
    clock.now = 9
    patience.succeeded()
    clock.now = 15
    assert patience.pause_after(UnreachableError("away")) is not None


def test_what_cannot_get_better_is_not_repeated() -> None:
    patience = Patience(100)
    assert patience.pause_after(ServiceError("no", status=422, detail="ranks")) is None
    assert patience.pause_after(AuthenticationError("not you")) is None


def test_a_dropped_connection_after_an_answer_is_a_restart_not_a_refusal() -> None:
    patience = Patience(100)
    patience.succeeded()
    assert patience.pause_after(AuthenticationError("closed the connection")) is not None


def test_insist_gives_the_last_error() -> None:
    slept: list[float] = []
    answers = iter([UnreachableError("one"), ServiceError("two", status=503, detail=""), "here"])

    def call() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert insist(call, limit_s=60, sleep=slept.append) == "here"
    assert len(slept) == 2
    with pytest.raises(UnreachableError, match="never"):
        insist(lambda: (_ for _ in ()).throw(UnreachableError("never")), limit_s=0, sleep=slept.append)
