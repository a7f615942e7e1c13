"""What was used last, within a limit."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Values by key; the least recently used leave first.

    Args:
        limit: of the sizes of all together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        """Whether a key is here still."""
        return key in self._held

    def get(self, key: K) -> V | None:
        """The value of a key, if it is here still."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def make_room(self, size: int) -> None:
        """Let values leave until one more of this size keeps to the limit."""
        while self._held and sum(s for _, s in self._held.values()) + size > self._limit:
            self._held.popitem(last=False)

    def put(self, key: K, value: V, size: int = 1) -> V:
        """Keep a value, unless it is over the limit by itself, and return it."""
        self._held.pop(key, None)
        if size <= self._limit:
            self.make_room(size)
            self._held[key] = (value, size)
        return value
