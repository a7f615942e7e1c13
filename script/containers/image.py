"""The image that cog builds of this checkout, built without the `cog` command.

The steps are those of the Dockerfile that `cog debug` prints for cog.yaml: the requirements
without cog's own lines, the newest cog below 1.0, the schema in .cog, and `COPY . /src` under
.dockerignore.
The packages are downloaded here, so that the build itself needs no network.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGE = "flux-fine-tune:check"
PACKAGES = """FROM {base}
COPY . /wheels
RUN command -v python || ln -s "$(command -v python3)" /usr/local/bin/python
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python -m pip install --no-cache-dir --no-index \\
    --find-links /wheels -r /wheels/requirements.txt cog && rm -r /wheels
"""
MODEL = """FROM {image}-packages
ENV PYTHONUNBUFFERED=1 COG_PREDICT_TYPE_STUB={stub}
WORKDIR /src
EXPOSE 5000
COPY . /src
CMD ["python", "-m", "cog.server.http"]
"""


def build(base: str) -> None:
    """Build IMAGE on a base image with Python 3.11, from what is committed."""
    with tempfile.TemporaryDirectory() as scratch:
        _build(f"{IMAGE}-packages", PACKAGES.format(base=base), _packages(Path(scratch, "wheels")))
        stub = re.search(r'^run: *"(.*)"', (ROOT / "cog.yaml").read_text(), re.MULTILINE)
        assert stub
        model = MODEL.format(image=IMAGE, stub=stub[1])
        _build(IMAGE, model, _context(Path(scratch, "context")))


def _packages(directory: Path) -> Path:
    """A directory with the wheels of the requirements, and of the newest cog."""
    directory.mkdir()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not re.match(r"(cog|coglet)==", line)]
    requirements = directory / "requirements.txt"
    requirements.write_text("\n".join(pins) + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    options = [
        "--python-version=3.11",
        "--dest",
        str(directory),
        "--requirement",
        str(requirements),
    ]
    subprocess.run([*pip, *options, "cog<1"], check=True)
    return directory


def _context(directory: Path) -> Path:
    """What cog sends to the engine: the committed files, and the schema."""
    directory.mkdir()
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", directory], input=archive, check=True)
    (directory / ".cog").mkdir()
    with (directory / ".cog" / "openapi_schema.json").open("wb") as file:
        subprocess.run([sys.executable, ROOT / "script" / "schema"], stdout=file, check=True)
    return directory


def _build(tag: str, dockerfile: str, context: Path) -> None:
    file = context.with_suffix(".Dockerfile")
    file.write_text(dockerfile)
    subprocess.run(
        ["docker", "build", "--quiet", "--file", file, "--tag", tag, context],
        stdout=subprocess.DEVNULL,
        check=True,
    )
