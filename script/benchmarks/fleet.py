"""script/fleet against servers without one: warm adapters, throughput, time added, and losses.

Everything runs on the miniature. With `--json FILE` a chart goes beside it, as FILE with the
suffix .png.
"""

import itertools
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from benchmarks.shared.report import BLUE, GREY, chart, interleave, medians, parser, report
from flux.deployment import NANO
from serving.server import Server, processes

FLEET = Path(__file__).resolve().parent.parent / "fleet"
ADAPTERS, REQUESTS = 12, 80
LOADS = {  # callers for each replica, and the seconds that they pause between requests
    "a caller each, with pauses": (1, 0.5),
    "four callers each": (4, 0.0),
}
SIZES = (2, 4)
QUICK = {
    "prompt": "a red circle",
    "aspect_ratio": "custom",
    "width": 256,
    "height": 256,
    "num_inference_steps": 4,
}
WHOLE = {"prompt": "a red circle", "megapixels": "0.25"}  # 28 steps, 512 x 512
REFUSED = {"prompt": "a red circle", "width": 5000}
VICTIMS = (b"Replica:flux:Replica", b"coglet.server._run_worker", b"cog.server.http")
SETTINGS = {
    "FLUX_CHECKPOINT": "nano",
    "FLUX_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
    "LORA_ALLOW_LOCAL_PATHS": "true",
}

Send = Callable[[dict[str, Any]], requests.Response]


def main() -> None:
    file = parser().parse_args().json
    with tempfile.TemporaryDirectory() as directory:
        adapters = [write_adapter(Path(directory) / f"{n}.safetensors", n) for n in range(ADAPTERS)]
        settings = {**SETTINGS, "FLUX_CACHE_DIRECTORY": f"{directory}/cache"}
        results = {
            "requests": REQUESTS,
            **speed(settings),
            "warm_share": [warm_shares(size, adapters, settings) for size in SIZES],
            "losses": losses(settings, f"FLEET_OF={directory}"),
        }
    report("fleet", results, file)
    chart(file, (8, 3.5), lambda figure: plot(figure, results["warm_share"]))


def write_adapter(path: Path, seed: int) -> str:
    """A rank-4 LoRA on the attention of the miniature."""
    model = FluxTransformer2DModel.from_pretrained(NANO / "dev", subfolder="transformer")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn.to_" in name:
            rows, columns = module.weight.shape
            down, up = (torch.randn(s, generator=generator) for s in ((4, columns), (rows, 4)))
            tensors[f"transformer.{name}.lora_A.weight"] = down / columns**0.5
            tensors[f"transformer.{name}.lora_B.weight"] = up * 0.1
    save_file(tensors, path)
    return str(path)


@contextmanager
def fleet(size: int, settings: dict[str, str]) -> Iterator[Server]:
    with Server(settings, command=(FLEET, "--replicas", str(size))) as server:
        wait_until_whole(server, size)
        yield server


@contextmanager
def servers(size: int, settings: dict[str, str]) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Server(settings)) for _ in range(size)]


def wait_until_whole(server: Server, size: int) -> None:
    while server.request("GET", "/health-check").json()["replicas"] < size:
        time.sleep(0.2)


def sender(server: Server, *, patient: bool) -> Send:
    """Sends inputs; only to a server without a fleet it is patient, and repeats a 409."""

    def send(inputs: dict[str, Any]) -> requests.Response:
        body = {"input": inputs}
        if patient:
            return server.request("POST", "/predictions", json=body)
        with requests.Session() as session:
            session.trust_env = False
            return session.post(f"{server.url}/predictions", json=body)

    return send


def warm_shares(size: int, adapters: Sequence[str], settings: dict[str, str]) -> dict[str, Any]:
    """Shares of requests that change no weight: their adapter was in those of their replica."""
    rng = random.Random(0)
    weights = [1 / rank for rank in range(1, ADAPTERS + 1)]  # Zipf's law
    chosen = rng.choices(adapters, weights, k=REQUESTS)
    inputs = [{**QUICK, "replicate_weights": adapter} for adapter in chosen]
    shares = {}
    with servers(size, settings) as plain:
        sends = itertools.cycle([sender(server, patient=True) for server in plain])
        turns = [(next(sends), each) for each in inputs]
        shares["round robin"] = warm_share(in_parallel(turns, size))
    for name, (callers, pause) in LOADS.items():
        with fleet(size, settings) as front:
            send = sender(front, patient=False)
            answers = in_parallel([(send, each) for each in inputs], callers * size, pause)
        shares[f"fleet, {name}"] = warm_share(answers)
    return {"replicas": size, **shares}


