"""Which module each key of an adapter file means, and which part of its delta the key holds.

Trainers write the same module under many names. All of them are generated here from the
loaded model's own parameter names and shapes, so a FLUX of any size works and nothing is
guessed: a spelling is in a table (`lora/formats/spellings.py`) or it is unknown.

    module       transformer_blocks.0.attn.to_q      diffusers
                 double_blocks.0.img_attn.qkv        BFL: q, k and v fused, as output rows
                 double_blocks.0.processor.qkv_lora1 XLabs
                 transformer_blocks.0.attn.processor.to_q_lora  diffusers before PEFT
                 transformer_blocks.0.attn.to_qkv    diffusers with fused projections
                 blocks.0.attn.a_to_qkv              DiffSynth
    dialect      transformer.<name>  lora_unet_<name with underscores>  base_model.model.<name>
    role         .lora_A.weight  .lora_up.weight  .alpha  .lokr_w1  .dora_scale  .diff ...
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from lora.formats.spellings import (
    BFL_SHIFT_SCALE,
    BFL_TOP,
    BLOCKS,
    CLIP,
    CLIP_LEVEL,
    DIALECTS,
    TRANSFORMER,
    Dialect,
)

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a spelled module's output that are rows of one of the model's modules."""

    module: str
    source: slice
    target: slice


@dataclass(frozen=True, slots=True)
class Target:
    """What a spelling names in the model: the shape of its weight, and the pieces it is made of."""

    component: str
    spelling: str
    naming: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    has_bias: bool


class Targets:
    """The modules that adapters can change, under every name that trainers give them.

    Args:
        shapes: component ("transformer", "text_encoder", "text_encoder_2") -> parameter name,
            as in the model's `named_parameters()` -> shape.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._tables: dict[tuple[str, bool], dict[str, Target]] = {}
        self._absent: dict[bool, frozenset[str]] = {}
        for component, parameters in shapes.items():
            modules = dict(_modules(component, parameters))
            targets = list(modules.values())
            if component == TRANSFORMER:
                fused, absent = _transformer_spellings(modules)
                targets += fused
                self._absent = {False: absent, True: frozenset(map(_join, absent))}
            spelled = {target.spelling: target for target in targets}
            self._tables[component, False] = spelled
            self._tables[component, True] = {_join(name): p for name, p in spelled.items()}

    def find(self, spelling: str) -> tuple[Dialect, Target] | None:
        """The module that `spelling` names, or None when it names none."""
        for dialect, name in _candidates(spelling):
            target = self._tables.get((dialect.component, dialect.joined), {}).get(name)
            if target is not None:
                return dialect, target
        return None

    def is_absent(self, spelling: str) -> bool:
        """Whether `spelling` names a module that some FLUX.1 have and this one has not.

        That is the guidance embedder, which dev has and schnell has not.
        """
        return any(
            dialect.component == TRANSFORMER and name in self._absent.get(dialect.joined, ())
            for dialect, name in _candidates(spelling)
        )

    def shape(self, component: str, module: str) -> tuple[int, ...] | None:
        """Shape of a module's weight by its own name, or None when the model has none."""
        target = self._tables.get((component, False), {}).get(module)
        return target.shape if target else None


def _candidates(spelling: str) -> Iterator[tuple[Dialect, str]]:
    """Each reading of `spelling`: a dialect, and what is left as the module's name."""
    for dialect in DIALECTS:
        if spelling.startswith(dialect.prefix):
            name = spelling[len(dialect.prefix) :]
            if dialect.component == CLIP:
                name = name.removeprefix(_join(CLIP_LEVEL) if dialect.joined else CLIP_LEVEL)
            yield dialect, name.rstrip("_") if dialect.joined else name


def _join(name: str) -> str:
    return name.replace(".", "_")


def _modules(
    component: str, parameters: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Target]]:
    """Every module with a weight, under its own name in the model."""
    for parameter, shape in parameters.items():
        name = parameter.removesuffix(".weight")
        if name != parameter:
            rows = slice(0, shape[0])
            pieces = (Piece(name, rows, rows),)
            bias = f"{name}.bias" in parameters
            spelling = name.removeprefix(CLIP_LEVEL) if component == CLIP else name
            yield name, Target(component, spelling, "diffusers", tuple(shape), pieces, bias)


def _transformer_spellings(modules: Mapping[str, Target]) -> tuple[list[Target], frozenset[str]]:
    """Other names for the transformer's modules, and names of modules that it lacks."""
    targets: list[Target] = []
    absent: set[str] = set()
    for naming, spelling, names in chain(_top_rows(), _block_rows(modules)):
        parts = [modules[name] for name in names if name in modules]
        if len(parts) == len(names):
            targets.append(_fuse(spelling, naming, parts))
        else:
            absent.update((spelling, *names))
    shift_scale, norm_out = BFL_SHIFT_SCALE
    if norm_out in modules:
        targets.append(_swap_halves(shift_scale, modules[norm_out]))
    return targets, frozenset(absent)


def _top_rows() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for spelling, names in BFL_TOP:
        yield "BFL", spelling, names


def _block_rows(modules: Iterable[str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(naming, spelling, module names) of every block the model has."""
    found = {tuple(name.split(".")[:2]) for name in modules if "." in name}
    for spelled, prefix, naming, table in BLOCKS:
        for index in (rest[0] for first, *rest in found if first == prefix):
            for name, parts in table:
                names = tuple(f"{prefix}.{index}.{part}" for part in parts)
                yield naming, f"{spelled}.{index}.{name}", names
                if naming == "BFL" and len(parts) > 1:  # OneTrainer numbers the fused parts
                    for number, part in enumerate(names):
                        yield naming, f"{spelled}.{index}.{name}.{number}", (part,)
                elif "_norm" in name:
                    yield naming, f"{spelled}.{index}.{name}.scale", names


def _fuse(spelling: str, naming: str, parts: list[Target]) -> Target:
    """One target whose output rows are those of `parts`, one after the other."""
    pieces, start = [], 0
    for part in parts:
        rows = part.shape[0]
        pieces.append(Piece(part.pieces[0].module, slice(start, start + rows), slice(0, rows)))
        start += rows
    shape = (start, *parts[0].shape[1:])
    has_bias = all(part.has_bias for part in parts)
    return Target(parts[0].component, spelling, naming, shape, tuple(pieces), has_bias)


def _swap_halves(spelling: str, target: Target) -> Target:
    """BFL's last modulation gives (shift, scale) where diffusers gives (scale, shift)."""
    name, rows = target.pieces[0].module, target.shape[0]
    first, second = slice(0, rows // 2), slice(rows // 2, rows)
    pieces = (Piece(name, second, first), Piece(name, first, second))
    return Target(target.component, spelling, "BFL", target.shape, pieces, target.has_bias)
