"""Deployment settings from the environment."""

from pathlib import Path

import pytest

from weights.serving.settings import Settings, SettingsError


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_environment({}) == Settings()
    assert Settings.from_environment({"FLUX_CHECKPOINT": " "}) == Settings()


def test_every_variable_is_read() -> None:
    settings = Settings.from_environment(
        {
            "FLUX_CHECKPOINT": "nano",
            "FLUX_DEVICE": "cuda:1",
            "FLUX_MAX_INPUT_MEGAPIXELS": "9",
            "FLUX_DTYPE": "bfloat16",
            "FLUX_OUTPUT_DIRECTORY": "/somewhere",
            "FLUX_REVISIONS": "dev=main, compvis=refs/pr/41",
            "FLUX_NSFW_THRESHOLD": "0.25",
            "FLUX_ALLOW_DISABLE_SAFETY_CHECKER": "False",
        }
    )
    assert settings.checkpoint == "nano"
    assert settings.device == "cuda:1"
    assert settings.max_input_megapixels == 9
    assert settings.dtype == "bfloat16"
    assert settings.output_directory == Path("/somewhere")
    assert settings.revisions == (("dev", "main"), ("compvis", "refs/pr/41"))
    assert settings.nsfw_threshold == 0.25
    assert settings.allow_disable_safety_checker is False


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLUX_DTYPE", "float8"),
        ("FLUX_MAX_INPUT_MEGAPIXELS", "0"),
        ("FLUX_MAX_INPUT_MEGAPIXELS", "many"),
        ("FLUX_NSFW_THRESHOLD", "1.5"),
        ("FLUX_MAX_INPUT_MEGAPIXELS", "171"),
        ("FLUX_SAFETY_POLICY", "none"),
        ("FLUX_AT_START", "fp16"),
        ("FLUX_COMPILE", "true"),
        ("FLUX_SAFETY_POLICY", "both"),
        ("FLUX_REVISIONS", "main"),
        ("FLUX_REVISIONS", "dev="),
        ("FLUX_REVISIONS", "dev=main,pro=main"),
        ("LORA_CACHE_GB", "much"),
        ("LORA_DEVICE_MEMORY_GB", "inf"),
        ("FLUX_ALLOW_DISABLE_SAFETY_CHECKER", "perhaps"),
    ],
)
def test_a_bad_value_is_named_with_its_variable(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{variable}='{value}'"):
        Settings.from_environment({variable: value})


def test_tokens_do_not_show() -> None:
    settings = Settings.from_environment({"HF_TOKEN": "hf_x", "REPLICATE_API_TOKEN": "r8_x"})
    assert settings.hf_token == "hf_x"
    assert "_x" not in repr(settings)
