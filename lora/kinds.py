"""The tensors of one module in an adapter file: which kind they make, and their shapes.

Every kind is a row of symbolic shapes. A symbol means the same number wherever it occurs in
the row, so that matching a row against the header checks all of a module's tensors before
any of them is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from lora.header import AdapterError, short
from lora.keys import Place

EXTRAS = frozenset({"alpha", "magnitude", "up_bias", "diff_b"})  # beside the weight's own delta


@dataclass(frozen=True, slots=True)
class Layout:
    """One kind of delta.

    Attributes:
        kind: its name.
        shapes: role -> symbolic shape.
        sums: how many sums over the rank are in its formula.
    """

    kind: str
    shapes: Mapping[str, tuple[str, str]]
    sums: int = 0


def _layouts() -> dict[frozenset[str], Layout]:
    rows = [
        Layout("LoRA", {"down": ("rank", "columns"), "up": ("rows", "rank")}, sums=1),
        Layout("full difference", {"diff": ("rows", "columns")}),
        Layout("LoHa", {
            "hada_w1_a": ("rows", "rank"), "hada_w1_b": ("rank", "columns"),
            "hada_w2_a": ("rows", "rank"), "hada_w2_b": ("rank", "columns"),
        }, sums=2),
    ]  # fmt: skip
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
    return {frozenset(layout.shapes): layout for layout in rows}


LAYOUTS = _layouts()


@dataclass(slots=True)
class Group:
    """The keys of one module: role -> key, and role -> shape from the header.

    `check` fills in `layout` (None: the module has no delta of its weight) and `rank` (None:
    nothing is factored, so alpha / rank does not apply).
    """

    place: Place
    label: str
    spelling: str
    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layout: Layout | None = None
    rank: int | None = None

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
        self.layout = LAYOUTS.get(roles)
        if self.layout is None and roles:
            raise AdapterError(
                f"{short(self.spelling)} has {', '.join(sorted(self.keys))}: "
                "that is incomplete, or two kinds of adapter at once"
            )
        if self.layout is None and self.keys.keys() & {"magnitude", "up_bias"}:
            raise AdapterError(f"{short(self.spelling)} has {', '.join(sorted(self.keys))} alone")
        sizes = self._bind(self.layout) if self.layout else {}
        self.rank = sizes.get("rank")
        self._check_extras()

    def _bind(self, layout: Layout) -> dict[str, int]:
        """The number that each symbol of the layout stands for."""
        place = self.place.shape
        if "diff" in layout.shapes:
            self._expect("diff", (place,))
            return {}
        sizes: dict[str, int] = {}
        for role, symbols in layout.shapes.items():
            shape = self.shapes[role]
            known = tuple(sizes.setdefault(s, n) for s, n in zip(symbols, shape, strict=False))
            if len(shape) != 2 or known != shape:
                raise self._misfit(role, f"[{', '.join(symbols)}] of one {layout.kind}")
        if layout.kind == "LoKr":
            sizes["rows"] = sizes["rows1"] * sizes["rows2"]
            sizes["columns"] = sizes["columns1"] * sizes["columns2"]
        if (sizes["rows"], sizes["columns"]) != place:
            raise AdapterError(
                f"{short(self.spelling)} changes a weight of {sizes['rows']} x {sizes['columns']}; "
                f"this model's is {' x '.join(map(str, place))}. The file is for another model."
            )
        return sizes

    def _check_extras(self) -> None:
        rows, *columns = self.place.shape
        magnitudes = ((rows,), (rows, 1), *((n,) for n in columns), *((1, n) for n in columns))
        allowed: Mapping[str, Sequence[tuple[int, ...]]] = {
            "magnitude": magnitudes,
            "up_bias": ((rows,),),
            "diff_b": ((rows,),),
            "alpha": ((), (1,)),
        }
        for role, shapes in allowed.items():
            if role in self.keys:
                self._expect(role, shapes)
        if self.keys.keys() & {"up_bias", "diff_b"} and not self.place.has_bias:
            raise AdapterError(f"{short(self.spelling)} changes a bias, and that module has none")
        if "magnitude" in self.keys and not columns:
            raise AdapterError(f"{short(self.spelling)} has a magnitude, and is not a matrix")

    def _expect(self, role: str, allowed: Sequence[tuple[int, ...]]) -> None:
        if self.shapes[role] not in allowed:
            raise self._misfit(role, " or ".join(map(str, allowed)))

    def _misfit(self, role: str, expected: str) -> AdapterError:
        return AdapterError(
            f"{short(self.keys[role])} has the shape {self.shapes[role]}; expected {expected} "
            f"for a module of shape {self.place.shape}. The file is for another model or damaged."
        )


def flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the trailing ones of a 1 x 1 convolution, as some trainers store linears."""
    return shape[:2] if len(shape) > 2 and prod(shape[2:]) == 1 else shape
