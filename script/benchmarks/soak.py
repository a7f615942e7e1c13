"""A long life of a server: mixed requests, failures, cancels and disconnects; what is left of them.

Reference images are generated at the start and again at the end, and must be the same to the byte.
After every request, a probe (a small image of the same inputs) is timed, and the memory, threads
and open files of the server's processes, and the files of its directories, are counted. A slope
over the last two thirds is Theil and Sen's, with Sen's confidence interval of 95 % (P. K. Sen,
Estimates of the regression coefficient based on Kendall's tau, JASA 63, 1968).
"""

import base64
import itertools
import math
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from benchmarks.shared.inputs import BASE, SMALL
from benchmarks.shared.report import BLUE, chart, parser, report
from miniature.evaluation.effects import adapter_inputs
from miniature.evaluation.painter import data_uri
from serving.server import Server, ServerError, resident
from serving.supervise import children

ADAPTERS = {"inverted": adapter_inputs("inverted"), "outline": adapter_inputs("outline")}
REFERENCES: Mapping[str, Mapping[str, Any]] = {
    "dev": {"num_inference_steps": 3, **SMALL},
    "schnell": {"num_inference_steps": 2, "model": "schnell", **SMALL},
    "go_fast": {"num_inference_steps": 2, "megapixels": "0.25", "go_fast": True},
    "adapter": {"num_inference_steps": 2, **SMALL, **ADAPTERS["inverted"]},
}
SIZES = ((64, 96), (160, 256), (256, 80), (240, 240))
"""Of pictures: few, because oneDNN keeps what it compiled for each, up to 1024 times."""
PROBE = {"model": "schnell", "num_inference_steps": 1, **SMALL}
RESOLUTION = {"probe, ms": 0.1, "memory, MB": 0.02}
"""What share of the median a rise over the window must exceed: machine and malloc are noisy."""

Inputs = dict[str, Any]
Kind = Callable[["Soak", random.Random], str]


def picture(rng: random.Random, mode: str = "RGB") -> str:
    """A small picture of noise as a data URI."""
    return data_uri(Image.effect_noise(rng.choice(SIZES), 90).convert(mode))


def wanted(rng: random.Random) -> Inputs:
    """Inputs of any mode that are fine."""
    inputs: Inputs = {
        **BASE,
        "model": rng.choice(["dev", "schnell"]),
        "go_fast": rng.random() < 0.4,
        "num_outputs": rng.choice([1, 1, 1, 2]),
        "num_inference_steps": rng.randint(1, 3),
        "output_format": rng.choice(["webp", "jpg", "png"]),
        "seed": rng.randrange(1 << 32),
        **rng.choice([SMALL, {"megapixels": "0.25"}]),
    }
    mode = rng.choice(["text", "image", "mask"])
    if mode != "text":
        inputs |= {"image": picture(rng), "prompt_strength": rng.choice([0.0, 0.5, 1.0])}
    if mode == "mask":
        inputs["mask"] = picture(rng, "L")
    if rng.random() < 0.5:
        inputs |= ADAPTERS[rng.choice(list(ADAPTERS))] | {"lora_scale": rng.choice([0, 0.5, 1])}
    return inputs


@dataclass
class Soak:
    """A running server, what was sent to it, and what was counted after each request."""

    server: Server
    directories: Sequence[Path]
    sent: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def images(self) -> dict[str, bytes]:
        """The reference images."""
        found = {}
        for name, inputs in REFERENCES.items():
            answer = self.server.predict({**BASE, **inputs})
            assert answer["status"] == "succeeded", answer.get("error")
            found[name] = base64.b64decode(answer["output"][0].partition(",")[2])
        return found

    def sample(self) -> None:
        """Time the probe by the server's clock, and count what its processes hold."""
        answer = self.server.predict({**BASE, **PROBE})
        assert answer["status"] == "succeeded", answer.get("error")
        processes = family(self.server.pid)
        counts = {
            "probe, ms": 1000 * answer["metrics"]["predict_time"],
            "memory, MB": sum(resident(p) for p in processes) / 1e6,
            "threads": sum(entries(f"/proc/{p}/task") for p in processes),
            "open files": sum(entries(f"/proc/{p}/fd") for p in processes),
            "files": sum(1 for d in self.directories for p in d.rglob("*") if p.is_file()),
        }
        for name, value in counts.items():
            self.samples.setdefault(name, []).append(round(value, 2))


# --- kinds of requests; each returns what became of it


def succeeds(soak: Soak, rng: random.Random) -> str:
    answer = soak.server.predict(wanted(rng))
    assert answer["status"] == "succeeded", answer.get("error")
    return "succeeded"


def fails(soak: Soak, rng: random.Random) -> str:
    """A request that passes the schema and cannot be served."""
    broken: dict[str, Any] = rng.choice(
        [
            {"image": data_uri(b"<html>not found</html>")},
            {"mask": picture(rng, "L")},
            {"image": data_uri(b"")},
            {"replicate_weights": "not a reference"},
            {"replicate_weights": data_uri(b"{}")},
            {"replicate_weights": "http://127.0.0.1:9/a.safetensors"},
        ]
    )
    answer = soak.server.predict({**BASE, **SMALL, "num_inference_steps": 1, **broken})
    assert answer["status"] == "failed", broken.keys()
    return "failed, with a reason"


