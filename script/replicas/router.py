"""Which replica serves a request: one that has its adapters in its weights, where that can be.

Serve's own router for multiplexed models learns from the controller what a replica holds, up to a
second later. Here it is known from what was sent there last.
"""

import hashlib
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

OVERTAKEN = 4  # times, at most: then a request is the next, whatever the others need


class AdapterRouter(RequestRouter):  # type: ignore[misc]
    """Serves requests in order, except that one goes first whose adapters are in a free replica.

    A request whose adapters are nowhere goes to the free replica that is the first for them by
    rendezvous hashing (Thaler and Ravishankar, 1998), so that an adapter tends to return to where
    it was. Its id is that of the multiplexed model; requests without adapters have the empty one.
    """

    max_num_routing_tasks = 50  # waiting requests that are looked at; Serve's is two a replica

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._holds: dict[ReplicaID, str] = {}
        self._waiting: list[PendingRequest] = []  # the first one is next
        self._overtaken = 0  # times since it became the first
        self._open: Counter[ReplicaID] = Counter()  # requests that were sent and have not ended

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas that may take a request now, the best first; none: it waits."""
        # Serve's count of a replica's requests can be too high for up to ten seconds: one stays in
        # it that was cancelled on its way, or that ended just after the replica was asked. So one
        # with no open request may be free, whatever the count; Serve asks again before it sends.
        counted = self.select_available_replicas(candidate_replicas)
        free = [r for r in candidate_replicas if r in counted or not self._open[r.replica_id]]
        if pending_request is None:
            return [free]
        pending_request.routing_context.should_backoff = True
        others = [p for p in self._waiting if p is not pending_request and not p.future.done()]
        self._waiting = sorted([*others, pending_request], key=lambda each: each.created_at)
        first, may_pass = self._waiting[0], self._overtaken < OVERTAKEN
        adapters = pending_request.metadata.multiplexed_model_id
        warm = [r for r in free if self._holds.get(r.replica_id) == adapters]
        if warm and (may_pass or pending_request is first):
            return [warm]
        if pending_request is not first:
            return []
        behind = {each.metadata.multiplexed_model_id for each in self._waiting[1:]}
        cold = [r for r in free if not may_pass or self._holds.get(r.replica_id) not in behind]
        return [[r] for r in sorted(cold, key=lambda r: _order(adapters, r.replica_id))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, *_: Any
    ) -> None:
        """Remember what a replica holds from now on."""
        self._holds[replica_id] = pending_request.metadata.multiplexed_model_id
        began = pending_request.created_at
        passes = any(p.created_at < began and not p.future.done() for p in self._waiting)
        self._overtaken = self._overtaken + 1 if passes else 0

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a request that was sent, which the replica may still reject."""
        super().on_send_request(replica_id)
        self._open[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, _: str) -> None:
        """Count one less; Serve calls this for one that could not be sent, too."""
        self._open[replica_id] = max(0, self._open[replica_id] - 1)


def _order(adapters: str, replica: ReplicaID) -> bytes:
    return hashlib.sha256(f"{adapters} {replica.unique_id}".encode()).digest()
