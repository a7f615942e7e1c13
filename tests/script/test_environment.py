"""script/setup: the interpreter that it finds, and where the environment is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ANSWER = "import platform; print(platform.python_version())"
LARGE = 10 << 20  # what `cog build --separate-weights` takes for a weight


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return empty_checkout(tmp_path)


@pytest.fixture
def interpreters(tmp_path: Path) -> Path:
    return unfit_interpreters(tmp_path)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A checkout with an environment, in place of one that an earlier version made.

    The tools' environment goes with it: it may be another Python's.
    """
    root = tmp_path_factory.mktemp("installed")
    checkout, interpreters = empty_checkout(root), unfit_interpreters(root)
    program(interpreters / "python3.12", f'exec {sys.executable} "$@"')
    tools = checkout / ".cog" / "dev" / "bin"
    for old in (checkout / ".venv" / "bin", tools):
        old.mkdir(parents=True)
        program(old / "python", "exit 0")
    result = setup(checkout, interpreters)
    assert result.returncode == 0, result.stderr
    assert f"script/setup: using {interpreters}/python3.12, Python 3.1" in result.stderr
    assert not tools.exists()
    return checkout


def empty_checkout(root: Path) -> Path:
    """A checkout whose requirements are empty, so that an environment takes seconds."""
    directory = root / "checkout"
    (directory / "script").mkdir(parents=True)
    shutil.copy(ROOT / "script" / "setup", directory / "script")
    (directory / "requirements.txt").touch()
    return directory


def unfit_interpreters(root: Path) -> Path:
    """A directory of programs named like Python, none of which fits."""
    directory = root / "bin"
    directory.mkdir()
    program(directory / "python3.11", "echo 'python3.11: command not found' >&2; exit 127")
    program(directory / "python3.12", f'[ "$2" = "{ANSWER}" ] && echo 3.12.4')  # but no venv
    program(directory / "python3", "echo 3.13.1")
    return directory


def packages(environment: Path) -> Path:
    (directory,) = environment.glob("lib/python3.*/site-packages")
    return directory


