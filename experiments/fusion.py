"""What ``torch.compile`` would make of operations that ran eagerly: which of them are one kernel, and what is stored.

- matrix products, attention, sorting, running sums, scattering, norms over all parameters and sums down a matrix's
  columns are kernels of their own, which read their inputs and write their outputs once;
- all that lies between two of them, linked by data, is one kernel, which reads what comes from outside and writes what
  is used outside; nothing inside it passes through memory;
- what such a kernel could compute anew from no more bytes than it takes to store (a cast to a wider type, say) is
  neither written nor kept, as in the min-cut partitioner of AOTAutograd;
- memory is held from the first write to the last use.

The rules are kind: a real compiler fuses less.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """One launch: floating-point operations, and bytes read and written."""

    name: str
    flops: int
    bytes: int


class Place(NamedTuple):
    """Where an operation belongs: a part of the computation, and a compiled graph; None where it ran eagerly."""

    part: str
    graph: str | None


@dataclass(eq=False)
class Storage:
    """A piece of memory."""

    size: int
    made: int
    """The operation that first wrote to it, -1 if it was there before."""
    eager: bool
    """Whether that ran eagerly; then it is held until it is freed, at the operation ``died``."""
    died: int | None = None
    ref: Any = None


@dataclass(eq=False)
class Value:
    """What a piece of memory holds from one write to the next; ``maker`` is None if it was there before."""

    storage: Storage
    size: int
    maker: Operation | None = None
    readers: list[Operation] = field(default_factory=list)
    written_over: bool = False


Sources = dict[tuple[Value, Any], int]
"""What is read: a value, by which view, and how many bytes that is."""


@dataclass(eq=False)
class Operation:
    """One operation that ran, and was no view."""

    index: int
    name: str
    device: str
    place: Place
    flops: int
    alone: bool
    """Whether it is a kernel of its own."""
    repeatable: bool
    """Whether its results can be had again, element by element."""
    reads: Sources
    writes: list[Value] = field(default_factory=list)
    stage: int = 0
    """Kernels of their own on the longest way to it; what has the same number can be fused without a cycle."""
    group: Operation | None = None


class Plan:
    """Shares operations out over kernels, and decides what is stored."""

    def __init__(self, operations: list[Operation], returned: set[Value], left: set[Value]) -> None:
        self.operations, self.returned, self.left = operations, returned, left
        self._sources: dict[Value, Sources | None] = {}
        self.loads: dict[Operation, Sources] = {}
        self.stored: set[Value] = set()
        self.last_use: dict[Storage, int] = {}
        self._share_out()
        self._place()

    def _share_out(self) -> None:
        for x in self.operations:
            makers = (value.maker for value, _ in x.reads if value.maker is not None)
            x.stage = max((maker.stage for maker in makers), default=0) + x.alone
            x.group = x
        for x in reversed(self.operations):  # what changes memory in place can wait for what follows on it
            readers = [reader for value in x.writes for reader in value.readers]
            if not x.alone and readers and all(value.storage.made == -1 for value in x.writes):
                x.stage = max(x.stage, min(reader.stage - reader.alone for reader in readers))
        for x in self.operations:
            for value, _ in x.reads:
                maker = value.maker
                if maker and not (x.alone or maker.alone) and (maker.stage, maker.place) == (x.stage, x.place):
                    _root(maker).group = _root(x)

    def _must_store(self, value: Value) -> bool:
        """Whether a value made within a fused kernel has to be in memory: others than fused kernels want it."""
        return (
            value in self.returned
            or (value.storage.made == -1 and not value.written_over)
            or any(x.alone or x.place.graph != value.maker.place.graph for x in value.readers if value.maker)
        )

    def source(self, value: Value) -> Sources | None:
        """What a fused kernel reads to have a value from outside it, if that is not the value itself."""
        maker = value.maker
        if maker is None or maker.alone or not maker.repeatable or self._must_store(value):
            return None
        if value not in self._sources:
            found = self._from_outside(maker)
            self._sources[value] = found if sum(found.values()) <= value.size else None
        return self._sources[value]

    def _from_outside(self, x: Operation) -> Sources:
        found: Sources = {}
        for (value, view), size in x.reads.items():
            source = self.source(value)
            found |= {(value, view): size} if source is None else source
        return found

    def _place(self) -> None:
        """Decide what each kernel loads and stores: backwards, for what nobody wants is not computed."""
        end = len(self.operations) and self.operations[-1].index + 1
        for value in self.returned | self.left:
            source = None if value in self.returned else self.source(value)
            for held, _ in {(value, None): 0} if source is None else source:
                self._keep(held, end)
        wanted: set[Value] = set()
        for x in reversed(self.operations):
            if not x.alone and not any(v in self.stored or v in wanted or self._must_store(v) for v in x.writes):
                continue
            self.loads[x] = {}
            for (value, view), size in x.reads.items():
                inside = value.maker is not None and not x.alone and _root(value.maker) is _root(x)
                if inside:
                    wanted.add(value)
                    continue
                source = None if x.alone else self.source(value)
                self.loads[x] |= {(value, view): size} if source is None else source
            for value, _ in self.loads[x]:
                self._keep(value, x.index)
            for value in x.writes:
                if x.alone or self._must_store(value):
                    self._keep(value, x.index)

    def _keep(self, value: Value, until: int) -> None:
        self.stored.add(value)
        self.last_use[value.storage] = max(until, self.last_use.get(value.storage, -1))

    def kernels(self) -> dict[str, list[Kernel]]:
        """The kernels of each part, in the order of their first operations."""
        groups: dict[Operation, list[Operation]] = defaultdict(list)
        for x in self.operations:
            if x in self.loads:
                groups[_root(x)].append(x)
        found: dict[str, list[Kernel]] = defaultdict(list)
        for members in groups.values():
            loads: Sources = {}
            for x in members:
                loads |= self.loads[x]
            by_value: dict[Value, int] = defaultdict(int)
            for (value, _), size in loads.items():
                by_value[value] += size
            moved = sum(min(size, value.storage.size) for value, size in by_value.items())
            moved += sum(value.size for x in members for value in x.writes if value in self.stored)
            found[members[0].place.part].append(Kernel(members[-1].name, sum(x.flops for x in members), moved))
        return found

    def peak_bytes(self) -> dict[str, int]:
        """The most that lives at a time, in each part."""
        changes: dict[int, int] = defaultdict(int)
        for storage, until in self.last_use.items():
            if storage.eager and storage.died is not None:
                until = storage.died - 1
            changes[max(storage.made, 0)] += storage.size
            if storage.made >= 0:
                changes[until + 1] -= storage.size
        live, peaks, parts = 0, defaultdict[str, int](int), {x.index: x.place.part for x in self.operations}
        for index in range(max(parts, default=-1) + 1):
            live += changes[index]
            if (part := parts.get(index)) is not None:
                peaks[part] = max(peaks[part], live)
        return peaks


def _root(x: Operation) -> Operation:
    while x.group is not x and x.group is not None:
        x.group = x.group.group
        x = x.group or x
    return x
