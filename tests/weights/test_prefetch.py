"""script/download, and where the parts of a checkpoint are then found."""

import logging
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.official import wanted
from tests.support.services import HuggingFace, tar
from weights import checkpoint
from weights.checkpoint import directory_of, fetch_missing
from weights.download.retry import RetryPolicy
from weights.manifest import REPOSITORIES
from weights.serving.errors import SourceUnavailableError
from weights.serving.settings import Settings

ROOT = Path(__file__).parent.parent.parent
DEV = REPOSITORIES["dev"]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def run(hub, official_files, tmp_path):
    huggingface = HuggingFace(hub)
    for part, repository in REPOSITORIES.items():
        gate = {"gated": True, "token": "hf_mine"} if part == "dev" else {}
        added = huggingface.add(repository.name, official_files[part], **gate)
        added.commits[repository.revision] = official_files[part]

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "FLUX_REVISIONS": "compvis=main",
            **environment,
        }
        return subprocess.run(
            [ROOT / "script" / "download", *arguments],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def files(directory: Path) -> set[str]:
    paths = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
    return {path for path in paths if not path.startswith(".")}


def test_plain_files_for_an_image_are_then_used_without_a_network(
    run, official_files, tmp_path, hub, monkeypatch, caplog
) -> None:
    target = tmp_path / "official"
    result = run("--directory", str(target), HF_TOKEN="hf_mine")
    assert result.returncode == 0, result.stderr
    assert "licence: FLUX.1 [dev] Non-Commercial License" in result.stderr
    monkeypatch.setattr(checkpoint, "EMBEDDED", target)
    settings = Settings(hf_endpoint=NOWHERE, revisions=(("compvis", "main"),))
    caplog.set_level(logging.INFO, "weights")
    for part, repository in REPOSITORIES.items():
        assert files(target / part) == wanted(official_files[part], part)
        assert directory_of(part, "official", settings) == target / part
        assert directory_of(part, str(target), settings) == target / part
        assert f"({repository.name}): licence: {repository.licence}; commit " in caplog.text
    assert f"commit {DEV.revision}" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    moved = Settings(hf_endpoint=NOWHERE, revisions=(("dev", "v2"),))
    assert directory_of("dev", "official", moved) == target / "dev"
    assert f"fetched at {DEV.revision}, and FLUX_REVISIONS asks for v2" in caplog.text
    fetched = hub.count("GET", "/cdn/")
    monkeypatch.setattr(RetryPolicy, "pause", lambda *_: None)
    (target / "schnell/.verified").unlink()
    shard = next((target / "schnell/transformer").glob("*-00002-*"))
    date = shard.stat().st_mtime
    shard.write_bytes(b"damaged")
    os.utime(shard, (date, date))  # the hub fetches what is newer than it knows
    with pytest.raises(SourceUnavailableError):
        fetch_missing(["schnell"], "official", settings)
    assert f"{target}/schnell is not used: it is incomplete" in caplog.text
    damaged = run("--directory", str(target), "schnell")
    assert damaged.returncode == 1
    assert "its hash differs" in damaged.stderr
    assert run("--directory", str(target), "schnell").returncode == 0
    assert hub.count("GET", "/cdn/") == fetched + 1


def test_a_part_for_the_cache(run, tmp_path) -> None:
    result = run("safety/falconsai")
    assert result.returncode == 0, result.stderr
    assert "complete and verified" in result.stderr
    assert [p.name for p in (tmp_path / "hf" / "hub").glob("models--*")] == [
        "models--Falconsai--nsfw_image_detection"
    ]


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (["dev"], {}, 1, f"script/download: black-forest-labs/FLUX.1-dev at {DEV.revision}"),
        (["pony"], {}, 2, "no such part: pony"),
        (["schnell"], {"HF_ENDPOINT": NOWHERE}, 1, "cannot be reached"),
        (["schnell"], {"LORA_CACHE_GB": "x"}, 1, "LORA_CACHE_GB='x'"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(run, arguments, environment, code, message) -> None:
    result = run(*arguments, **environment)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_tar_brings_the_parts_it_holds(hub, tmp_path) -> None:
    url = hub.add_file("/flux.tar", tar({"dev/model_index.json": b"{}", "schnell/x": b""}))
    settings = Settings(cache_directory=tmp_path)
    assert (directory_of("dev", url, settings) / "model_index.json").read_text() == "{}"
