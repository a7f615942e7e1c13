"""Hugging Face, CivitAI and Replicate as far as weights need them, on top of hub.py."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.hub import Hub, Reply, Request, redirect

DEAD_XET = {  # where the Hub's own protocol would find a file: nobody listens there
    "X-Xet-Cas-Url": "http://127.0.0.1:9",
    "X-Xet-Access-Token": "xet_secret",
    "X-Xet-Token-Expiration": "4102444800",
}
CIVITAI_LOGIN = "The creator of this asset requires you to be logged in to download it"


def json_reply(value: object, status: int = 200, **headers: str) -> Reply:
    return Reply(
        json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers}
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tar(files: Mapping[str, bytes], compression: str = "") -> bytes:
    """A tar with these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@dataclass
class Repository:
    """A model repository: commits by hash, branches by name, and who may see it."""

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    announced_sha256: str | None = None
    damaged: set[str] = field(default_factory=set)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit with exactly these files and let a branch point to it."""
        text = repr([(name, sha256(content)) for name, content in sorted(files.items())])
        commit = hashlib.sha1(f"{self.name} {branch} {text}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit


class HuggingFace:
    """The Hub: model info, resolve with its headers, error codes, and storage elsewhere.

    Large files are announced for its own protocol, Xet, too, as the Hub does.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._repositories: dict[str, Repository] = {}
        hub.fallback(self._answer)

    def add(self, name: str, files: Mapping[str, bytes], **options: Any) -> Repository:
        """Add a repository; options are the fields of Repository."""
        repository = Repository(name, **options)
        repository.commit(files)
        self._repositories[name] = repository
        return repository

    def damage(self, name: str, *paths: str) -> None:
        """Serve exactly these files of a repository with other bytes than announced."""
        self._repositories[name].damaged = set(paths)

    def remove(self, name: str) -> None:
        del self._repositories[name]

    def _answer(self, request: Request) -> Reply | None:
        match request.path.strip("/").split("/"):
            case ["api", "models", owner, name, *rest]:
                return self._info(request, f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *path]:
                return self._resolve(request, f"{owner}/{name}", revision, "/".join(path))
        return None

    def _info(self, request: Request, name: str, rest: Sequence[str]) -> Reply:
        repository = self._repositories.get(name)
        if repository is None or (not repository.gated and not _allowed(repository, request)):
            return _not_found(request)
        revision = "/".join(rest[1:]) or "main"
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return json_reply(
                {"error": f"Invalid rev id: {revision}"},
                404,
                **{"X-Error-Code": "RevisionNotFound"},
            )
        if rest and rest[0] == "xet-read-token":
            return json_reply({}, **DEAD_XET)
        files = repository.commits[commit].items()
        if rest and rest[0] == "tree":
            return json_reply([_tree_entry(path, content) for path, content in files])
        siblings = [_sibling(path, content, repository.announced_sha256) for path, content in files]
        info = {"id": name, "modelId": name, "sha": commit, "cardData": repository.card}
        return json_reply({**info, "siblings": siblings, "tags": [], "private": False})

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Reply:
        repository = self._repositories.get(name)
        if repository is None:
            return _not_found(request)
        if not _allowed(repository, request):
            if not repository.gated:
                return _not_found(request)
            message = f"Access to model {name} is restricted."
            return json_reply({"error": message}, 403, **{"X-Error-Code": "GatedRepo"})
        commit = repository.branches.get(revision, revision)
        content = repository.commits.get(commit, {}).get(path)
        if content is None:
            return json_reply(
                {"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"}
            )
        served = content[::-1] if path in repository.damaged else content
        if not _is_large(path):
            headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"'}
            return Reply(served, headers=headers, ranges=True)
        digest = sha256(content)
        stored = f"/cdn/{digest}"
        self._hub.route(stored, lambda asked: _stored(asked, served))
        return redirect(
            f"{self._hub.storage_url}{stored}?Signature=secret-of-the-storage",
            **{"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"'},
            **{"X-Linked-Size": str(len(content)), "ETag": f'"{digest}"'},
            **{"X-Xet-Hash": digest, "Link": f'<{self._xet(name, commit)}>; rel="xet-auth"'},
        )

    def _xet(self, name: str, commit: str) -> str:
        return f"{self._hub.url}/api/models/{name}/xet-read-token/{commit}"


class Civitai:
    """Models, versions and downloads, with JSON errors and storage that refuses tokens."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._models: dict[int, list[dict[str, Any]]] = {}
        self._types: dict[int, str] = {}

    def add(
        self, model: int, version: int, content: bytes, *, token: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Add a version to a model, the newest so far; options replace fields of the version."""
        name = f"/api/download/models/{version}"
        file = {
            "name": f"lora-{version}.safetensors",
            "sizeKB": len(content) / 1024,
            "type": "Model",
            "metadata": {"format": "SafeTensor"},
            "hashes": {"SHA256": sha256(content).upper()},
            "primary": True,
            "downloadUrl": f"{self._hub.url}{name}",
        }
        kind = options.pop("type", "LORA")
        described = {
            "id": version,
            "name": f"v{version}",
            "baseModel": "Flux.1 D",
            "trainedWords": ["TOK"],
            "files": [file],
            **options,
        }
        versions = self._models.setdefault(model, [])
        versions.insert(0, described)
        about = {"id": model, "type": kind, "modelVersions": versions}
        single = {**described, "modelId": model, "model": {"type": kind}}
        self._hub.route(f"/api/v1/models/{model}", lambda _: json_reply(about))
        self._hub.route(f"/api/v1/model-versions/{version}", lambda _: json_reply(single))
        stored = f"/civitai-storage/{version}"
        self._hub.route(stored, lambda request: _stored(request, content))
        self._hub.route(name, lambda request: self._download(request, stored, token))
        return described

    def _download(self, request: Request, stored: str, token: str | None) -> Reply:
        if token not in (None, request.token):
            return json_reply({"error": "Unauthorized", "message": CIVITAI_LOGIN}, 401)
        return redirect(
            f"{self._hub.storage_url}{stored}?X-Amz-Signature=secret-of-the-storage", 307
        )


class Replicate:
    """Fine-tunes: a page that redirects to the trainer's tar on the delivery host."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def add(self, name: str, files: Mapping[str, bytes], version: str | None = None) -> str:
        """Serve a tar as the newest weights, and under a version; returns where it lies."""
        content = tar(files)
        path = f"/delivery/{sha256(content)[:16]}/trained_model.tar"
        self._hub.add_file(path, content)
        target = self._hub.storage_url + path
        self._hub.add_redirect(f"/{name}/_weights", target)
        if version is not None:
            self._hub.add_redirect(f"/{name}/versions/{version}/_weights", target)
        return target


def trained_on_replicate(weights: bytes, trigger: str = "TOK") -> dict[str, bytes]:
    """The members of a tar as Replicate's trainer writes it."""
    base = "output/flux_train_replicate"
    return {
        f"{base}/captions/1.txt": f"a photo of {trigger} on a BIKE".encode(),
        f"{base}/captions/2.txt": f"{trigger} in a garden".encode(),
        f"{base}/config.yaml": f"config:\n  process:\n  - trigger_word: {trigger}\n".encode(),
        f"{base}/lora.safetensors": weights,
        f"{base}/optimizer.pt": b"PK\x03\x04",
    }


def _allowed(repository: Repository, request: Request) -> bool:
    return repository.token in (None, request.token)


def _not_found(request: Request) -> Reply:
    """The Hub answers 401, without a code, to anonymous requests for what it will not show."""
    if request.token is None:
        return json_reply({"error": "Invalid username or password."}, 401)
    return json_reply({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str) -> bool:
    """Whether the Hub keeps a file in its large storage, under its SHA-256, and not in git."""
    return not path.endswith((".json", ".txt", ".md"))


def _sibling(path: str, content: bytes, announced: str | None) -> dict[str, Any]:
    sibling = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
    if not _is_large(path):
        return sibling
    pointer = {"sha256": announced or sha256(content), "size": len(content), "pointerSize": 134}
    return {**sibling, "lfs": pointer}


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "oid": git_sha1(content), "path": path, "size": len(content)}
    if not _is_large(path):
        return entry
    lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return {**entry, "lfs": lfs}


def _stored(request: Request, content: bytes) -> Reply:
    """Storage behind presigned URLs: refuses a second kind of authorization, serves ranges."""
    if request.token is not None:
        return Reply(b"<Error>Only one auth mechanism allowed</Error>", 400)
    return Reply(content, headers={"ETag": f'"{sha256(content)}"'}, ranges=True)
