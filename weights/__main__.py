"""Fetch and verify the official files ahead of time: `python -m weights`, or script/download."""

import argparse
import logging
import os
import sys
from pathlib import Path

from weights.checkpoint import wanted
from weights.hub import HTTP_CLIENT
from weights.manifest import REPOSITORIES
from weights.repository import HubSettings
from weights.serving.errors import WeightsError
from weights.serving.settings import Settings, SettingsError
from weights.snapshot import fetch_snapshots


def main() -> int:
    """Fetch the parts named on the command line; returns the exit code."""
    name = os.environ.get("FLUX_COMMAND", "python -m weights")  # script/download gives its own
    parser = argparse.ArgumentParser(
        prog=name,
        description="Fetch and verify the official checkpoints and safety checkers. Settings are "
        "environment variables: HF_TOKEN, HF_HOME, HF_ENDPOINT, FLUX_REVISIONS",
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(REPOSITORIES)}; default: all")
    parser.add_argument(
        "--directory",
        type=Path,
        help="where to put plain files (weights/official for an image); "
        "default: the cache of huggingface_hub (HF_HOME)",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(REPOSITORIES):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger(HTTP_CLIENT).setLevel(logging.WARNING)
    try:
        _fetch(arguments.parts or list(REPOSITORIES), arguments.directory)
    except (WeightsError, SettingsError) as error:
        logging.getLogger(__name__).error("%s: %s", name, error)
        return 1
    return 0


def _fetch(parts: list[str], directory: Path | None) -> None:
    settings = Settings.from_environment()
    everything = [wanted(part, settings, directory and directory / part) for part in parts]
    fetch_snapshots(everything, HubSettings.of(settings))


if __name__ == "__main__":
    sys.exit(main())