def in_parallel(
    turns: Sequence[tuple[Send, dict[str, Any]]], callers: int, pause: float = 0.0
) -> list[dict[str, Any]]:
    """The answers to requests that so many callers send, each after a pause (seconds)."""

    def take(turn: tuple[Send, dict[str, Any]]) -> requests.Response:
        time.sleep(pause)
        send, inputs = turn
        return send(inputs)

    with ThreadPoolExecutor(callers) as pool:
        responses = list(pool.map(take, turns))
    return [response.json() for response in responses]


def warm_share(answers: Sequence[dict[str, Any]]) -> float:
    assert all(answer["status"] == "succeeded" for answer in answers), answers
    warm = sum("weights merged" not in answer["logs"] for answer in answers)
    return round(warm / len(answers), 3)


def speed(settings: dict[str, str]) -> dict[str, Any]:
    """Whole requests by two replicas and by two servers; and the time of one that is refused."""
    rounds, each = 5, 4
    with fleet(2, settings) as front, servers(2, settings) as plain:
        send, direct = sender(front, patient=False), [sender(s, patient=True) for s in plain]
        callers = {
            "fleet, 4 callers": lambda: in_parallel([(send, WHOLE)] * each, 4),
            "two servers, a caller each": lambda: in_parallel(
                [(direct[n % 2], WHOLE) for n in range(each)], 2
            ),
        }
        took = medians(interleave(callers, rounds))
        refusals = {"fleet": lambda: send(REFUSED), "server": lambda: direct[0](REFUSED)}
        refused = medians(interleave(refusals, 100, warmup=5))
    per_minute = {name: round(60 * each / seconds, 2) for name, seconds in took.items()}
    ours, theirs = per_minute.values()
    return {
        "requests_per_minute": per_minute,
        "throughput_to_two_servers": round(ours / theirs, 3),
        "refused_ms": {name: round(1000 * seconds, 2) for name, seconds in refused.items()},
        "added_ms": round(1000 * (refused["fleet"] - refused["server"]), 1),
    }


def losses(settings: dict[str, str], mark: str) -> dict[str, Any]:
    """A hundred requests by two callers; every twenty, a replica is killed in mid-prediction."""
    name, _, value = mark.partition("=")
    counter, kinds, seconds = itertools.count(1), itertools.cycle(VICTIMS), []
    with fleet(2, {**settings, name: value}) as front:
        send = sender(front, patient=False)

        def kill() -> None:
            os.kill(random.choice(sorted(processes(next(kinds), mark))), signal.SIGKILL)

        def answered(inputs: dict[str, Any]) -> bool:
            if next(counter) % 20 == 10:
                wait_until_whole(front, 2)
                threading.Timer(0.2, kill).start()  # when this request, too, is being served
            start = time.perf_counter()
            answer = send(inputs)
            seconds.append(time.perf_counter() - start)
            return answer.ok and answer.json()["status"] == "succeeded"

        with ThreadPoolExecutor(2) as pool:
            good = sum(pool.map(answered, [QUICK] * 100))
    return {
        "killed": 5,
        "sent": 100,
        "answered": good,
        "median_seconds": round(statistics.median(seconds), 3),
        "longest_seconds": round(max(seconds), 3),
    }


def plot(figure: Any, shares: Sequence[dict[str, Any]]) -> None:
    axes = figure.subplots()
    rows = [
        (f"{row['replicas']} replicas: {name}", share, GREY if name == "round robin" else BLUE)
        for row in reversed(shares)
        for name, share in reversed(row.items())
        if name != "replicas"
    ]
    names, values, colours = zip(*rows, strict=True)
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, [f"{100 * value:.0f} %" for value in values], padding=3)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.15)
    figure.suptitle("requests that find their adapter in the weights")


if __name__ == "__main__":
    main()
