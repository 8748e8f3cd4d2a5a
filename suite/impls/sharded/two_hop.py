"""Two-hop gradient synchronisation: how gradients become sums over the world, in the owners' hands.

Hop 1 reduce-scatters a unit's gradients in the partition group, at every micro-step, while backward
goes on. Hop 2 adds the shards up across the replication group, after the last micro-step only,
overlapped with the rest of its backward (S2, "Two-hop gradient synchronization").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from suite.impls.sharded.chain import Errand, make_chain
from suite.impls.sharded.collectives import Handle, Piece, Reduction, Transfer, flatten, join_small
from suite.impls.sharded.groups import Groups
from suite.impls.sharded.ledger import Ledger
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.units import Bucket
from suite.impls.trace import Kind, Trace

REDUCTIONS_IN_FLIGHT = 2
"""How many units' gradients may be on their way: one being sent while the next is computed."""

TRAINING, SECOND_HOP = "training", "second hop"
"""Who makes collectives: the training thread, and the chain that goes on behind it."""


@dataclass(frozen=True)
class Sent:
    """Gradients of one unit on their way, by hop 1 or by both."""

    name: str
    since: float
    transfer: Transfer
    addends: list[Addend]

    def wait_hop1(self) -> None:
        if isinstance(self.transfer, Errand):
            self.transfer.wait_stages()
        else:
            self.transfer.wait()


@dataclass
class Addend:
    """What hop 1 leaves on this rank: a shard of the group's sum of one bucket.

    It lies in the bucket's gradient, or *aside* when it must not be mixed with what is there: that
    has been through hop 2 already.
    """

    bucket: Bucket
    shard: Tensor
    hop2: bool
    """Whether it goes on to hop 2 at once."""

    @property
    def aside(self) -> bool:
        return self.shard is not self.bucket.gradient


