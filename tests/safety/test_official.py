"""The official checkers on miniature checkpoints of the real classes, with planted weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification

from safety import official
from safety.checker import CheckerError, Verdict, judge
from safety.official import CompVis, Falconsai
from safety.policy import POLICIES, load_checker
from tests.support.pictures import colours
from tests.support.planted import clip_input, compvis_model, embedding, plant, plant_flags
from weights.serving.inventory import Inventory
from weights.serving.settings import Settings

CPU = torch.device("cpu")
COMPVIS_FLAGS = {0, 1}
FALCONSAI_FLAGS = {1, 2}
WITHHELD = {
    "official": {1},
    "any": {0, 1, 2},
    "compvis": {0, 1},
    "falconsai": {1, 2},
}


@pytest.fixture(scope="module")
def pictures(photograph) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (200, 320, 3)).astype(np.uint8)
    return [photograph, colours(300, 180), Image.fromarray(noise), colours(64, 256, shift=100)]


@pytest.fixture(scope="module")
def planted(official_files, pictures, tmp_path_factory) -> Path:
    """A checkpoint directory whose checkers flag COMPVIS_FLAGS and FALCONSAI_FLAGS."""
    root = tmp_path_factory.mktemp("planted")
    plant_flags(root, official_files, pictures, COMPVIS_FLAGS, FALCONSAI_FLAGS)
    return root


def load(root: Path, policy: str, **settings: object):
    chosen = replace(Settings(), safety_policy=policy, **settings)
    return load_checker(chosen, str(root), CPU, Inventory())


# --- policies


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", WITHHELD)
def test_each_policy_withholds_what_it_says(planted, pictures, policy, count) -> None:
    checker = load(planted, policy)
    flagged = {i for i, picture in enumerate(pictures[:count]) if judge(checker, picture).flagged}
    assert flagged == WITHHELD[policy] & set(range(count))


def test_scores_say_who_was_asked(planted, pictures) -> None:
    assert set(load(planted, "official").check(pictures[0]).scores) == {"compvis", "falconsai"}
    assert set(load(planted, "official").check(pictures[3]).scores) == {"compvis"}
    assert set(load(planted, "any").check(pictures[3]).scores) == {"compvis", "falconsai"}


def test_auto_takes_the_checkers_that_a_checkpoint_brings(planted, tmp_path, caplog) -> None:
    picture = colours(64, 64)
    assert "compvis" in load(planted, "auto").check(picture).scores
    assert set(load(tmp_path, "auto").check(picture).scores) == {"open_nsfw"}
    assert "brings no safety checkers" in caplog.text
    caplog.clear()
    nano = load_checker(Settings(), "nano", CPU, Inventory())
    assert set(nano.check(picture).scores) == {"open_nsfw"}
    assert set(load(tmp_path, "open_nsfw").check(picture).scores) == {"open_nsfw"}
    assert "brings no safety checkers" not in caplog.text


# --- the libraries' own answers


def test_compvis_flags_what_the_class_itself_flags(planted, pictures, tmp_path) -> None:
    """Also with a special concept seen, which lowers the bar of all others by 0.01."""
    directory = shutil.copytree(planted / "safety/compvis", tmp_path / "compvis")
    views = torch.stack([embedding(directory, picture) for picture in pictures])
    flags = []
    for special in (2.0, float((views[0] @ views[2]) - 0.001)):
        care = {"special_care_embeds": views[2].repeat(3, 1)}
        plant(directory, **care, special_care_embeds_weights=torch.full((3,), special))
        for margin in (-0.02, -0.005, -0.0003, 0.0003, 0.005, 0.02):  # the class rounds to 0.001
            cosine = float(views[0] @ views[1])
            thresholds = torch.full((17,), 2.0)
            thresholds[0] = cosine + margin
            plant(directory, concept_embeds_weights=thresholds)
            for picture in pictures:
                theirs = compvis_model(directory)(
                    clip_input(directory, picture), [np.ones((2, 2, 3))]
                )[1][0]
                ours = CompVis(directory, CPU).check(picture)
                assert ours.flagged == theirs
                flags.append(theirs)
    assert {True, False} == set(flags)


def test_falconsai_scores_as_transformers_itself(planted, pictures) -> None:
    directory = planted / "safety/falconsai"
    model = ViTForImageClassification.from_pretrained(directory)
    for picture in pictures:
        small = np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR), np.float32)
        pixels = torch.from_numpy(small / 255 * 2 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits = model(pixels).logits
        theirs = float(logits.softmax(-1)[0, 1])
        ours = Falconsai(directory, CPU).check(picture).scores["falconsai"]
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_picture_is_left_as_it_is(planted, pictures) -> None:
    before = [picture.tobytes() for picture in pictures]
    checker = load(planted, "any")
    assert [checker.check(picture).flagged for picture in pictures] == [True, True, True, False]
    assert [picture.tobytes() for picture in pictures] == before


def test_float16_as_on_a_card_gives_the_same_flags(planted, pictures, monkeypatch) -> None:
    expected = [load(planted, "any").check(picture) for picture in pictures]
    monkeypatch.setitem(official.DTYPES, "cpu", torch.float16)
    checker = load(planted, "any")
    found = [checker.check(picture) for picture in pictures]
    assert [verdict.flagged for verdict in found] == [verdict.flagged for verdict in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=0.002)
    assert found != expected  # float16 did compute


# --- fail closed


@pytest.mark.parametrize("policy", ["falconsai", "any"])
def test_a_score_that_is_no_number_withholds(planted, pictures, tmp_path, policy) -> None:
    root = shutil.copytree(planted, tmp_path / "broken")
    plant(root / "safety/falconsai", **{"classifier.bias": torch.full((2,), float("nan"))})
    assert all(judge(load(root, policy), picture).flagged for picture in pictures)


def test_what_a_broken_second_checker_cannot_clear_is_withheld(planted, pictures, tmp_path) -> None:
    root = shutil.copytree(planted, tmp_path / "broken")
    plant(root / "safety/falconsai", **{"classifier.bias": torch.full((2,), float("nan"))})
    checker = load(root, "official")
    assert [judge(checker, picture).flagged for picture in pictures] == [True, True, False, False]


def test_a_nan_of_the_first_checker_withholds(planted, pictures, tmp_path) -> None:
    root = shutil.copytree(planted, tmp_path / "broken")
    plant(root / "safety/compvis", concept_embeds_weights=torch.full((17,), float("nan")))
    for policy in ("compvis", "official", "any"):
        assert judge(load(root, policy), pictures[3]).flagged


def test_a_checker_that_raises_withholds(planted, pictures, monkeypatch) -> None:
    def broken(*_: object) -> Verdict:
        raise RuntimeError("out of memory")

    checker = load(planted, "official")
    monkeypatch.setattr(Falconsai, "check", broken)
    assert [judge(checker, picture).flagged for picture in pictures] == [True, True, False, False]


# --- what cannot be loaded


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def lose_a_weight(path: Path) -> None:
    save_file({k: v for k, v in load_file(path).items() if "proj" not in k}, path)


@pytest.mark.parametrize("damage", [remove, truncate, lose_a_weight])
@pytest.mark.parametrize("name", ["compvis", "falconsai"])
def test_a_damaged_checker_is_never_left_out(planted, tmp_path, name, damage) -> None:
    root = shutil.copytree(planted, tmp_path / "damaged")
    damage(root / "safety" / name / "model.safetensors")
    with pytest.raises(CheckerError, match=rf"Safety checker {name}: cannot load .*open_nsfw"):
        load(root, "official")


@pytest.mark.parametrize("name", ["compvis", "falconsai"])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "config.json"])
def test_a_checker_without_a_configuration_is_refused(planted, tmp_path, name, file) -> None:
    root = shutil.copytree(planted, tmp_path / "damaged")
    remove(root / "safety" / name / file)
    with pytest.raises(CheckerError, match=rf"Safety checker {name}: cannot load .*open_nsfw"):
        load(root, "official")


def test_a_classifier_without_the_label_is_refused(planted, tmp_path) -> None:
    root = shutil.copytree(planted, tmp_path / "relabelled")
    config = root / "safety/falconsai/config.json"
    config.write_text(config.read_text().replace('"nsfw"', '"porn"'))
    with pytest.raises(CheckerError, match="no label nsfw among normal, porn"):
        load(root, "falconsai")


def test_every_policy_can_be_set() -> None:
    for policy in POLICIES:
        assert Settings.from_environment({"FLUX_SAFETY_POLICY": policy}).safety_policy == policy
