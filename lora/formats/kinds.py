"""The tensors of one module in an adapter file: which kind they make, and their shapes.

Every kind is a row of symbolic shapes. A symbol means the same number wherever it occurs in
the row, so that matching a row against the header checks all of a module's tensors before
any of them is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt, prod

from lora.formats.errors import AdapterError
from lora.formats.keys import Target
from weights.header import short

NUMBERS = frozenset({"alpha", "oft_scaled"})  # roles of a single number, of any dtype
EXTRAS = NUMBERS | {"magnitude", "up_bias", "diff_b"}  # beside the weight's own delta
Sizes = dict[str, int]
"""What the symbols of a row stand for."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One kind of delta.

    Attributes:
        kind: its name.
        shapes: role -> symbolic shape; "1" is one.
        sums: how many sums over the rank are in its formula.
        turns: the highest power of Q that its formula has, or whose digits it loses.
    """

    kind: str
    shapes: Mapping[str, tuple[str, ...]]
    sums: int = 0
    turns: int = 0


def _layouts() -> dict[frozenset[str], list[Layout]]:
    down, up = ("rank", "columns"), ("rows", "rank")
    back = ("columns", "rank")
    rows = [
        Layout("LoRA", {"down": down, "up": up}, sums=1),
        Layout("full difference", {"diff": ("rows", "columns")}),
        Layout("LoHa", {
            "hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down,
        }, sums=2),
        Layout("GLoRA", {
            "glora_a1": back, "glora_a2": down, "glora_b1": up, "glora_b2": down,
        }, sums=1),
        Layout("old GLoRA", {
            "glora_a1": down, "glora_a2": back, "glora_b1": down, "glora_b2": up,
        }, sums=1),
        Layout("OFT of inputs", {"oft_R": ("blocks", "packed")}, turns=4),
    ]  # fmt: skip
    for kind, factors in (("OFT", ()), ("BOFT", ("factors",))):
        blocks = {"oft_blocks": (*factors, "blocks", "size", "size")}
        rows += [Layout(kind, blocks, turns=2)]
        rows += [Layout(kind, {**blocks, "rescale": ("rows", "1")}, turns=2)]
    first: tuple[dict[str, tuple[str, str]], ...] = (
        {"lokr_w1": ("rows1", "columns1")},
        {"lokr_w1_a": ("rows1", "rank"), "lokr_w1_b": ("rank", "columns1")},
    )
    second: tuple[dict[str, tuple[str, str]], ...] = (
        {"lokr_w2": ("rows2", "columns2")},
        {"lokr_w2_a": ("rows2", "rank"), "lokr_w2_b": ("rank", "columns2")},
        {
            "lokr_t2": ("rank", "rank"),
            "lokr_w2_a": ("rank", "rows2"),
            "lokr_w2_b": ("rank", "columns2"),
        },
    )
    rows += [
        Layout("LoKr", {**w1, **w2}, sums=len(w1) + len(w2) - 2) for w1 in first for w2 in second
    ]
    found: dict[frozenset[str], list[Layout]] = {}
    for layout in rows:
        found.setdefault(frozenset(layout.shapes), []).append(layout)
    return found


LAYOUTS = _layouts()
"""Roles -> the kinds that have them; where there are two, the shapes tell which."""


@dataclass(slots=True)
class Group:
    """The keys of one module: role -> key, and role -> shape from the header.

    `check` fills in `layout` (None: the module has no delta of its weight) and `sizes`.
    """

    target: Target
    label: str
    spelling: str
    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layout: Layout | None = None
    sizes: Sizes = field(default_factory=dict)

    @property
    def rank(self) -> int | None:
        """None: nothing is factored, so alpha / rank does not apply. Known after `check`."""
        return self.sizes.get("rank")

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing: rank 0, or an alpha alone; known after `check`."""
        if self.keys.keys() == {"alpha"}:
            return True
        return self.rank == 0 and not self.keys.keys() & {"magnitude", "diff_b"}

    @property
    def kind(self) -> str:
        """Name of the kind, for the log; known after `check`."""
        if "magnitude" in self.keys:
            return "DoRA"
        return self.layout.kind if self.layout else "bias difference"

    def check(self) -> None:
        """Find the layout and check every shape against it and the module.

        Raises:
            AdapterError: incomplete, two kinds at once, or shapes that do not fit.
        """
        roles = frozenset(self.keys) - EXTRAS
        if roles and roles not in LAYOUTS:
            raise AdapterError(
                f"{short(self.spelling)} has {', '.join(sorted(self.keys))}: "
                "that is incomplete, or two kinds of adapter at once"
            )
        if not roles and self.keys.keys() & {"magnitude", "up_bias", "oft_scaled"}:
            raise AdapterError(f"{short(self.spelling)} has {', '.join(sorted(self.keys))} alone")
        if roles:
            self.layout, self.sizes = self._bound(LAYOUTS[roles])
        self._check_extras()

    def _bound(self, layouts: Sequence[Layout]) -> tuple[Layout, Sizes]:
        """The first of the layouts that fits, and the number that each of its symbols is."""
        dimensions = {role: len(shape) for role, shape in self.shapes.items()}
        alike = [
            layout
            for layout in layouts
            if all(len(shape) == dimensions[role] for role, shape in layout.shapes.items())
        ]
        errors = []
        for layout in alike or layouts:
            try:
                return layout, self._bind(layout)
            except AdapterError as error:
                errors.append(error)
        raise errors[0]

    def _bind(self, layout: Layout) -> Sizes:
        """The number that each symbol of the layout stands for."""
        target = self.target.shape
        if "diff" in layout.shapes:
            self._expect("diff", (target,))
            return {}
        sizes: Sizes = {"1": 1, **({"rows": target[0]} if layout.turns else {})}
        for role, symbols in layout.shapes.items():
            shape = self.shapes[role]
            known = tuple(sizes.setdefault(s, n) for s, n in zip(symbols, shape, strict=False))
            if len(shape) != len(symbols) or known != shape:
                raise self._misfit(role, f"[{', '.join(symbols)}] of one {layout.kind}")
        extent = _extent(layout.kind, sizes, target)
        if extent != target:
            raise AdapterError(
                f"{short(self.spelling)} changes a weight of {extent[0]} x {extent[1]}; "
                f"this model's is {' x '.join(map(str, target))}. The file is for another model."
            )
        return sizes

    def _check_extras(self) -> None:
        rows, *columns = self.target.shape
        magnitudes = ((rows,), (rows, 1), *((n,) for n in columns), *((1, n) for n in columns))
        allowed: Mapping[str, Sequence[tuple[int, ...]]] = {
            "magnitude": magnitudes,
            "up_bias": ((rows,),),
            "diff_b": ((rows,),),
            "alpha": ((), (1,)),
            "oft_scaled": ((), (1,)),
        }
        for role, shapes in allowed.items():
            if role in self.keys:
                self._expect(role, shapes)
        if self.keys.keys() & {"up_bias", "diff_b"} and not self.target.has_bias:
            raise AdapterError(f"{short(self.spelling)} changes a bias, and that module has none")
        if "oft_scaled" in self.keys and "oft_R" not in self.keys:
            raise AdapterError(
                f"{short(self.keys['oft_scaled'])} scales a rotation that the file lacks"
            )
        if "up_bias" in self.keys and "up" not in self.keys:
            raise AdapterError(
                f"{short(self.keys['up_bias'])} is the bias of a LoRA's up, which the file lacks"
            )
        if "magnitude" in self.keys and not columns:
            raise AdapterError(f"{short(self.spelling)} has a magnitude, and is not a matrix")

    def _expect(self, role: str, allowed: Sequence[tuple[int, ...]]) -> None:
        if self.shapes[role] not in allowed:
            raise self._misfit(role, " or ".join(map(str, allowed)))

    def _misfit(self, role: str, expected: str) -> AdapterError:
        return AdapterError(
            f"{short(self.keys[role])} has the shape {self.shapes[role]}; expected {expected} "
            f"for a module of shape {self.target.shape}. The file is for another model or damaged."
        )


