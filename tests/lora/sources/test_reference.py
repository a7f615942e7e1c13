"""What users write, and what it is taken for."""

import base64
import re
from pathlib import Path

import pytest

from lora.sources import parse_reference
from lora.sources.civitai import CivitaiReference
from lora.sources.data import DataReference
from lora.sources.huggingface import HuggingFaceReference
from lora.sources.local import LocalReference
from lora.sources.replicate import ReplicateReference
from lora.sources.url import UrlReference
from weights.serving.errors import ReferenceFormatError

VERSION = "0a" * 32
COMMIT = "0b" * 20

ACCEPTED = {
    "fofr/flux-80s": ReplicateReference("fofr", "flux-80s"),
    "  Fofr/Flux-80s/ ": ReplicateReference("fofr", "flux-80s"),
    f"fofr/flux-80s/{VERSION}": ReplicateReference("fofr", "flux-80s", VERSION),
    f"fofr/flux-80s:{VERSION.upper()}": ReplicateReference("fofr", "flux-80s", VERSION),
    "fofr/0_1-webp-4-layers": ReplicateReference("fofr", "0_1-webp-4-layers"),
    "replicate.com/fofr/flux-80s": ReplicateReference("fofr", "flux-80s"),
    "https://www.Replicate.com/fofr/flux-80s?input=form#x": ReplicateReference("fofr", "flux-80s"),
    f"https://replicate.com/fofr/flux-80s/versions/{VERSION}/": ReplicateReference(
        "fofr", "flux-80s", VERSION
    ),
    f"https://replicate.com/fofr/flux-80s:{VERSION}": ReplicateReference(
        "fofr", "flux-80s", VERSION
    ),
    "https://replicate.com/fofr/flux-80s/_weights": ReplicateReference("fofr", "flux-80s"),
    "huggingface.co/Owner/Name": HuggingFaceReference("Owner/Name"),
    "HTTPS://HuggingFace.co/Owner/Name/": HuggingFaceReference("Owner/Name"),
    "hf.co/o/n": HuggingFaceReference("o/n"),
    "https://huggingface.co/o/n/tree/main": HuggingFaceReference("o/n", "main"),
    "https://huggingface.co/o/n/tree/v1/step%20500": HuggingFaceReference(
        "o/n", "v1", folder="step 500"
    ),
    "huggingface.co/o/n/blob/main/a/b.safetensors": HuggingFaceReference(
        "o/n", "main", "a/b.safetensors"
    ),
    f"https://huggingface.co/o/n/resolve/{COMMIT}/b.safetensors?download=true": (
        HuggingFaceReference("o/n", COMMIT, "b.safetensors")
    ),
    "https://huggingface.co/o/n/blob/refs/pr/3/b.safetensors": HuggingFaceReference(
        "o/n", "refs/pr/3", "b.safetensors"
    ),
    "huggingface.co/o/n/b.safetensors": HuggingFaceReference("o/n", file="b.safetensors"),
    "https://civitai.com/models/618692/flux-lora": CivitaiReference(618692),
    "civitai.com/models/618692?modelVersionId=691639": CivitaiReference(618692, 691639),
    "https://www.civitai.com/models/1/x?modelVersionId=2&token=t": CivitaiReference(1, 2, "t"),
    "https://civitai.com/api/download/models/691639?type=Model&format=SafeTensor": (
        CivitaiReference(version=691639, wanted=(("type", "Model"), ("format", "SafeTensor")))
    ),
    **{
        link: CivitaiReference(123, 456)
        for host in ("civitai.com", "civitai.red", "civitai.green")
        for link in (
            f"{host}/models/123?modelVersionId=456",
            f"www.{host}/models/123/some-name?modelVersionId=456",
            f"https://{host}/models/123?tab=x&modelVersionId=456#comments",
            f"http://www.{host}/models/123?modelVersionId=456",
        )
    },
    "civitai.red/models/123": CivitaiReference(123),
    "https://civitai.green/api/download/models/456?type=Model&format=SafeTensor&token=t": (
        CivitaiReference(
            version=456, token="t", wanted=(("type", "Model"), ("format", "SafeTensor"))
        )
    ),
    "urn:air:flux1:lora:civitai:123@456": CivitaiReference(123, 456),
    "air:flux1:lora:civitai:123@456": CivitaiReference(123, 456),
    "flux1:lora:civitai:123@456": CivitaiReference(123, 456),
    "URN:AIR:Flux1:LoRA:CivitAI:123": CivitaiReference(123),
    "flux1:lycoris:civitai:123.safetensors": CivitaiReference(123),
    "urn:air:flux1:locon:civitai:123@456.safetensors": CivitaiReference(123, 456),
    "urn:air:flux1:dora:civitai:123@456+789": CivitaiReference(123, 456, file=789),
    "urn:air:flux1:lora:civitai:123@456+789.safetensors": CivitaiReference(123, 456, file=789),
    "urn:air:flux1:lora:huggingface:o/n": HuggingFaceReference("o/n"),
    "urn:air:flux1:lora:huggingface:o/n@v1": HuggingFaceReference("o/n", "v1"),
    "flux1:lora:huggingface:o/n@main.safetensors": HuggingFaceReference("o/n", "main"),
    "urn:air:flux1:lora:huggingface:o/n/a/b.safetensors@v1": HuggingFaceReference(
        "o/n", "v1", "a/b.safetensors"
    ),
    "hf:o/n": HuggingFaceReference("o/n"),
    "hf://o/n": HuggingFaceReference("o/n"),
    "hf://o/n/a/b.safetensors": HuggingFaceReference("o/n", file="a/b.safetensors"),
    "hf://o/n@v1/b.safetensors": HuggingFaceReference("o/n", "v1", "b.safetensors"),
    "hf:o/n@v1": HuggingFaceReference("o/n", "v1"),
    "https://huggingface.co/o/n?show_file_info=b.safetensors": HuggingFaceReference(
        "o/n", "main", "b.safetensors"
    ),
    "https://huggingface.co/o/n/tree/v1?show_file_info=a%2Fb.safetensors": HuggingFaceReference(
        "o/n", "v1", "a/b.safetensors"
    ),
    "huggingface.co/o/n/tree/main/folder": HuggingFaceReference("o/n", "main", folder="folder"),
    **{
        f"https://replicate.com/o/n/{tab}": ReplicateReference("o", "n")
        for tab in ("api", "api/schema", "playground", "examples", "readme", "versions", "train")
    },
    f"replicate.com/o/n/versions/{VERSION}/api": ReplicateReference("o", "n", VERSION),
    "replicate.com/api/train": ReplicateReference("api", "train"),
    "https://host.example/a/lora.safetensors": UrlReference(
        "https://host.example/a/lora.safetensors"
    ),
    "https://host.example/LORA.SAFETENSORS?X-Amz-Signature=s": UrlReference(
        "https://host.example/LORA.SAFETENSORS?X-Amz-Signature=s"
    ),
    "https://host.example/get?file=lora.safetensors&sig=s": UrlReference(
        "https://host.example/get?file=lora.safetensors&sig=s"
    ),
    "replicate.delivery/xezq/trained_model.tar": UrlReference(
        "https://replicate.delivery/xezq/trained_model.tar"
    ),
    "huggingface.co/datasets/o/n/resolve/main/x.safetensors": UrlReference(
        "https://huggingface.co/datasets/o/n/resolve/main/x.safetensors"
    ),
    "https://www.dropbox.com/scl/fi/a1/x.safetensors?rlkey=k&st=s&dl=0": UrlReference(
        "https://www.dropbox.com/scl/fi/a1/x.safetensors?rlkey=k&st=s&dl=1"
    ),
    "dropbox.com/s/a1/x.tar": UrlReference("https://dropbox.com/s/a1/x.tar?dl=1"),
    "https://github.com/o/n/blob/main/blob/x.safetensors": UrlReference(
        "https://github.com/o/n/raw/main/blob/x.safetensors"
    ),
    "https://github.com/o/n/releases/download/v1/x.safetensors": UrlReference(
        "https://github.com/o/n/releases/download/v1/x.safetensors"
    ),
    "http://host.example:8080/x.tar#top": UrlReference("http://host.example:8080/x.tar"),
}