def program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def setup(
    checkout: Path, interpreters: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [checkout / "script" / "setup", *arguments],
        env={"PATH": f"{interpreters}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_fitting_interpreter_it_says_what_there_is(checkout, interpreters) -> None:
    result = setup(checkout, interpreters)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "script/setup: needs Python 3.11 or 3.12, with its venv module. Found:",
        f"  python3.11: {interpreters}/python3.11 does not run",
        f"  python3.12: {interpreters}/python3.12 is Python 3.12.4 without venv "
        "(Debian, Ubuntu: apt install python3-venv)",
        f"  python3: {interpreters}/python3 is Python 3.13.1",
    ]
    assert not (checkout / ".venv").exists()


def test_the_second_run_does_nothing(installed, interpreters) -> None:
    assert (installed / ".venv").readlink() == Path(".cog/venv")
    result = setup(installed, interpreters)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_fleet_has_an_environment_of_its_own(installed, interpreters) -> None:
    (installed / "requirements-fleet.txt").write_text("# Ray\n")
    result = setup(installed, interpreters, "fleet", PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert "Installing requirements-fleet.txt" in result.stderr
    assert (installed / ".cog" / "fleet" / "bin" / "python").exists()
    assert (installed / ".venv").readlink() == Path(".cog/venv")
    assert not (installed / ".venv" / "installed-requirements-fleet.txt").exists()
    assert setup(installed, interpreters, "fleet").stderr == ""


def test_tools_find_what_is_served_but_not_the_other_way_round(installed, interpreters) -> None:
    (installed / "requirements-dev.txt").write_text("# tools\n")
    result = setup(installed, interpreters, "dev")
    assert (result.returncode, result.stderr.count("Installing requirements-dev.txt")) == (0, 1)
    assert setup(installed, interpreters, "dev").stderr == ""
    (packages(installed / ".cog" / "dev") / "tool.py").touch()
    (packages(installed / ".venv") / "library.py").touch()
    for environment, module, code in [
        (".cog/dev", "tool", 0),
        (".cog/dev", "library", 0),
        (".venv", "library", 0),
        (".venv", "tool", 1),
    ]:
        command = [installed / environment / "bin" / "python", "-c", f"import {module}"]
        found = subprocess.run(command, capture_output=True, check=False)
        assert found.returncode == code, (environment, module)


def test_cog_build_copies_no_environment(installed, interpreters) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for kind in ("dev", "fleet"):
        (installed / f"requirements-{kind}.txt").touch()
        assert setup(installed, interpreters, kind, PYTHON=sys.executable).returncode == 0
    made = [path for path in (installed / ".cog").iterdir() if path.is_dir()]
    assert len(made) == 3
    assert {str(path.relative_to(installed)) for path in made} <= set(ignored)


def test_an_environment_that_holds_the_tools_too_is_made_again(checkout, interpreters) -> None:
    """An earlier version made it so."""
    for name in ("venv", "dev"):
        python = checkout / ".cog" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        program(python, "exit 0")
    (checkout / ".venv").symlink_to(".cog/venv")
    (checkout / ".venv" / "installed-requirements-dev.txt").touch()
    fits = interpreters / "fits"
    answers = f'[ "$2" = "{ANSWER}" ] && echo 3.12.4'
    program(fits, f'if [ "$1" = -c ]; then {answers}; exit 0; fi; echo "$@" >&2; exit 3')
    result = setup(checkout, interpreters, PYTHON=str(fits))
    assert result.returncode == 3
    assert result.stderr.endswith("-m venv --clear .cog/venv\n")
    assert not (checkout / ".cog" / "dev").exists()


def test_tools_of_another_list_are_installed_anew(installed, interpreters) -> None:
    """What left the list would hide what is served."""
    (installed / "requirements-dev.txt").touch()
    assert setup(installed, interpreters, "dev").returncode == 0
    (packages(installed / ".cog" / "dev") / "left.py").touch()
    (installed / "requirements-dev.txt").write_text("# another\n")
    assert setup(installed, interpreters, "dev").returncode == 0
    assert not (packages(installed / ".cog" / "dev") / "left.py").exists()


def test_python_names_the_only_interpreter_to_try(checkout, interpreters) -> None:
    result = setup(checkout, interpreters, PYTHON=f"{interpreters}/python3")
    assert result.returncode == 1
    name = interpreters / "python3"
    assert result.stderr.splitlines()[1:] == [f"  {name}: {name} is Python 3.13.1"]
    absent = setup(checkout, interpreters, PYTHON="/absent/python")
    assert absent.stderr.splitlines()[1:] == ["  /absent/python: not found on PATH"]


def test_cog_finds_the_weights_and_nothing_else(installed) -> None:
    """`cog build --separate-weights` copies what it finds, which must not be the environment.

    Its rule (replicate/cog, pkg/weights/weights.go): a directory that holds a file of 10 MiB or
    more, and no .py or .ipynb below it; links are not followed, .dockerignore is not read, and only
    paths that begin with .cog, .git or __pycache__ are passed over.
    """
    official = installed / "weights" / "official" / "dev" / "transformer"
    for directory in (official, installed / ".venv" / "lib" / "torch"):
        directory.mkdir(parents=True)
        with (directory / "large.bin").open("wb") as file:
            file.truncate(LARGE)
    files = [path.relative_to(installed) for path in installed.rglob("*") if not path.is_dir()]
    large = [path for path in files if (installed / path).lstat().st_size >= LARGE]
    assert len(large) == 2
    seen = [path for path in large if not str(path).startswith((".cog", ".git", "__pycache__"))]
    code = [str(path) for path in files if path.suffix in (".py", ".ipynb")]
    found = {path.parent for path in seen if not any(c.startswith(str(path.parent)) for c in code)}
    assert found == {official.relative_to(installed)}
