"""script/soak in short: after mixed requests the server is as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import slope

ROOT = Path(__file__).parents[2]


def test_a_server_is_as_it_was_after_mixed_requests(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BENCH_PYTHON", sys.executable)
    file = tmp_path / "soak.json"
    command = [ROOT / "script/soak", "--requests", "8", "--seed", "1161", "--json", file]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    found = json.loads(file.read_text())
    assert set(found["reference images are the same"].values()) == {True}
    assert sum(found["sent"].values()) == 8
    assert len(found["sent"]) == 5  # each kind of request
    assert found["sent"]["succeeded"] == 4
    assert set(found["rising"]) <= {"probe, ms"}  # eight times are noise


def test_a_leak_is_a_slope_and_noise_is_none() -> None:
    noise = [0.0, 3, -2, 1, 2, -3, 0, 1, -1, 2] * 10
    leak = slope([500 + 0.5 * i + n for i, n in enumerate(noise)])
    assert leak.per_hundred == pytest.approx(50, abs=2)
    assert leak.rises(100, 0.02)
    level = slope([500 + n for n in noise])
    assert level.low <= 0 <= level.high
    assert not level.rises(100, 0)