REFUSED = [
    "",
    "   ",
    "name",
    "a photo of a cat",
    "owner/name/version",
    "owner/na me",
    "../../etc/passwd",
    "https://",
    "https://host.example/",
    "https://host.example/lora.bin",
    "https://host.example:port/x.safetensors",
    "https://[bad/x.safetensors",
    "ftp://host.example/x.safetensors",
    "huggingface.co/name",
    "huggingface.co/datasets/o/n",
    "huggingface.co/datasets/o/n/blob/main/x.safetensors",
    "huggingface.co/datasets/o/n/resolve/main/x.bin",
    "huggingface.co/o/n/blob/main/pickle.bin",
    "huggingface.co/o/n/blob/main",
    "huggingface.co/o/n/resolve/main/../x.safetensors",
    "civitai.com/models/abc",
    "civitai.com/models/123?modelVersionId=abc",
    "civitai.com/user/somebody",
    "civitai.red/models/abc",
    "civitai.org/models/1",
    "urn:air:flux1:lora:civitai",
    "urn:air:flux1:lora:civitai:abc",
    "urn:air:flux1:lora:civitai:123@abc",
    "hf:name",
    "hf://o/n/pickle.bin",
    "https://huggingface.co/o/n?show_file_info=pickle.bin",
    "https://huggingface.co/o/n?show_file_info=../b.safetensors",
    "owner/name/api",
    "data:application/x-tar;base64",
    "data:application/x-tar;base64,????",
    "/weights/lora.safetensors",
    "file:///weights/lora.safetensors",
]


