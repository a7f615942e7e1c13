"""Run a command on an imitated card; see docs/gpu.md. The command behind script/imitate-card.

torch, Triton and the compiler are the real ones, and find an H200. Only what they load is replaced:
the driver, the CUDA runtime, cuBLAS and cuDNN, which are compiled from this folder.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE.parent.parent / ".cog" / "imitation"
SOURCES = {  # by what the library's name begins with
    "libcudart.so": ("memory.c", "device.c"),
    "libcublas.so": ("libraries.c",),
    "libcublasLt.so": ("libraries.c",),
    "libcudnn.so": ("libraries.c",),
}
DRIVER = "libcuda.so.1"
OPERATORS = "operators.so"
HEADERS = ("nvidia/cu*/include", "triton/backends/nvidia/include")  # the first lack crt/
NOT_SUPPORTED = 801  # cudaErrorNotSupported: of functions of the runtime that are not here
SUCCEED = {  # functions of the runtime that have nothing to do, and give nothing back
    "__cudaLaunchKernel",
    "__cudaRegisterFatBinaryEnd",
    "__cudaRegisterFunction",
    "__cudaRegisterVar",
    "__cudaUnregisterFatBinary",
    "cudaFuncSetAttribute",
    "cudaKernelSetAttributeForDevice",
    "cudaLaunchCooperativeKernel",
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cudaProfilerStart",
    "cudaProfilerStop",
    "cudaThreadExchangeStreamCaptureMode",
}


def main() -> None:
    """Build what is not built yet, and become the command."""
    if len(sys.argv) == 1:
        sys.exit("usage: script/imitate-card COMMAND [ARGUMENT ...]")
    if not (site := _with_cuda()):
        sys.exit("script/imitate-card: this torch is built without CUDA; PyPI's is built with it")
    try:
        built = build(site)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"script/imitate-card: cannot compile with gcc, g++ and binutils: {error}")
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, **environment(built)})


def environment(built: Path) -> dict[str, str]:
    """What makes a process take the libraries in a directory for those of CUDA.

    The card runs no compiled code, so torch compiles nothing, except for an idle card.
    """
    libraries = [str(path) for path in sorted(built.glob("lib*.so.*"))]
    found = {"LD_PRELOAD": " ".join(libraries), "TRITON_LIBCUDA_PATH": str(built)}
    if "IMITATED_CARD_IDLE" in os.environ:
        return found
    return {
        **found,
        "IMITATED_CARD_OPERATORS": str(built / OPERATORS),
        "TORCH_COMPILE_DISABLE": "1",
    }


def build(site: Path) -> Path:
    """Compile the libraries for the torch in a site-packages; return their directory."""
    digest = hashlib.sha256(version("torch").encode())
    for path in sorted(HERE.iterdir()):
        if path.is_file():
            digest.update(path.read_bytes())
    directory = BUILT / digest.hexdigest()[:16]
    if directory.exists():
        return directory
    print("Compiling the imitated card (once; half a minute)", file=sys.stderr)
    BUILT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT, ignore_cleanup_errors=True) as place:
        draft = Path(place)
        for soname in _needed(site / "torch/lib/libtorch_cuda.so"):
            for start, sources in SOURCES.items():
                if soname.startswith(f"{start}."):
                    _library(site, draft, soname, sources)
        _compile(site, draft / DRIVER, [HERE / "driver.c"], [f"-Wl,-soname,{DRIVER}"])
        _operators(site, draft / OPERATORS)
        with suppress(OSError):  # another process was faster
            draft.rename(directory)
    return directory


def _with_cuda() -> Path | None:
    """The site-packages of a torch that is built with CUDA."""
    spec = find_spec("torch")
    site = Path(spec.origin).parent.parent if spec and spec.origin else None
    return site if site and (site / "torch/lib/libtorch_cuda.so").exists() else None


def _needed(library: Path) -> list[str]:
    found = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return re.findall(r"NEEDED.*\[(.*)\]", found.stdout)


def _library(site: Path, directory: Path, soname: str, sources: tuple[str, ...]) -> None:
    """A library with every function that the real one has, under the versions of its symbols."""
    (real,) = site.glob(f"nvidia/*/lib/{soname}")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", real], capture_output=True, text=True, check=True
    )
    names = set(re.findall(r" T (\w+)", symbols.stdout))
    written = "".join((HERE / name).read_text() for name in sources)
    absent = sorted(name for name in names if not re.search(rf"\b{name}\(", written))
    runtime = soname.startswith("libcudart")
    stubs, versions = directory / f"stubs-{soname}.c", directory / f"versions-{soname}"
    lines = []
    for name in absent:
        answer = NOT_SUPPORTED if runtime and name not in SUCCEED else 0
        lines.append(f"int {name}(void) {{ return {answer}; }}\n")
    stubs.write_text("".join(lines))
    versions.write_text(f"{soname} {{ global: *; }};\n")
    linking = [f"-Wl,-soname,{soname}", f"-Wl,--version-script={versions}"]
    _compile(site, directory / soname, [HERE / name for name in sources], [str(stubs), *linking])


def _compile(site: Path, target: Path, sources: list[Path], linking: list[str]) -> None:
    options = ["-shared", "-fPIC", "-O1", "-w", *_include(site)]
    files = [str(path) for path in (*sources, "-o", target)]
    subprocess.run(["gcc", *options, *files, *linking, "-ldl", "-lpthread"], check=True)


def _include(site: Path) -> list[str]:
    """Where CUDA's headers are: of its version, and what only Triton brings."""
    return [f"-I{path}" for pattern in HEADERS for path in sorted(site.glob(pattern))]


def _operators(site: Path, target: Path) -> None:
    torch = site / "torch"
    include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    options = ["-std=c++20", "-shared", "-fPIC", "-O1", "-w", *include, *_include(site)]
    linking = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-lc10_cuda"]
    command = ["g++", *options, str(HERE / "operators.cpp"), "-o", str(target), *linking]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
