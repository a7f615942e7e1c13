"""Query, key and value as one product of matrices instead of three.

The three linears of an attention multiply the same tokens. One product with the rows of all three
weights is launched once, float8 quantizes its input once, and a card's last wave of tiles is fuller
(docs/performance.md). diffusers' attention can do so with its `fuse_projections`, for which it
copies the weights under another name. Here the parameters keep their names and share memory
instead: each holds some rows of one tensor, and the product reads the whole. So checkpoints,
adapters and records know nothing of it.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import itemgetter

from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows import Float8Tensor

JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""What diffusers' attention calls a product -> the linears whose rows it has."""


class Projection(nn.Module):
    """A linear whose weight and bias are those of others, and no parameters."""

    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Multiply: [..., n, k] to [..., n, rows]."""
        return nn.functional.linear(tokens, self.weight, self.bias)


def join_projections(transformer: nn.Module) -> None:
    """Have attention use one product; `skeleton.allocate` gives it memory."""
    for module in transformer.modules():
        if isinstance(module, FluxAttention):
            for name, parts in JOINED.items():
                if hasattr(module, parts[0]):
                    module.add_module(name, Projection())
            module.fused_projections = True


def shared_tensors(transformer: nn.Module) -> Iterator[tuple[Projection, str, list[str]]]:
    """Each tensor that parameters share: whose it is, its name there, the parameters' names."""
    for path, module in transformer.named_modules():
        owner, _, name = path.rpartition(".")
        if isinstance(module, Projection):
            for kind in ("weight", "bias"):
                yield module, kind, [f"{owner}.{part}.{kind}" for part in JOINED[name]]


def split_rows(together: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Parts of a tensor, float8 or not, by their numbers of rows; they share its memory."""
    parts = [slice(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]
    if isinstance(together, Float8Tensor):
        return [together._apply_fn_to_data(itemgetter(rows)) for rows in parts]
    return [together[rows] for rows in parts]
