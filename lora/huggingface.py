"""Adapters on Hugging Face, through huggingface_hub: its client, its cache, no login.

The cache of huggingface_hub gives a file to anybody once it is there, also one that was fetched
with a token that is gone. So a file found there is used only after the Hub said yes to this token.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    scan_cache_dir,
    try_to_load_from_cache,
)
from huggingface_hub.hf_api import RepoSibling

from lora.artifact import Artifact, Fetched, HubFile
from lora.reference import HuggingFaceReference
from lora.settings import SourceSettings
from weights.download import Progress, sha256_of
from weights.errors import InvalidFileError, NotFoundError
from weights.hub import discreet, progress_bar, translated
from weights.retry import RetryPolicy

_TIMEOUT = 10.0
_USUAL_STEMS = ("pytorch_lora_weights", "lora")
_MAX_LISTED = 10


def resolve(reference: HuggingFaceReference, settings: SourceSettings) -> Artifact:
    """Ask the Hub for the commit and the file of a reference, in one request."""
    api = HfApi(endpoint=settings.hf_endpoint, token=settings.hf_token or False)
    with translated(reference.display, settings.hf_token), discreet():
        info = api.model_info(
            reference.repo, revision=reference.revision, files_metadata=True, timeout=_TIMEOUT
        )
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    file = files[_choose(reference, list(files))]
    commit = info.sha or ""
    prompt = info.card_data.get("instance_prompt") if info.card_data else None
    return Artifact(
        pin=f"huggingface {settings.hf_endpoint} {reference.repo} {commit} {file.rfilename}",
        source=f"huggingface.co/{reference.repo}/{file.rfilename}",
        revision=commit[:12],
        location=HubFile(reference.repo, commit, file.rfilename),
        size=file.size,
        sha256=_sha256(file),
        trigger_words=(prompt,) if isinstance(prompt, str) and prompt else (),
    )


def download(
    artifact: Artifact,
    location: HubFile,
    settings: SourceSettings,
    retry: RetryPolicy,
    on_progress: Progress,
) -> Fetched:
    """Fetch a file into the cache of huggingface_hub, or find it there, and verify it."""
    repo, file, commit = location.repo, location.file, location.commit
    token: str | bool = settings.hf_token or False

    def report(done: int, total: int | None, _: str) -> None:
        retry.check_cancelled()
        on_progress(done, total)

    there = try_to_load_from_cache(repo, file, settings.hf_cache_dir, commit)
    with translated(artifact.source, settings.hf_token), discreet():
        if isinstance(there, str):
            url = hf_hub_url(repo, file, revision=commit, endpoint=settings.hf_endpoint)
            get_hf_file_metadata(url, token=token, timeout=_TIMEOUT, endpoint=settings.hf_endpoint)
        found = hf_hub_download(
            repo,
            file,
            revision=commit,
            cache_dir=settings.hf_cache_dir,
            endpoint=settings.hf_endpoint,
            token=token,
            tqdm_class=progress_bar(report),
        )
    path = Path(found)
    digest = sha256_of(path)
    if artifact.sha256 not in (None, digest):
        remove(path, settings.hf_cache_dir)
        raise InvalidFileError(
            f"{artifact.source}: the file has SHA-256 {digest}, but the Hub announces "
            f"{artifact.sha256}. It was damaged on the way: try again."
        )
    return Fetched(path, digest, in_place=True, evictable=not isinstance(there, str))


def remove(path: Path, cache_dir: Path | None = None) -> None:
    """Delete one file from the cache of huggingface_hub, unless it is gone already."""
    cache = scan_cache_dir(cache_dir)
    files = [
        file
        for repo in cache.repos
        for revision in repo.revisions
        for file in revision.files
        if file.file_path == path
    ]
    cache.delete_files(*files).execute()


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
    for stem in (*_USUAL_STEMS, reference.repo.rpartition("/")[2]):
        same = sorted((n for n in weights if _plain(n) == _plain(stem)), key=_depth)
        if same and (len(same) == 1 or _depth(same[0]) < _depth(same[1])):
            return same[0]
    problem = "which of its .safetensors files is meant is unclear" if weights else "holds no LoRA"
    raise NotFoundError(f"{reference.display}: {problem}. {_listed(reference, names)}")


def _listed(reference: HuggingFaceReference, names: Sequence[str]) -> str:
    weights = [name for name in names if name.lower().endswith(".safetensors")]
    if not weights:
        return "It has no .safetensors file, and no other format is read."
    more = ", ..." if len(weights) > _MAX_LISTED else ""
    example = f"huggingface.co/{reference.repo}/blob/{reference.revision or 'main'}/{weights[0]}"
    return f"It has {', '.join(weights[:_MAX_LISTED])}{more}. Name one, like {example}"


def _plain(name: str) -> str:
    """A file's stem, or a repository's name, without what differs between spellings."""
    stem = PurePosixPath(name).name
    return stem.lower().removesuffix(".safetensors").replace("-", "_")


def _depth(name: str) -> int:
    return name.count("/")


def _sha256(file: RepoSibling) -> str | None:
    return file.lfs.sha256.lower() if file.lfs is not None else None
