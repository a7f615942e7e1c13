"""What the steps of script/bench gpu do when one fails, hangs or dies."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.gpu.steps import Results, Step, chosen, supervise

ROOT = Path(__file__).parents[2]

WORKER = """
import os, signal, sys, time
from benchmarks.gpu.steps import Results, Step, do

def plain(shared): results.add("figure", step_of=os.environ.get("AGAIN", "once"), pid=os.getpid())
def broken(shared): raise ArithmeticError("of this step alone")
def slow(shared): time.sleep(60)
def stubborn(shared):
    try: time.sleep(60)
    except Exception: pass
def deaf(shared):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(60)
def dead(shared): os.kill(os.getpid(), signal.SIGKILL)
def base(shared):
    if os.environ.get("AGAIN") != "yes" and sys.argv[3] == "unlucky": raise OSError("no base")
def anew_broken(shared): raise OSError("nor here")

class Shared:
    def usable(self): return True

results = Results(__import__("pathlib").Path(sys.argv[1]))
work = {"base": base, "broken": broken, "slow": slow, "deaf": deaf, "dead": dead}
work |= {"stubborn": stubborn, "anew_broken": anew_broken}
steps = [
    Step(name, 1, work.get(name, plain), base=name == "base", anew=name.startswith("anew"))
    for name in sys.argv[2].split(",")
]
sys.exit(do(steps, Shared(), results, time.time() + 60))
"""


def steps_of(*names: str, **again: str) -> list[Step]:
    return [
        Step(n, 1, lambda _: None, base=n == "base", anew=n.startswith("anew"), again=again)
        for n in names
    ]


@pytest.fixture
def rows(tmp_path) -> Callable[..., list[dict]]:
    """Supervise steps of these names; returns what was written."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def run(steps: list[Step], luck: str = "lucky") -> list[dict]:
        results = Results(tmp_path / "results.jsonl")

        def start(names: Sequence[str], extra: Mapping[str, str]) -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                [sys.executable, str(script), tmp_path / "results.jsonl", ",".join(names), luck],
                env={**os.environ, "PYTHONPATH": str(ROOT / "script"), **extra},
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

        supervise(steps, start, results, time.time() + 60, grace=1)
        return results.rows()

    return run


def outcome(rows: list[dict]) -> list[str]:
    return [f"{row['step']}: {row['error']}" for row in rows if "error" in row]


def done(rows: list[dict]) -> list[str]:
    return [row["step"] for row in rows if "took" in row]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("broken", "broken: ArithmeticError: of this step alone"),
        ("slow", "slow: OutOfTime: more than 1 s"),
        ("stubborn", "stubborn: OutOfTime: more than 1 s"),
        ("deaf", "deaf: killed after"),
        ("dead", "dead: the worker ended with -9"),
    ],
)
def test_a_step_that_fails_costs_no_other(rows, name: str, error: str) -> None:
    found = rows(steps_of("first", "base", name, "last"))
    (said,) = outcome(found)
    assert said.startswith(error)
    assert [step for step in done(found) if step not in (name, "base")] == ["first", "last"]
    assert done(found)[-2:] == (["base", "last"] if name in ("deaf", "dead") else [name, "last"])


def test_a_base_that_fails_is_tried_once_more_with_other_settings(rows) -> None:
    found = rows(steps_of("base", "last", AGAIN="yes"), luck="unlucky")
    assert outcome(found) == ["base: OSError: no base"]
    assert done(found) == ["base", "last"]
    assert [row["step_of"] for row in found if row["step"] == "figure"] == ["yes"]


def test_without_its_base_no_later_step_is_done(rows) -> None:
    found = rows(steps_of("first", "base", "last"), luck="unlucky")
    assert outcome(found) == ["base: OSError: no base"]
    assert done(found) == ["first"]
    assert [row["step"] for row in found if row.get("skipped") == "not begun"] == ["last"]


def test_a_step_can_begin_a_process_that_those_behind_it_go_on_in(rows) -> None:
    found = rows(steps_of("base", "first", "anew", "last"))
    assert outcome(found) == []
    assert done(found) == ["base", "first", "anew", "last"]
    first, anew, last = (row["pid"] for row in found if row["step"] == "figure")
    assert first != anew == last


def test_if_that_step_fails_those_behind_it_get_their_base(rows) -> None:
    found = rows(steps_of("base", "first", "anew_broken", "last"))
    assert outcome(found) == ["anew_broken: OSError: nor here"]
    assert done(found) == ["base", "first", "base", "last"]


def test_only_some_steps_and_the_base_that_they_need() -> None:
    steps = steps_of("first", "base", "middle", "last")
    assert [step.name for step in chosen(steps, ["last"])] == ["base", "last"]
    assert [step.name for step in chosen(steps, ["first"])] == ["first"]
    assert chosen(steps, []) == steps


def test_lines_are_whole_json(tmp_path) -> None:
    results = Results(tmp_path / "new" / "results.jsonl")
    results.add("images", figures={"s": 1.5}, path=tmp_path)
    (line,) = (tmp_path / "new" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(tmp_path)
