"""Float8 transformers on disk, so that a server for float8 does not read the bf16 weights at start.

A file holds exactly what `flux/transformers/float8.py` makes of a checkpoint's base weights, in
torchao's own layout; `safetensors` and torchao's `unflatten_tensor_state_dict` can read it. It does
not say whether a linear also quantizes its inputs, because that depends on the device.

A file belongs to one checkpoint and one recipe. It names both, and is refused for any other. The
checkpoint is recognised by its fingerprint (weights/fingerprint.py).
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from flux.components import ADVICE, CheckpointError
from flux.memory.staging import Staging
from flux.transformers.float8 import empty_float8, float8_parameters, quantize_into, storage
from weights.fingerprint import fingerprint, stored_tensors
from weights.serving.cancel import CheckCancelled
from weights.serving.errors import InvalidFileError, sentences

RECIPE = "1: blocks' linears in e4m3, scale = max |row| / 448 in fp32; the others in bfloat16"
IDENTITY = "flux_fine_tune"  # the key of our own metadata, beside torchao's
NAMES = "tensor_names"  # torchao's list of all that are in the file
STORED = "BF16"  # what safetensors calls the dtype of the official checkpoints
AGAIN = "Run script/quantize again for this checkpoint"


@dataclass(frozen=True)
class Identity:
    """What a file was made of, and how.

    Attributes:
        variant: `dev` or `schnell`.
        checkpoint: as FLUX_CHECKPOINT names it, without secrets; for messages only.
        commit: of the hub's repository, where it is known; for messages only.
        fingerprint: of the checkpoint's transformer, see `fingerprint_of`.
        recipe: RECIPE at the time.
        torchao: its version; for messages only, the bits are ours.
    """

    variant: str
    checkpoint: str
    commit: str | None
    fingerprint: str
    torchao: str
    recipe: str = RECIPE

    def __str__(self) -> str:
        commit = f" at {self.commit[:12]}" if self.commit else ""
        return f"{self.variant} of {self.checkpoint}{commit} ({self.fingerprint[:12]})"


def path_of(variant: str, directory: Path) -> Path:
    """The file of a variant in the directory that FLUX_QUANTIZED_DIRECTORY names."""
    return directory.expanduser() / f"{variant}.safetensors"


def fingerprint_of(directory: Path) -> str:
    """What tells the transformer in a directory from others; see `weights.fingerprint`.

    Raises:
        CheckpointError: its files are missing or damaged, or not in bfloat16.
    """
    try:
        tensors = stored_tensors(directory)
        other = sorted({stored.tensor.dtype for stored in tensors.values()} - {STORED})
        if other:
            raise CheckpointError(
                f"{directory}: holds {', '.join(other)}; only a checkpoint in {STORED}, as the "
                "official ones, can be quantized ahead of time"
            )
        return fingerprint(tensors)
    except (OSError, InvalidFileError) as error:
        raise CheckpointError(sentences(str(error), ADVICE)) from error


def write(path: Path, transformer: nn.Module, identity: Identity) -> int:
    """Quantize a base transformer into a file; an incomplete file never takes its name.

    Weights are quantized one by one. Besides the memory map of the bf16 weights this takes more
    than the size of the result: 15 GB were measured for FLUX.1's 12.

    Args:
        path: replaced if it is there.
        transformer: in bfloat16 on the host.
        identity: what it is.

    Returns:
        the size of the file in bytes.

    Raises:
        CheckpointError: the disk has no room for it, or cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    names = []
    float8 = float8_parameters(transformer)
    for name, parameter in transformer.named_parameters():
        value = parameter.detach()
        if name in float8:
            value = empty_float8(value.shape, value.dtype, value.device, dynamic=False)
            quantize_into(value, parameter.detach())
        flat, described = flatten_tensor_state_dict({name: value})  # one by one: it copies
        tensors |= flat
        metadata |= described
        names.append(name)
    metadata |= {NAMES: json.dumps(names), IDENTITY: json.dumps(asdict(identity))}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        draft = path.with_suffix(".draft")
        draft.unlink(missing_ok=True)  # of a run that was killed
        _check_room(path.parent, size)
        try:
            save_file(tensors, draft, metadata=metadata)
            draft.chmod(0o644)  # safetensors makes it private, and a server may be another user
            draft.replace(path)
        except SafetensorError as error:  # the disk has filled up meanwhile, for example
            raise CheckpointError(
                f"{path}: cannot be written ({error}); free some space"
            ) from error
        finally:
            draft.unlink(missing_ok=True)
    return path.stat().st_size