def _extent(kind: str, sizes: Sizes, target: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the weight that a layout changes, which `target` should have.

    Rotations fix the rows or the columns alone. A size that is not possible is given as 0.
    """
    match kind:
        case "LoKr":
            return sizes["rows1"] * sizes["rows2"], sizes["columns1"] * sizes["columns2"]
        case "OFT" | "BOFT":
            # A butterfly's last factor interleaves 2 ^ (factors - 1) blocks with as many.
            groups = 2 ** min(max(sizes.get("factors", 1) - 1, 0), 64)
            possible = sizes["blocks"] % groups == 0 and (kind == "OFT" or sizes["size"] % 2 == 0)
            return sizes["blocks"] * sizes["size"] * possible, target[-1]
        case "OFT of inputs":
            size = sizes["size"] = _packed_size(sizes["packed"])
            shared = sizes["blocks"] == 1 and size and target[-1] % size == 0
            return target[0], target[-1] if shared else sizes["blocks"] * size
    return sizes["rows"], sizes["columns"]


def _packed_size(count: int) -> int:
    """The size of a skew-symmetric matrix with that many values above its diagonal, or 0."""
    size = (1 + isqrt(1 + 8 * count)) // 2
    return size if size * (size - 1) // 2 == count else 0


def flat_shape(role: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the trailing ones of a 1 x 1 convolution, as some trainers store linears."""
    linear = len(shape) > 2 and prod(shape[2:]) == 1 and role != "oft_blocks"
    return shape[:2] if linear else shape
