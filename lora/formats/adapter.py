"""A safetensors file in, an Adapter out: every format, and every kind of delta.

Nothing is dropped silently. A key belongs to a module of the model, or is of a kind that is
known to be harmless and is listed as ignored, or is an error that names it.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora.formats.contributions import Parameter, read_contributions
from lora.formats.deltas import BaseValues, Contribution, LoRA, placed
from lora.formats.errors import AdapterError
from lora.formats.foreign import refuse_foreign
from lora.formats.keys import Targets
from lora.formats.kinds import NUMBERS, Group, flat_shape
from lora.formats.metadata import ADAPTER_SETTINGS, AdapterSettings, trigger_words
from lora.formats.spellings import AUXILIARY, BOOKKEEPING, is_embedding, split_role
from weights.header import Header, HeaderError, TensorInfo, read_header, short

__all__ = ["Adapter", "AdapterError", "Targets", "load_adapter"]

MAX_TENSOR_BYTES = 8 << 30
FACTOR_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# Some files hold an adapter twice; diffusers reads the second of these spellings (0.42.1,
# loaders/lora_conversion_utils.py, `_convert_kohya_flux_lora_to_diffusers`).
COPY, ORIGINAL = "lora_unet_", ("transformer.", "lora_transformer_")
UNUSED_BY_FLUX = ("text_projection", "logit_scale")  # parts of CLIP that FLUX never runs

LowRank = tuple[Tensor, Tensor, float, slice]
"""A LoRA delta of some rows of a weight: up [rows, rank], down [rank, columns], scaling, rows."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one file adds to the weights; factors stay in the file's dtype, on the CPU.

    Attributes:
        digest: of the file, and of the settings beside it.
        format: how it is spelled and what kind it is, for the log.
        modules: how many modules (as spelled in the file) it changes.
        nbytes: bytes of all the tensors it keeps.
        ignored: keys that were recognised and have no effect here, and modules of rank 0.
        trigger_words: what the file says a prompt should contain.
        contributions: per parameter, what is added to it.
    """

    digest: str
    format: str
    modules: int
    nbytes: int
    ignored: tuple[str, ...]
    trigger_words: tuple[str, ...]
    contributions: Mapping[Parameter, tuple[Contribution, ...]]

    @property
    def parameters(self) -> Set[Parameter]:
        """Every (component, parameter name) that the adapter changes."""
        return self.contributions.keys()

    def add_to(
        self, total: Tensor, component: str, parameter: str, base: BaseValues, scale: float
    ) -> None:
        """Add `scale * delta` of one parameter to `total` in place.

        Args:
            total: fp32, of the parameter's shape.
            component: "transformer", "text_encoder" or "text_encoder_2".
            parameter: a name out of `parameters`.
            base: (component, parameter name) -> base value; DoRA normalises by it.
            scale: any finite number; the delta itself does not depend on it.
        """
        for contribution in self.contributions[component, parameter]:
            contribution.add_to(total, scale, base)

    def low_rank(self, component: str, parameter: str) -> Sequence[LowRank] | None:
        """The delta of one parameter as a sum of LoRA deltas; None where it is none.

        `delta[rows] = sum of scaling * up @ down`, over those that have these rows.
        """
        found = []
        for contribution in self.contributions[component, parameter]:
            delta, piece = contribution.delta, contribution.piece
            if not isinstance(delta, LoRA):
                return None
            found.append((delta.up[piece.source], delta.down, delta.scaling, piece.target))
        return found

    def placed(self, parameters: Set[Parameter], send: Callable[[Tensor], Tensor]) -> "Adapter":
        """The same for some of its parameters only, with the tensors that `send` gives.

        One that has several parts of a fused module in it is sent once.
        """
        sent: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in sent:
                sent[id(tensor)] = send(tensor)
            return sent[id(tensor)]

        kept = {
            key: tuple(placed(contribution, once) for contribution in contributions)
            for key, contributions in self.contributions.items()
            if key in parameters
        }
        return replace(self, contributions=kept)


def load_adapter(path: Path, digest: str, targets: Targets, settings: str = "") -> Adapter:
    """Read an adapter for the model that `targets` describes.

    Args:
        path: a safetensors file; nothing about it is trusted.
        digest: of the file and the settings, which becomes the adapter's identity.
        targets: names and shapes of the model's modules.
        settings: PEFT's, from beside the file, as JSON; those in its header come first.

    Raises:
        AdapterError: the file is not an adapter for this model, or not sound.
    """
    try:
        header = read_header(path)
    except HeaderError as error:
        raise AdapterError(str(error)) from error
    refuse_foreign(header, targets)
    size = sum(info.nbytes for info in header.tensors.values())
    if size > MAX_TENSOR_BYTES:
        raise AdapterError(f"{size} bytes of tensors are too many for an adapter")
    groups, ignored = _group(header, targets)
    for group in groups:
        group.check()
    empty = [group for group in groups if group.is_empty]
    ignored += [g.keys["alpha"] if g.rank is None else f"{g.spelling} (rank 0)" for g in empty]
    groups = [group for group in groups if not group.is_empty]
    if not groups and any(group.rank == 0 for group in empty):
        raise AdapterError(
            f"the file changes nothing: each of its {len(empty)} modules has rank 0, e.g. "
            f"{short(empty[0].spelling)}; export it again with a rank above 0"
        )
    if not groups:
        raise AdapterError(_nothing_matched(header, ignored))
    groups, copies = _without_copies(groups)
    ignored += copies
    beside = {ADAPTER_SETTINGS: settings} if settings else {}
    adapter_settings = AdapterSettings(beside | dict(header.metadata))
    try:
        with safe_open(path, framework="pt") as file:
            contributions = read_contributions(groups, adapter_settings, file.get_tensor)
    except SafetensorError as error:
        raise AdapterError(f"the file cannot be read: {short(str(error))}") from error
    return Adapter(
        digest=digest,
        format=_format(groups),
        modules=len(groups),
        nbytes=sum(header.tensors[key].nbytes for g in groups for key in g.keys.values()),
        ignored=tuple(ignored),
        trigger_words=trigger_words(header.metadata),
        contributions=contributions,
    )


def _group(header: Header, targets: Targets) -> tuple[list[Group], list[str]]:
    """Sort the keys by module; also the keys to ignore."""
    groups: dict[str, Group] = {}
    ignored: list[str] = []
    unknown: list[str] = []
    for key, info in header.tensors.items():
        spelling, role = split_role(key) or ("", "")
        found = targets.find(spelling) if role else None
        if found is None:
            (ignored if _is_ignorable(key, info, spelling, targets) else unknown).append(key)
            continue
        dialect, target = found
        group = groups.setdefault(spelling, Group(target, dialect.label, spelling))
        if role in group.keys:
            raise AdapterError(
                f"the file has {short(group.keys[role])} and {short(key)}, "
                "which are two spellings of the same tensor"
            )
        if role not in NUMBERS and info.dtype not in FACTOR_DTYPES:
            raise AdapterError(f"{short(key)} is {info.dtype}; only floating point can be applied")
        group.keys[role] = key
        group.shapes[role] = flat_shape(role, info.shape)
    if unknown and groups:
        raise AdapterError(
            f"{len(unknown)} of {len(header.tensors)} keys are unknown for this model: "
            f"{_some(unknown)}. The file is for another model, or a kind that is not supported."
        )
    return list(groups.values()), ignored


def _is_ignorable(key: str, info: TensorInfo, spelling: str, targets: Targets) -> bool:
    if key in BOOKKEEPING and prod(info.shape) == 1:
        return True
    if is_embedding(key) or key.startswith(AUXILIARY):
        return True
    if any(name in spelling for name in UNUSED_BY_FLUX):
        return True
    return targets.is_absent(spelling)


def _nothing_matched(header: Header, ignored: list[str]) -> str:
    if not header.tensors:
        return "the file holds no tensors; export or download the adapter again"
    if ignored and len(ignored) == len(header.tensors):
        return (
            f"the file changes nothing in this model: it holds only {_some(ignored)}, "
            "which FLUX.1 does not use; give an adapter (LoRA) for FLUX.1 instead"
        )
    return (
        f"no key of the file matches a module of this model, e.g. {_some(list(header.tensors))}. "
        "A FLUX.1 LoRA in the format of ai-toolkit, kohya, diffusers, XLabs, OneTrainer, PEFT "
        "or LyCORIS is needed."
    )


def _some(keys: list[str]) -> str:
    return ", ".join(map(short, keys[:4])) + (", ..." if len(keys) > 4 else "")


def _without_copies(groups: list[Group]) -> tuple[list[Group], list[str]]:
    """The groups without those that repeat others in kohya's spelling, and what was left out.

    Raises:
        AdapterError: other spellings reach the same module. They would add up; no trainer means
            that.
    """
    kept, copies = groups, []
    found = _second_spelling(groups)
    pair = found[:2] if found else ()
    if any(s.startswith(COPY) for s in pair) and any(s.startswith(ORIGINAL) for s in pair):
        kept = [group for group in groups if not group.spelling.startswith(COPY)]
        copies = [g.spelling for g in groups if g.spelling.startswith(COPY)]
        found = _second_spelling(kept)
    if found:
        first, second, module = found
        raise AdapterError(
            f"the file has {short(first)} and {short(second)}, which are two spellings of "
            f"{module}; save it again with one of them"
        )
    return kept, [f"{spelling} (a copy in another spelling)" for spelling in copies]


def _second_spelling(groups: list[Group]) -> tuple[str, str, str] | None:
    """The first two spellings that reach the same module, and its name."""
    owners: dict[Parameter, str] = {}
    for group in groups:
        for module in sorted({piece.module for piece in group.target.pieces}):
            owner = owners.setdefault((group.target.component, module), group.spelling)
            if owner != group.spelling:
                return owner, group.spelling, module
    return None


def _format(groups: list[Group]) -> str:
    """For the log, e.g. "kohya keys, BFL names, DoRA + LoRA, F16"."""
    labels = " + ".join(sorted({group.label for group in groups}))
    namings = " + ".join(sorted({group.target.naming for group in groups}))
    kinds = {group.kind for group in groups}
    return f"{labels} keys, {namings} names, {' + '.join(sorted(kinds))}"
