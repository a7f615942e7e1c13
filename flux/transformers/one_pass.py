"""Adapters on the device, and weights written with them in one pass.

A merge that sends factors from the host does so for each weight, twice, from memory that is not
page-locked, and each of these copies holds the host up. So all that adapters hold is brought to the
device when they are first merged there, and the least recently used leave. For each weight that
gets plain LoRA deltas only, the factors of all adapters are one `up` and one `down`, side by side,
for `flux/transformers/lora_kernel.py`. Where that leaves a weight alone (float8 on cards before
Hopper), torch's operators add the same factors. Other differences are brought as they are, and take
the path of torch's operators in flux/transformers/merge.py, which is also the reference for the
kernel. A float8 weight that adapters leave is written by the kernel too, from its base value alone.

The factors are kept by the set of adapters, without their scales, so that another scale brings
only a vector. Two sets that share an adapter hold it twice, which the limit counts.

Where the kernel fails, by Triton's compiler or its driver, a weight is still written: the failure
is in the log once, and torch's operators do all of it until the process is started anew.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor
from torchao.quantization.quantize_.workflows import Float8Tensor

from flux.memory.device import is_out_of_memory
from flux.transformers.adapters import (
    AdapterLike,
    DeviceAdapters,
    LowRank,
    MergeRecord,
    ParameterName,
)
from flux.transformers.float8 import empty_float8
from weights.serving.lru import LruCache
from weights.serving.settings import GB

logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], bool]
"""Writes a weight; see `lora_kernel.write`."""
Send = Callable[[Tensor], Tensor]
MAX_RANK = 512  # of all adapters together; above, products take longer than the passes they save
SCALES = 4  # of each set of adapters, whose vectors are kept
SETS = 64  # whose size is remembered as too large
RANKS = (16, 32)  # one for each of `lora_kernel.DEPTHS`, by which the kernel's form is chosen
SIDE = 64  # of a weight to compile for: a multiple of 16, as those of FLUX.1 are


@dataclass(frozen=True, slots=True)
class Factors:
    """Two factors of the sum of all deltas of a weight: up `[n, rank]`, down `[rank, columns]`.

    Attributes:
        scalings: for each column of `up`, the index of its adapter among those of the request, and
            the factor of that adapter's scale.
    """

    up: Tensor
    down: Tensor
    scalings: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class DeviceAdapterSet:
    """A set of adapters on the device.

    Attributes:
        factors: for each weight that gets LoRA deltas only.
        adapters: by digest, with the differences to all others.
        scaled: the same with scales of the adapters.
    """

    factors: Mapping[ParameterName, Factors]
    adapters: Mapping[str, AdapterLike]
    scaled: LruCache[tuple[float, ...], DeviceAdapters]


class OnePass:
    """See the module.

    Args:
        kernel: `lora_kernel.write`, or what stands in for it.
        limit: bytes of the device that adapters may take there.
        send: brings a tensor from the host to the device, and does not wait for it.
    """

    def __init__(self, kernel: Kernel, limit: int, send: Send) -> None:
        self._kernel = kernel
        self._limit = limit
        self._send = send
        self._held: LruCache[tuple[str, ...], DeviceAdapterSet] = LruCache(limit)
        self._refused: LruCache[tuple[str, ...], bool] = LruCache(SETS)
        self.failed = False
        """Whether the kernel failed once, and is not used any more."""

    def near(
        self, record: MergeRecord, adapters: Mapping[str, AdapterLike]
    ) -> DeviceAdapters | None:
        """Have adapters on the device, to be merged with the scales of a record.

        Returns None where they take more than the limit, or the kernel failed before.
        """
        digests = tuple(digest for digest, _ in record)
        if self.failed or digests in self._refused:
            return None
        held = self._held.get(digests) or self._upload(digests, adapters)
        if held is None:
            return None
        scales = tuple(scale for _, scale in record)
        return held.scaled.get(scales) or held.scaled.put(scales, self._scaled(held, scales))

    def write(self, working: Tensor, base: Tensor, factors: tuple[Tensor, Tensor, Tensor]) -> bool:
        """Write a weight from its base value and LoRA deltas; return whether it was written.

        Args:
            working, base: on the device; see `lora_kernel.write`.
            factors: up [n, rank], down [rank, columns] and scales [rank] in fp32.
        """
        if self.failed:
            return False
        try:
            return self._kernel(working, base, *factors)
        except Exception as error:  # Triton's are of many classes
            if is_out_of_memory(error):
                raise
            self.failed = True
            self.forget()  # nothing there is used any more
            logger.warning(
                "Adapters are merged by torch's operators until a restart", exc_info=error
            )
            return False

    def restore(self, working: Tensor, base: Tensor) -> bool:
        """Write a float8 weight that had adapters, as it is without; return whether it is written.

        Both are on the device. The bits are those of `quantize_into`. Other weights are left to a
        copy, which is as fast.
        """
        if not isinstance(working, Float8Tensor):
            return False
        up, down = (base.new_empty(0, n, dtype=torch.bfloat16) for n in (0, base.shape[1]))
        return self.write(working, base, (up, down, base.new_empty(0, dtype=torch.float32)))

    def warm_up(self, dtype: torch.dtype) -> None:
        """Have the kernel compiled for the usual factors.

        If the device has no memory left for that, the first requests compile it.

        Args:
            dtype: of weights that are not float8.
        """
        try:
            self._warm_up(dtype)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.info("The first adapters wait for their kernel: %s", error)

    def _warm_up(self, dtype: torch.dtype) -> None:
        base = self._send(torch.zeros(SIDE, SIDE, dtype=dtype))
        float8 = empty_float8(base.shape, dtype, base.device, dynamic=False)
        for rank, working in product(RANKS, (torch.empty_like(base), float8)):
            up, down = (
                torch.zeros(size, dtype=torch.bfloat16) for size in ((SIDE, rank), (rank, SIDE))
            )
            scales = torch.zeros(rank, dtype=torch.float32)
            self.write(working, base, (self._send(up), self._send(down), self._send(scales)))

    def forget(self) -> None:
        """Give back the memory of adapters on the device; they come again where they are wanted."""
        self._held = LruCache(self._limit)

    def _upload(
        self, digests: tuple[str, ...], adapters: Mapping[str, AdapterLike]
    ) -> DeviceAdapterSet | None:
        keys = {key for digest in digests for key in adapters[digest].parameters}
        packed = {
            key: _packed([_deltas(adapters[d], key) for d in digests]) for key in sorted(keys)
        }
        factors = {key: found for key, found in packed.items() if found}
        size = sum(f.up.nbytes + f.down.nbytes for f in factors.values())
        size += sum(adapters[d].nbytes for d in digests if adapters[d].parameters - factors.keys())
        if size > self._limit:
            logger.info("Adapters of %.1f GB are merged from the host", size / GB)
            self._refused.put(digests, True)
            return None
        self._held.make_room(size)
        sent = {
            key: Factors(self._send(f.up), self._send(f.down), f.scalings)
            for key, f in factors.items()
        }
        others = {
            digest: adapters[digest].placed(adapters[digest].parameters - sent.keys(), self._send)
            for digest in digests
        }
        return self._held.put(digests, DeviceAdapterSet(sent, others, LruCache(SCALES)), size)

    def _scaled(self, held: DeviceAdapterSet, scales: Sequence[float]) -> DeviceAdapters:
        """A set of adapters with scales, which are brought in one copy."""
        factors = held.factors.values()
        values = [s * scales[index] for f in factors for index, s in f.scalings]
        together = self._send(torch.tensor(values, dtype=torch.float32))
        parts = torch.split(together, [len(f.scalings) for f in factors])
        for_kernel = [(f.up, f.down, part) for f, part in zip(factors, parts, strict=True)]
        return DeviceAdapters(dict(zip(held.factors, for_kernel, strict=True)), held.adapters)


def _deltas(adapter: AdapterLike, key: ParameterName) -> Sequence[LowRank] | None:
    """What an adapter adds to a weight; see `AdapterLike.low_rank`."""
    return adapter.low_rank(*key) if key in adapter.parameters else ()


def _packed(parts: Sequence[Sequence[LowRank] | None]) -> Factors | None:
    """The LoRA deltas of one weight, a sequence of each adapter, as a single one.

    None: one adapter has others too, or the rank is more than the kernel's.
    """
    deltas = [(i, d) for i, found in enumerate(parts) if found is not None for d in found]
    rank = sum(down.shape[0] for _, (_, down, *_) in deltas)
    if any(found is None for found in parts) or not 0 < rank <= MAX_RANK:
        return None
    dtypes = {t.dtype for _, (up, down, *_) in deltas for t in (up, down)}
    narrow = len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16}
    dtype = dtypes.pop() if narrow else torch.float32
    if len(deltas) == 1 and deltas[0][1][-1].start == 0:
        (_, (up, down, *_)) = deltas[0]
        ups, downs = up.to(dtype), down.to(dtype)
    else:
        ups = torch.zeros(max(rows.stop for _, (*_, rows) in deltas), rank, dtype=dtype)
        column = 0
        for _, (up, down, _, rows) in deltas:
            ups[rows, column : column + down.shape[0]] = up.to(dtype)
            column += down.shape[0]
        downs = torch.cat([down.to(dtype) for _, (_, down, *_) in deltas])
    scalings = [(i, s) for i, (_, down, s, _) in deltas for _ in range(down.shape[0])]
    return Factors(ups, downs, scalings)


class PageLockedWay:
    """The way to a device through page-locked memory, so that the host does not wait.

    torch gives that memory to nobody else until the copy is made. Where the system locks no more,
    the host waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._locks = True

    def __call__(self, tensor: Tensor) -> Tensor:
        """Bring a tensor."""
        if self._locks:
            try:
                locked = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError as error:
                logger.warning("Adapters are sent from memory that is not page-locked: %s", error)
                self._locks = False
            else:
                return locked.copy_(tensor).to(self._device, non_blocking=True)
        return tensor.to(self._device)


def one_pass(device: torch.device, limit: int) -> OnePass | None:
    """What writes weights on a device; None where torch's operators do.

    Args:
        device: where the weights are.
        limit: bytes of it that adapters may take; 0: torch's operators write all weights.
    """
    if device.type != "cuda" or not limit:
        return None
    if find_spec("triton") is None:
        logger.info("Adapters are merged by torch's operators: there is no Triton")
        return None
    try:
        from flux.transformers.lora_kernel import ROUNDS_ONCE_CAPABILITY, write
    except Exception as error:  # a Triton without a compiler or a driver, of many classes
        logger.warning("Adapters are merged by torch's operators", exc_info=error)
        return None
    float8 = torch.cuda.get_device_capability(device) >= ROUNDS_ONCE_CAPABILITY
    return OnePass(partial(write, float8=float8), limit, PageLockedWay(device))
