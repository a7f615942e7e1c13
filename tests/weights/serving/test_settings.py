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
    ("variable", "value", "expected"),
    [
        ("FLUX_DTYPE", "float8", "one of auto, bfloat16, float32"),
        ("FLUX_MAX_INPUT_MEGAPIXELS", "0", "a whole number from 1 to 170"),
        ("FLUX_MAX_INPUT_MEGAPIXELS", "many", "a whole number from 1 to 170"),
        ("FLUX_MAX_INPUT_MEGAPIXELS", "171", "a whole number from 1 to 170"),
        ("FLUX_MAX_INPUT_MEGAPIXELS", "64.5", "a whole number from 1 to 170"),
        ("FLUX_NSFW_THRESHOLD", "1.5", "a number from 0 to 1"),
        ("FLUX_NSFW_THRESHOLD", "nan", "a number from 0 to 1"),
        ("FLUX_SAFETY_POLICY", "none", "one of auto, official"),
        ("FLUX_AT_START", "fp16", "one of all, bf16, fp8"),
        ("FLUX_COMPILE", "true", "one of auto, on, off"),
        ("FLUX_SAFETY_POLICY", "both", "one of auto, official"),
        ("FLUX_REVISIONS", "main", "NAME=REVISION,..."),
        ("FLUX_REVISIONS", "dev=", "NAME=REVISION,..."),
        ("FLUX_REVISIONS", "dev=main,pro=main", "NAME=REVISION,..."),
        ("LORA_CACHE_GB", "much", "gigabytes as a number of at least 0"),
        ("LORA_CACHE_GB", '"50"', "gigabytes as a number of at least 0"),
        ("LORA_DEVICE_MEMORY_GB", "inf", "gigabytes as a number of at least 0"),
        ("LORA_DEVICE_MEMORY_GB", "-1", "gigabytes as a number of at least 0"),
        ("FLUX_ALLOW_DISABLE_SAFETY_CHECKER", "perhaps", "true or false"),
        ("HF_ENDPOINT", "hf-mirror.com", "a URL that begins with https://"),
        ("CIVITAI_ENDPOINT", "ftp://mirror", "a URL that begins with https://"),
    ],
)
def test_a_bad_value_is_named_with_what_is_expected(
    variable: str, value: str, expected: str
) -> None:
    with pytest.raises(SettingsError) as error:
        Settings.from_environment({variable: value})
    assert str(error.value).startswith(f"{variable}={value!r}: expected {expected}")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("HF_TOKEN", "geheim_ü", "a token of printable ASCII"),
        ("HF_ENDPOINT", "me:geheim@mirror.example", "a URL that begins"),
    ],
)
def test_a_bad_secret_is_named_and_does_not_show(variable, value, expected) -> None:
    with pytest.raises(SettingsError, match=f"^{variable}: expected {expected}"):
        Settings.from_environment({variable: value})


def test_tokens_do_not_show() -> None:
    settings = Settings.from_environment({"HF_TOKEN": "hf_x", "REPLICATE_API_TOKEN": "r8_x"})
    assert settings.hf_token == "hf_x"
    assert "_x" not in repr(settings)