class TwoHop:
    """All gradients of a rank on their way; `wire` is the dtype in which they travel.

    `last` may be left out or be wrong without harm to the result: what arrives after a hop 2 gets a
    hop 2 of its own, what never had one gets it in `finish`.
    """

    def __init__(
        self,
        groups: Groups,
        options: EngineOptions,
        wire: torch.dtype,
        device: torch.device,
        trace: Trace,
        ledger: Ledger,
    ) -> None:
        self._groups = groups
        self._ledger = ledger
        self._options = options
        self._wire = wire
        self.trace = trace
        self._chain = make_chain(device)
        self._hop1: deque[Sent] = deque()
        """Whose gradients may still be held by hop 1."""
        self._sent: deque[Sent] = deque()
        """Of this step, in order."""
        self.expected_inter_node_bytes = 0.0
        """What the topology says that gradients have had a node send to others."""

    def reduce(self, buckets: Sequence[Bucket], last: bool, name: str) -> None:
        """Takes the gradients out of these buckets' parameters and sends them on hop 1; `name` is for
        the trace."""
        calls = [list(buckets)] if self._options.coalesced else [[bucket] for bucket in buckets]
        self._catch_up(buckets)
        for call in calls:
            reductions, addends = zip(*(self._take(bucket, last) for bucket in call), strict=True)
            self._ledger.enter(TRAINING, "reduce", name, sum(bucket.nbytes for bucket in call))
            handle = self._groups.partition.reduce_scatter(reductions)
            for bucket in call:
                self.expected_inter_node_bytes += self._groups.topology.gather_inter_node_bytes(bucket.nbytes)
            self._send_on(handle, list(addends), name)
        while len(self._hop1) > REDUCTIONS_IN_FLIGHT * max(1, len(calls)):
            self._wait_for_oldest()

    def _catch_up(self, buckets: Sequence[Bucket]) -> None:
        """What is to be added to must be there: in a model of one or two units the sum of the last
        micro-step may still be on its way, and hop 2 would run ahead of it."""
        growing = {id(b) for b in buckets if b.has_gradient and not b.synchronized}
        while any(id(item.bucket) in growing for sent in self._hop1 for item in sent.addends):
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        with self.trace.span(Kind.WAIT, f"reduce {self._hop1[0].name}"):
            self._hop1.popleft().wait_hop1()

    def finish(self, buckets: Sequence[Bucket]) -> None:
        """Waits until the gradients of all these (trainable) buckets are complete sums over the world.

        What no micro-step of this step has written is zero then, not the last step's.
        """
        self.settle()
        replicated = self._groups.replication.size > 1
        missing = [b for b in buckets if replicated and b.has_gradient and not b.synchronized]
        for bucket in missing:
            bucket.synchronized = True
        self._send_on(
            Handle(()), [Addend(bucket, _gradient(bucket), hop2=True) for bucket in missing], "rest"
        )
        self.settle()
        for bucket in buckets:
            if not bucket.has_gradient and bucket.owned_gradient is not None:
                bucket.owned_gradient.zero_()

    def reset(self, buckets: Sequence[Bucket]) -> None:
        """A new step begins: what the gradients hold is of the past."""
        for bucket in buckets:
            bucket.has_gradient = bucket.synchronized = False

    def _take(self, bucket: Bucket, last: bool) -> tuple[Reduction, Addend]:
        """A bucket's new gradients: what is to be reduced, and what becomes of the sum."""
        gradient = _gradient(bucket)
        aside = bucket.synchronized
        hop2 = self._groups.replication.size > 1 and (last or aside or not self._options.two_hop)
        shard = torch.empty_like(gradient) if aside else gradient
        accumulate = bucket.has_gradient and not aside
        bucket.has_gradient = True
        bucket.synchronized |= hop2
        return Reduction(shard, self._pieces(bucket), accumulate), Addend(bucket, shard, hop2)

    def _pieces(self, bucket: Bucket) -> list[Piece]:
        """The parameters' gradients. One that got none this time counts as zero."""
        pieces: list[Piece] = []
        for slot in bucket.slots:
            gradient = slot.parameter.grad
            slot.parameter.grad = None
            if gradient is None:
                gradient = torch.zeros(slot.numel, dtype=bucket.full.dtype, device=bucket.full.device)
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            pieces.append((slot.offset, dense.contiguous()))
        if self._options.group_batched:
            return join_small(pieces)
        return [(0, flatten(pieces, bucket.numel, bucket.full))]

    def expect_refresh(self, buckets: Sequence[Bucket]) -> None:
        """The owners' new weights are about to go to the replicas: the other half of an all-reduce."""
        volume = sum(bucket.nbytes for bucket in buckets)
        self.expected_inter_node_bytes += self._groups.topology.hop2_inter_node_bytes(volume) / 2

    def _send_on(self, hop1: Handle, addends: list[Addend], name: str) -> None:
        """Hop 2 follows hop 1 without the compute having to come by."""
        going_on = [item for item in addends if item.hop2]
        since = self.trace.now()
        transfer: Transfer = hop1
        if going_on:
            self._expect_hop2(going_on)

            def job() -> Sequence[Transfer]:
                hop1.join()
                return [self._start_hop2(going_on, name)]

            transfer = self._chain.run(job, hop1.forget)
        if not self._options.fine_grained_sync:
            transfer.wait()
        sent = Sent(name, since, transfer, addends)
        self._hop1.append(sent)
        self._sent.append(sent)

    def _start_hop2(self, addends: list[Addend], name: str) -> Handle:
        """To the owners: all of the group where it owns alike, else one part each."""
        self._ledger.enter(SECOND_HOP, "all-reduce", name, sum(item.shard.nbytes for item in addends))
        if self._options.optimizer_sharding == "world":
            return self._groups.replication.reduce_scatter(
                [
                    Reduction(_owned(item.bucket), [(0, item.shard.to(self._wire))], item.aside)
                    for item in addends
                ]
            )
        return self._groups.replication.all_reduce([item.shard for item in addends], self._wire)

    def _expect_hop2(self, addends: list[Addend]) -> None:
        share = self._groups.topology.hop2_inter_node_bytes(sum(item.bucket.nbytes for item in addends))
        self.expected_inter_node_bytes += share / 2 if self._options.optimizer_sharding == "world" else share

    def settle(self) -> None:
        """Waits for everything that has been sent, and adds what was set aside. Before the replication group
        is used from the training thread: calls that the chain has yet to make would come in between, on
        each rank elsewhere."""
        self._hop1.clear()
        while self._sent:
            sent = self._sent.popleft()
            with self.trace.span(Kind.WAIT, f"reduce {sent.name}"):
                sent.transfer.wait()
            self.trace.add(Kind.REDUCE, sent.name, sent.since)
            if self._options.optimizer_sharding != "world":
                for item in sent.addends:
                    if item.aside:
                        _gradient(item.bucket).add_(item.shard)

    def close(self) -> None:
        self._chain.close()


def _gradient(bucket: Bucket) -> Tensor:
    assert bucket.gradient is not None, "only trainable buckets are reduced"
    return bucket.gradient


def _owned(bucket: Bucket) -> Tensor:
    assert bucket.owned_gradient is not None
    return bucket.owned_gradient