@pytest.mark.parametrize(("text", "reference"), ACCEPTED.items())
def test_accepted(text, reference):
    assert parse_reference(text) == reference


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_the_accepted_forms(text):
    with pytest.raises(ReferenceFormatError, match=re.escape("huggingface.co/owner/name")):
        parse_reference(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("urn:air:sdxl:lora:civitai:123@456", "it is for sdxl, and adapters for flux1 are read"),
        ("flux1:checkpoint:civitai:123", "it is of type checkpoint, and adapters are of type lora"),
        ("urn:air:flux1:embedding:civitai:123", "it is of type embedding"),
        ("urn:air:flux1:lora:openai:123", "openai is not a source; civitai and huggingface are"),
        ("<lora:name:0.8>", "this is prompt syntax, and a link to the LoRA is needed"),
        ("(photo:1.2)", "this is prompt syntax"),
        ("<lora:my style:1> a cat", "this is prompt syntax"),
    ],
)
def test_the_reason_of_a_refusal(text, reason):
    with pytest.raises(ReferenceFormatError, match=re.escape(f" as an adapter: {reason}")):
        parse_reference(text)


def test_model_id_and_version_id_of_civitai_are_not_mixed_up():
    page = parse_reference("civitai.com/models/77")
    download = parse_reference("civitai.com/api/download/models/77")
    assert (page.model, page.version) == (77, None)
    assert (download.model, download.version) == (None, 77)
    assert page.key != download.key


def test_data_uri_holds_the_file():
    encoded = base64.b64encode(b"\0weights\xff").decode()
    reference = parse_reference(f"data:application/octet-stream;base64,{encoded}")
    assert reference == DataReference(b"\0weights\xff", "application/octet-stream")
    assert reference.immutable


def test_local_paths_only_when_allowed():
    for text in ("/weights/lora.safetensors", "file:///weights/lora.safetensors"):
        reference = parse_reference(text, allow_local_paths=True)
        assert reference == LocalReference(Path("/weights/lora.safetensors"))


@pytest.mark.parametrize(
    ("text", "immutable"),
    [
        ("o/n", False),
        (f"o/n:{VERSION}", True),
        ("huggingface.co/o/n", False),
        ("huggingface.co/o/n/tree/main", False),
        (f"huggingface.co/o/n/tree/{COMMIT}", True),
        ("civitai.com/models/1", False),
        ("civitai.com/models/1?modelVersionId=2", True),
        ("https://host.example/x.safetensors", False),
    ],
)
def test_only_a_named_version_is_for_ever(text, immutable):
    assert parse_reference(text).immutable is immutable


@pytest.mark.parametrize(
    "text",
    [
        "https://user:secret@host.example/x.safetensors",
        "https://user:secret@proxy.example/https://host.example/x.safetensors",
        "https://host.example/x.safetensors?X-Amz-Signature=secret",
        "https://host.example/x.safetensors?a=1#secret",
        "https://civitai.com/models/1?token=secret",
        "https://civitai.com/api/download/models/1?token=secret",
        "https://civitai.red/api/download/models/1?token=secret",
        "huggingface.co/o/n?token=secret",
    ],
)
def test_nothing_shown_holds_a_secret(text):
    reference = parse_reference(text)
    assert "secret" not in reference.display
    assert "secret" not in repr(reference)


def test_an_identifier_is_shown_whole():
    text = "urn:air:sdxl:lora:civitai:123@456"
    with pytest.raises(ReferenceFormatError, match=f"^Cannot read '{text}' as an adapter"):
        parse_reference(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://user:secret@host.example/x.bin",
        "https://user:secret@proxy.example/https://host.example/x.bin",
        "https://proxy.example/https://user:secret@host.example/x.bin",
        "https://host.example/x.bin?sig=secret",
        "user:secret@host.example/x.bin",
    ],
)
def test_errors_hold_no_secret(text):
    with pytest.raises(ReferenceFormatError) as caught:
        parse_reference(text)
    assert "secret" not in str(caught.value)
