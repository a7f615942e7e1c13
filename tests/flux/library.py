"""cuBLASLt's part, played by the CPU: float8 products of some shapes are refused."""

import pytest
import torch
from torch import Tensor

FEW, SHORT = 256, 3072  # up to so many rows are refused where they are longer than that


class Library:
    """`torch._scaled_mm` in float64, which refuses what an H100's library does, or all.

    torch's own multiplies row by row on a CPU from 2.12 on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, least: int = 0, few: int = FEW) -> None:
        self.rows: list[int] = []
        self._least, self._few = least, few
        monkeypatch.setattr(torch, "_scaled_mm", self)

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        **_: object,
    ) -> Tensor:
        rows, inner = left.shape
        if rows < self._least or (rows <= self._few and inner > SHORT):
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling ...")
        self.rows.append(rows)
        product = (left.double() * scale_a) @ (right.double() * scale_b)
        return (product if bias is None else product + bias).to(out_dtype)