def is_refused(soak: Soak, rng: random.Random) -> str:
    """Inputs outside the schema."""
    broken: dict[str, Any] = rng.choice(
        [{"num_outputs": 9}, {"model": "pro"}, {"width": 1}, {"lora_scale": 99}]
    )
    try:
        soak.server.predict({**BASE, **broken})
    except ServerError:
        return "refused by the schema"
    raise AssertionError(f"{broken} was accepted")


def is_cancelled(soak: Soak, rng: random.Random) -> str:
    """An asynchronous prediction, cancelled after some time; it may have ended before."""
    path = f"/predictions/{uuid.uuid4().hex}"
    body = {"input": {**wanted(rng), "num_inference_steps": 50, "num_outputs": 4}}
    headers = {"Prefer": "respond-async"}
    answer = soak.server.request("PUT", path, json=body, headers=headers)
    assert answer.status_code == 202, answer.text
    time.sleep(rng.uniform(0, 1.5))
    soak.server.request("POST", f"{path}/cancel")
    return "cancelled"


def hangs_up(soak: Soak, rng: random.Random) -> str:
    """A client that goes away before its answer."""
    body = {"input": {**wanted(rng), "num_inference_steps": 50}}
    try:
        soak.server.request("POST", "/predictions", json=body, timeout=rng.uniform(0.05, 0.8))
    except requests.Timeout:
        return "left by its client"
    return "answered before its client left"


KINDS: Mapping[Kind, int] = {succeeds: 6, fails: 2, is_refused: 1, is_cancelled: 2, hangs_up: 1}


# --- what a process holds


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for one in found:
        found += children(one)
    return found


def entries(directory: str) -> int:
    return sum(1 for _ in Path(directory).iterdir())


# --- slopes


@dataclass(frozen=True)
class Slope:
    """A change per 100 requests, with its interval of 95 %, and the median of the values."""

    per_hundred: float
    low: float
    high: float
    median: float

    def rises(self, window: int, resolution: float) -> bool:
        """Whether it rises for certain, by more than a share of the median over the window."""
        return self.low * window / 100 > resolution * self.median


def slope(values: Sequence[float]) -> Slope:
    """Theil and Sen's slope of equidistant values, with Sen's interval."""
    count = len(values)
    pairs = itertools.combinations(range(count), 2)
    slopes = sorted(100 * (values[j] - values[i]) / (j - i) for i, j in pairs)
    spread = 1.96 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, round((len(slopes) - spread) / 2) - 1)
    high = min(len(slopes) - 1, round((len(slopes) + spread) / 2))
    middle, median = slopes[len(slopes) // 2], sorted(values)[count // 2]
    return Slope(*(round(value, 3) for value in (middle, slopes[low], slopes[high], median)))


def main() -> int:
    command = parser()
    command.add_argument("--requests", type=int, default=300, metavar="N")
    command.add_argument("--seed", type=int, default=0, metavar="S")
    arguments = command.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        places = [Path(directory) / name for name in ("outputs", "adapters", "tmp")]
        for place in places:
            place.mkdir()
        environment = {
            "FLUX_CHECKPOINT": "nano",
            "FLUX_DEVICE": "cpu",
            "FLUX_OUTPUT_DIRECTORY": str(places[0]),
            "FLUX_CACHE_DIRECTORY": str(places[1]),
            "TMPDIR": str(places[2]),
        }
        with Server(environment) as server:
            soak = Soak(server, places)
            before = soak.images()
            for number in range(arguments.requests):
                (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
                soak.sent[kind(soak, rng)] += 1
                soak.sample()
                if sys.stderr.isatty():
                    print(f"\r{number + 1} of {arguments.requests}", end="", file=sys.stderr)
            same = {name: image == before[name] for name, image in soak.images().items()}
    return conclude(soak, same, arguments.json)


def conclude(soak: Soak, same: Mapping[str, bool], file: Path | None) -> int:
    """Report; 1 if anything is not as it was."""
    count = soak.sent.total()
    window = count - count // 3
    slopes = {name: slope(values[-window:]) for name, values in soak.samples.items()}
    rising = [name for name, s in slopes.items() if s.rises(window, RESOLUTION.get(name, 0))]
    chart(file, (8, 7), lambda figure: plot(figure, soak.samples, count // 3))
    report(
        "soak",
        {
            "requests": count,
            "sent": dict(soak.sent.most_common()),
            "reference images are the same": same,
            "slopes over the last two thirds": {
                name: {
                    "per 100 requests": s.per_hundred,
                    "95 %": [s.low, s.high],
                    "median": s.median,
                }
                for name, s in slopes.items()
            },
            "rising": rising,
        },
        file,
    )
    return 0 if all(same.values()) and not rising else 1


def plot(figure: Any, samples: Mapping[str, Sequence[float]], start: int) -> None:
    rows = figure.subplots(len(samples), 1, sharex=True)
    for axes, (name, values) in zip(rows, samples.items(), strict=True):
        axes.plot(range(1, len(values) + 1), values, color=BLUE, linewidth=0.8)
        axes.axvline(start, color="#cccccc", linewidth=0.8)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("requests")


if __name__ == "__main__":
    raise SystemExit(main())
