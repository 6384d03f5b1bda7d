from __future__ import annotations

import pytest

from lclstream.jobs.models import ResourceSpec
from lclstream.jobs.sbatch import SbatchOptionError, directives, minutes, parse_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", 5), ("5:30", 5.5), ("1:00:00", 60), ("2-3", 2 * 1440 + 180), ("1-0:30", 1470), ("1-01:00:30", 1500.5)],
)
def test_every_form_of_a_time_is_understood(text: str, expected: float) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0:00", "-1", "1:2:3:4", "soon", "1-", "UNLIMITED"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SbatchOptionError, match="time"):
        minutes(text)


def test_every_spelling_of_an_option_means_the_same() -> None:
    spellings = (
        ["--nodes=2", "--ntasks=8", "--partition=milano"],
        ["--nodes", "2", "--ntasks", "8", "--partition", "milano"],
        ["-N2", "-n", "8", "-pmilano"],
    )
    for words in spellings:
        options = parse_options(words)
        assert options.resources == {"exclusive_node_use": False, "node_count": 2, "process_count": 8}
        assert options.attributes == {"--partition": "milano"}
        ResourceSpec.model_validate(options.resources)


def test_a_range_of_nodes_is_left_to_the_scheduler_and_the_last_word_counts() -> None:
    options = parse_options(["-N", "4", "--nodes=0-2", "--requeue", "--exclusive"])
    assert options.resources["exclusive_node_use"] is True
    assert options.attributes == {"--nodes": "0-2", "--requeue": ""}
    assert parse_options(["--nodes=0-2", "-N4"]).attributes == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["milano"], "'milano'"),
        (["-Z", "1"], "-Z"),
        (["--account"], "--account: its value is missing"),
        (["--account", "--nodes=1"], "--account: its value is missing"),
        (["--ntasks=0"], "--ntasks=0"),
        (["--nodes=many"], "--nodes=many"),
        (["--", "x"], "'--'"),
    ],
)
def test_what_is_no_option_is_named(words: list[str], message: str) -> None:
    with pytest.raises(SbatchOptionError, match=message):
        parse_options(words)


def test_directives_are_read_up_to_the_first_command() -> None:
    script = (
        "#!/bin/bash\n#SBATCH -N 2 -J 'two words'  # why\n\n# a comment\n#SBATCH --time=5\necho hello\n#SBATCH -N 9\n"
    )
    assert directives(script) == ["-N", "2", "-J", "two words", "--time=5"]
    with pytest.raises(SbatchOptionError, match="quotation"):
        directives("#!/bin/sh\n#SBATCH -J 'open\n")
