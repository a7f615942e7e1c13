"""A fresh server with FLUX_CHECKPOINT=official and the stand-in hub: from nothing to images."""

import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from predict import Predictor
from serving.server import processes
from tests.support.hub import Hub
from tests.support.official import wanted
from tests.support.pictures import same
from tests.support.server import SERVER, WORKER, LoggedServer, logged_server, wait_for
from tests.support.services import HuggingFace
from weights.download.retry import RetryPolicy
from weights.manifest import REPOSITORIES

NOWHERE = "http://127.0.0.1:9"
TOKEN = "hf_secret_token"
RAW = {"output_format": "png", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def huggingface(hub, official_files) -> HuggingFace:
    """The hub with the four repositories; dev is gated."""
    huggingface = HuggingFace(hub)
    for part, repository in REPOSITORIES.items():
        gate = {"gated": True, "token": TOKEN} if part == "dev" else {}
        added = huggingface.add(repository.name, official_files[part], **gate)
        added.commits[repository.revision] = official_files[part]
    return huggingface


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    return {
        "FLUX_CHECKPOINT": "official",
        "FLUX_SAFETY_POLICY": "any",
        "FLUX_REVISIONS": "compvis=main",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "HF_TOKEN": TOKEN,
    }


@pytest.fixture(scope="module")
def official(huggingface, environment, tmp_path_factory) -> Iterator[LoggedServer]:
    with logged_server(tmp_path_factory.mktemp("outputs"), **environment) as running:
        yield running


@pytest.mark.parametrize("model", ["dev", "schnell"])
def test_both_variants_generate_what_the_same_weights_generate_elsewhere(
    official, server, model
) -> None:
    answer = official.generate(model=model, **RAW)
    assert same(answer.image, server.generate(model=model, **RAW).image)


def test_both_checkers_are_in_place(official) -> None:
    answer = official.generate(num_outputs=2, **RAW)
    scores = answer.metrics["safety"]
    assert set(scores) == {"compvis", "falconsai"}
    assert all(math.isfinite(score) for score in scores.values())
    assert f"falconsai {scores['falconsai']:.3f}" in answer.logs  # the worse of the two images
    assert answer.logs.count("is fine (compvis ") == 2


def test_setup_logs_what_it_fetches_and_no_secret(official) -> None:
    log = "\n".join(official.lines)
    for repository in REPOSITORIES.values():
        assert f"({repository.name}): licence: {repository.licence}" in log
        assert f"{repository.title} at " in log
    assert "GB to fetch" in log
    assert TOKEN not in log
    assert "secret-of-the-storage" not in log


def test_nothing_but_what_is_needed_was_fetched(official, hub, official_files) -> None:
    paths = {r.path for r in hub.requests if "/resolve/" in r.path}
    for part, repository in REPOSITORIES.items():
        of_it = {path for path in paths if path.startswith(f"/{repository.name}/")}
        files = {path.partition("/resolve/")[2].partition("/")[2] for path in of_it}
        assert files == wanted(official_files[part], part)


def test_a_restart_needs_no_network(official, environment, hub, tmp_path) -> None:
    expected = official.generate(**RAW).image
    asked = len(hub.requests)
    offline = {**environment, "HF_ENDPOINT": NOWHERE, "FLUX_SAFETY_POLICY": "auto", "HF_TOKEN": ""}
    with logged_server(tmp_path, **offline) as restarted:
        answer = restarted.generate(**RAW)
    assert same(answer.image, expected)
    assert any("safety policy official: compvis, falconsai" in line for line in restarted.lines)
    assert len(hub.requests) == asked


# --- what fails setup


@pytest.fixture
def set_up(hub, huggingface, monkeypatch, tmp_path) -> Iterator[Callable[..., None]]:
    """Run setup in this process, with a cache of its own."""

    def run(**environment: str) -> None:
        settings = {
            "FLUX_CHECKPOINT": "official",
            "FLUX_DEVICE": "cpu",
            "FLUX_REVISIONS": "compvis=main",
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            **environment,
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(RetryPolicy, "pause", lambda *_: None)
        Predictor().setup()

    yield run
    close_session()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_TOKEN": ""}, r"FLUX\.1-dev at \w+ .*gated\. Accept .*HF_TOKEN \(none is set\)"),
        (
            {"FLUX_REVISIONS": "compvis=main, schnell=v9"},
            r"v9 \(schnell in FLUX_REVISIONS\): no such branch",
        ),
        (
            {"FLUX_REVISIONS": "compvis=main,falconsai=v9"},
            r"Falconsai/\w+ at v9 .*no such branch.*=open_nsfw",
        ),
        ({"HF_ENDPOINT": NOWHERE}, r"CompVis/.*reached.*script/download.*=open_nsfw"),
        ({"FLUX_SAFETY_POLICY": "open_nsfw", "HF_ENDPOINT": NOWHERE}, r"dev.*reached.*script/down"),
        (
            {"FLUX_CHECKPOINT": "nano", "FLUX_SAFETY_POLICY": "any", "HF_ENDPOINT": NOWHERE},
            "CompVis",
        ),
    ],
)
def test_what_cannot_be_had_fails_setup_and_says_what_to_do(set_up, environment, message) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        set_up(**environment)


def test_a_damaged_file_fails_setup(set_up, huggingface) -> None:
    huggingface.damage(REPOSITORIES["schnell"].name, "scheduler/scheduler_config.json")
    with pytest.raises(ValueError, match=r"scheduler_config\.json is not the file .* start again"):
        set_up(FLUX_SAFETY_POLICY="open_nsfw")
    huggingface.damage(REPOSITORIES["schnell"].name)


def test_a_checkpoint_of_damaged_files_fails_setup(set_up, official_files, tmp_path) -> None:
    for name, content in official_files["dev"].items():
        path = Path(tmp_path / "copied" / "dev" / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[: len(content) // 2] if "00002" in name else content)
    (tmp_path / "copied" / "schnell").mkdir()
    (tmp_path / "copied" / "schnell" / "model_index.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"dev text_encoder_2: cannot load .*script/download"):
        set_up(FLUX_CHECKPOINT=str(tmp_path / "copied"))


# --- the end of a server


def test_a_server_whose_worker_is_lost_ends_with_an_error(official, environment) -> None:
    """So that a supervisor starts it again; Cog's own server answers for ever. The last test."""
    mark = f"HF_HOME={environment['HF_HOME']}"
    (worker,) = processes(WORKER, mark)
    os.kill(worker, signal.SIGKILL)
    assert official.server._process.wait(60) == 1
    message = re.compile(r"script/serve: (UNHEALTHY|DEFUNCT): no prediction can succeed")
    wait_for(lambda: any(map(message.search, official.server._tail)))
    assert not processes(SERVER, mark) | processes(WORKER, mark)
