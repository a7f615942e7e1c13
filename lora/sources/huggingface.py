"""Adapters on Hugging Face, through huggingface_hub: its client, its cache, no login.

The cache of huggingface_hub gives a file to anybody once it is there, also one that was fetched
with a token that is gone. So a file found there is used only after the Hub said yes to this token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self
from urllib.parse import unquote

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    scan_cache_dir,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import repo_folder_name

from lora.peft_config import check_config_size, config_of, read_settings
from lora.sources.air import read_air
from lora.sources.link import SLUG, Link
from lora.sources.reference import Access, Artifact, FetchedFile, Reference, fingerprint
from weights.download.remote import Credential
from weights.download.retry import RetryPolicy
from weights.download.transfer import Progress, sha256_of
from weights.hub import drop_leftovers, hub_call, progress_bar
from weights.serving.cancel import cancellable
from weights.serving.errors import InvalidFileError, NotFoundError
from weights.serving.settings import Settings

TIMEOUT = 10.0
COMMIT = re.compile(r"[0-9a-f]{40}")
HOSTS = {"huggingface.co", "hf.co"}
VIEWS = {"blob", "resolve", "raw", "tree"}
NOT_MODELS = {"datasets", "spaces", "collections", "papers", "docs", "models"}
USUAL_STEMS = ("pytorch_lora_weights", "lora")
MAX_LISTED = 10


@dataclass(frozen=True)
class HuggingFaceReference(Reference):
    """A repository on Hugging Face; optionally a revision, and a file or a folder in it."""

    repo: str
    revision: str | None = None
    file: str | None = None
    folder: str | None = None

    forms = (
        "huggingface.co/owner/name or hf:owner/name                  a repository with one LoRA",
        "huggingface.co/owner/name/blob/main/file.safetensors        a file of a repository",
    )

    @classmethod
    def parse(cls, link: Link) -> Self | None:
        if air := read_air(link):
            if air.source != "huggingface":
                return None
            segments = air.id.split("/")
            if len(segments) == 2:  # the format stands behind the identifier, and names no file
                segments[1] = segments[1].removesuffix(".safetensors")
            return cls._of(link, _with_revision(segments, air.version))
        if link.word[:3].lower() == "hf:":  # or hf://owner/name[@revision][/file]
            segments = [segment for segment in unquote(link.word[3:]).split("/") if segment]
            if len(segments) >= 2 and "@" in segments[1]:
                segments[1], _, revision = segments[1].partition("@")
                segments = _with_revision(segments, revision)
            return cls._of(link, segments)
        url = link.url
        is_file = url.segments[:1] in (["datasets"], ["spaces"]) and "resolve" in url.segments
        if url.host not in HOSTS or is_file:
            return None
        return cls._of(link, url.segments, url.query.get("show_file_info", [""])[0])

    @classmethod
    def _of(cls, link: Link, segments: list[str], shown: str = "") -> Self:
        """Read the path of a page; `shown` is the file that its `?show_file_info=` names."""
        if segments and segments[0] in NOT_MODELS:
            raise link.refused("of anything but a model, give the download link of a file")
        if len(segments) < 2 or not all(SLUG.fullmatch(part) for part in segments[:2]):
            raise link.refused("a repository is written huggingface.co/owner/name")
        repo, rest = "/".join(segments[:2]), segments[2:]
        if any(part in ("..", ".") for part in [*rest, *shown.split("/")]):
            raise link.refused()
        if shown:
            rest = ["blob", *(rest[1:2] if rest[:1] == ["tree"] else ["main"]), *shown.split("/")]
        if not rest:
            return cls(repo)
        if rest[0] not in VIEWS:
            return cls(repo, file=_safetensors(link, rest))
        view, *rest = rest
        if rest[:1] == ["refs"] and len(rest) >= 3:
            rest = ["/".join(rest[:3]), *rest[3:]]
        revision, *place = rest or (None,)
        if view == "tree" and not (place and place[-1].lower().endswith(".safetensors")):
            return cls(repo, revision, folder="/".join(place) or None)
        return cls(repo, revision, file=_safetensors(link, place))

    @property
    def display(self) -> str:
        place = self.file or self.folder
        if self.revision is None and place is None:
            return f"huggingface.co/{self.repo}"
        view = "blob" if self.file else "tree"
        parts = ["huggingface.co", self.repo, view, self.revision or "main", place]
        return "/".join(part for part in parts if part)

    @property
    def immutable(self) -> bool:
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    def credential(self, settings: Settings) -> Credential:
        return Credential("HF_TOKEN", settings.hf_endpoint, settings.hf_token)

    def resolve(self, access: Access, retry: RetryPolicy) -> "HubArtifact":
        """Ask the Hub for the commit and the file, in one request."""
        endpoint, token = access.settings.hf_endpoint, access.settings.hf_token
        api = HfApi(endpoint=endpoint, token=token or False)

        def ask() -> ModelInfo:
            with hub_call(self.display, token):
                return api.model_info(
                    self.repo, revision=self.revision, files_metadata=True, timeout=TIMEOUT
                )

        offline = constants.HF_HUB_OFFLINE  # it will not pass
        info = (replace(retry, attempts=1) if offline else retry).run(ask)
        files = {sibling.rfilename: sibling for sibling in info.siblings or []}
        file = files[_choose(self, list(files))]
        commit, name = info.sha or "", file.rfilename
        pin = f"huggingface {endpoint} {self.repo} {commit} {name} {fingerprint(token)}"
        config = files.get(config_of(name) or "")
        if config is not None:
            check_config_size(config.size or 0, f"huggingface.co/{self.repo}/{name}")
            pin += f" {config.rfilename}"
        prompt = info.card_data.get("instance_prompt") if info.card_data else None
        return HubArtifact(
            pin=pin,
            source=f"huggingface.co/{self.repo}/{name}",
            revision=commit[:12],
            size=file.size,
            sha256=file.lfs.sha256.lower() if file.lfs is not None else None,
            trigger_words=(prompt,) if isinstance(prompt, str) and prompt else (),
            repo=self.repo,
            commit=commit,
            file=name,
            config=config.rfilename if config else None,
        )


@dataclass(frozen=True, kw_only=True)
class HubArtifact(Artifact):
    """A file of a repository at one commit.

    Attributes:
        config: PEFT's adapter_config.json beside it.
    """

    repo: str
    commit: str
    file: str
    config: str | None = None

    @property
    def room(self) -> tuple[int, Path | None]:
        if self._is_cached(self.file):
            return 0, None
        return self.size or 0, Path(constants.HF_HUB_CACHE)

    def _is_cached(self, file: str) -> bool:
        return isinstance(try_to_load_from_cache(self.repo, file, revision=self.commit), str)

    def fetch(
        self, target: Path, access: Access, retry: RetryPolicy, on_progress: Progress
    ) -> FetchedFile:
        """Fetch the file into the cache of huggingface_hub, or find it there."""
        settings = ""
        if self.config:
            settings = read_settings(self._get(self.config, access, retry)[0], self.source)
        path, found = self._get(self.file, access, retry, on_progress)
        digest = sha256_of(path)
        if self.sha256 not in (None, digest):
            remove(path)
            raise InvalidFileError(
                f"{self.source}: the file has SHA-256 {digest}, but the Hub announces "
                f"{self.sha256}. It was damaged on the way: try again."
            )
        return FetchedFile(path, digest, in_place=True, evictable=not found, settings=settings)

    def _get(
        self, file: str, access: Access, retry: RetryPolicy, on_progress: Progress | None = None
    ) -> tuple[Path, bool]:
        """A file of the repository, and whether it was in the cache before."""
        settings = access.settings
        endpoint = settings.hf_endpoint
        token: str | bool = settings.hf_token or False

        def report(done: int, total: int | None, _: str) -> None:
            retry.check_cancelled()
            if on_progress:
                on_progress(done, total)

        found = self._is_cached(file)
        if not found:
            folder = repo_folder_name(repo_id=self.repo, repo_type="model")
            drop_leftovers(Path(constants.HF_HUB_CACHE) / folder / "blobs")

        def download() -> str:
            with hub_call(f"huggingface.co/{self.repo}/{file}", settings.hf_token):
                if found:
                    url = hf_hub_url(self.repo, file, revision=self.commit, endpoint=endpoint)
                    get_hf_file_metadata(url, token=token, timeout=TIMEOUT, endpoint=endpoint)
                return hf_hub_download(
                    self.repo,
                    file,
                    revision=self.commit,
                    endpoint=endpoint,
                    token=token,
                    tqdm_class=progress_bar(report),
                )

        return Path(cancellable(download, retry.check_cancelled)), found


def remove(path: Path) -> None:
    """Delete one file from the cache of huggingface_hub that it lies in, unless it is gone."""
    folder = next(place for place in path.parents if place.name.startswith("models--"))
    cache = scan_cache_dir(folder.parent)
    files = [
        file
        for repo in cache.repos
        for revision in repo.revisions
        for file in revision.files
        if file.file_path == path
    ]
    cache.delete_files(*files).execute()


def _with_revision(segments: list[str], revision: str | None) -> list[str]:
    """The path of the page that shows a repository, or a file of it, at a revision."""
    if not revision:
        return segments
    return [*segments[:2], "blob" if segments[2:] else "tree", revision, *segments[2:]]


def _safetensors(link: Link, place: list[str]) -> str:
    if not place or not place[-1].lower().endswith(".safetensors"):
        raise link.refused("only .safetensors files are read from Hugging Face")
    return "/".join(place)


def _choose(reference: HuggingFaceReference, names: Sequence[str]) -> str:
    """Return the file that a reference means; raises NotFoundError with the choices."""
    if reference.file is not None:
        if reference.file in names:
            return reference.file
        raise NotFoundError(
            f"{reference.display}: no such file in the repository. {_listed(reference, names)}"
        )
    inside = f"{reference.folder}/" if reference.folder else ""
    weights = [n for n in names if n.startswith(inside) and n.lower().endswith(".safetensors")]
    if len(weights) == 1:
        return weights[0]
    for stem in (*USUAL_STEMS, reference.repo.rpartition("/")[2]):
        same = sorted((n for n in weights if _plain(n) == _plain(stem)), key=_depth)
        if same and (len(same) == 1 or _depth(same[0]) < _depth(same[1])):
            return same[0]
    problem = "which of its .safetensors files is meant is unclear" if weights else "holds no LoRA"
    raise NotFoundError(f"{reference.display}: {problem}. {_listed(reference, names)}")


def _listed(reference: HuggingFaceReference, names: Sequence[str]) -> str:
    weights = [name for name in names if name.lower().endswith(".safetensors")]
    if not weights:
        return "It has no .safetensors file, and no other format is read."
    more = ", ..." if len(weights) > MAX_LISTED else ""
    example = f"huggingface.co/{reference.repo}/blob/{reference.revision or 'main'}/{weights[0]}"
    return f"It has {', '.join(weights[:MAX_LISTED])}{more}. Name one, like {example}"


def _plain(name: str) -> str:
    """A file's stem, or a repository's name, without what differs between spellings."""
    stem = PurePosixPath(name).name
    return stem.lower().removesuffix(".safetensors").replace("-", "_")


def _depth(name: str) -> int:
    return name.count("/")