def _check_room(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > free:
        raise CheckpointError(
            f"{directory}: {size / 1e9:.2f} GB are to be written, and the disk has "
            f"{free / 1e9:.2f} GB free; free some, or name a directory on a larger disk"
        )


class Prequantized:
    """A variant's float8 transformer, in the memory map of its file.

    Args:
        path: of the file.
        skeleton: a transformer of the checkpoint's configuration, without memory.
        source: the directory of the checkpoint's transformer, which the file must belong to.

    Raises:
        CheckpointError: the file is missing, damaged, or of another checkpoint or recipe.
    """

    def __init__(self, path: Path, skeleton: nn.Module, source: Path) -> None:
        self.path = path
        tensors, metadata = self._read()
        self._check_identity(metadata, source)
        try:
            self._values, rest = unflatten_tensor_state_dict(tensors, metadata)
        except (ValueError, KeyError, TypeError) as error:
            raise self._refusal(f"its metadata cannot be read ({error})") from error
        found = {name: _shapes(value) for name, value in self._values.items()}
        wanted = _expected(skeleton)
        wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        if wrong or rest:
            first = [*wrong, *rest][0]
            raise self._refusal(
                f"{len(wrong) + len(rest)} weights do not fit the checkpoint's configuration: "
                f"{first} is {found.get(first)}, expected {wanted.get(first)}"
            )

    def fill(self, module: nn.Module, staging: Staging, check_cancelled: CheckCancelled) -> None:
        """Copy the weights into the storage of a float8 transformer: its base values.

        Args:
            module: of the skeleton's shapes; float8 parameters as `float8.empty_float8` has them.
            staging: brings the values to where the weights are.
            check_cancelled: called before each tensor is written; raises to stop.
        """
        working: list[Tensor] = []
        stored: list[Tensor] = []
        for name, parameter in module.named_parameters():
            working += storage(parameter)
            stored += storage(self._values[name])
        staging.copy(working, stored, check_cancelled)

    def _read(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not self.path.is_file():
            raise self._refusal("no such file")
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise self._refusal(f"damaged or incomplete ({error})") from error

    def _check_identity(self, metadata: dict[str, str], source: Path) -> None:
        if IDENTITY not in metadata:
            raise self._refusal("it was not made by script/quantize")
        try:
            made_of = Identity(**json.loads(metadata[IDENTITY]))
        except (ValueError, TypeError) as error:
            raise self._refusal("it was made by another version of this package") from error
        if made_of.recipe != RECIPE:
            raise self._refusal(f"its recipe is {made_of.recipe!r}, and this package's {RECIPE!r}")
        expected = fingerprint_of(source)
        if made_of.fingerprint != expected:
            raise self._refusal(f"it was made from {made_of}, and {source} is {expected[:12]}")

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(sentences(f"{self.path}: {reason}", AGAIN))


def _expected(skeleton: nn.Module) -> dict[str, list[tuple[int, ...]]]:
    """Shapes by name of what holds each weight: float8 ones have values and scales."""
    float8 = float8_parameters(skeleton)
    found = {name: _shapes(parameter) for name, parameter in skeleton.named_parameters()}
    return {n: [s, (s[0], 1)] if n in float8 else [s] for n, (s,) in found.items()}


def _shapes(value: Tensor) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in storage(value)]
