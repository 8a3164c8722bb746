"""What a computation asks of a device, counted without one: operations, bytes moved, kernels, memory; and a bound on
its time.

The computation runs eagerly, on any device; on ``meta``, where tensors have shapes and no values, a training step of a
large network is counted in seconds. What is counted is not the eager run, though, but what ``torch.compile`` would make
of it, by the rules of ``fusion.py``. Pointwise arithmetic is not counted as operations, for memory bounds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from experiments.fusion import Kernel, Operation, Place, Plan, Sources, Storage, Value

aten = torch.ops.aten
FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
H100_FLOPS = 752e12
"""Operations a second of a bfloat16 matrix product 8192 x 8192 x 8192, measured on an H100 with 80 GB."""
H100_BYTES = 3.35e12
"""Bytes a second of its memory, by NVIDIA's data sheet (H100 SXM5)."""
_ALONE = ("sort", "topk", "cum", "logcum", "scatter", "index_put", "index_add", "linalg", "_foreach", "_fused")
_INDEXED = ("gather", "index", "index_select", "embedding")  # these read only as much as they return
_COPIES = (*_INDEXED, "_to_copy", "clone", "copy_", "cat", "stack", "arange", "zeros", "ones", "full", "scalar_tensor")
_OVERWRITES = ("copy_", "fill_", "zero_")


class Counts(NamedTuple):
    """What a computation takes."""

    flops: int
    """Floating-point operations of matrix products and attention, multiplications and additions apart."""
    bytes: int
    """Read from and written to memory."""
    launches: int
    """Kernels."""
    peak_bytes: int
    """The most that is held at a time: what the computation makes and, throughout, all that it found and used."""
    kernels: tuple[Kernel, ...]


def predict(counts: Counts, flops_per_second: float, bytes_per_second: float) -> float:
    """Seconds that a device needs at least: each kernel takes as long as its operations or its bytes, whichever lasts.

    Williams et al., "Roofline", 2009, kernel by kernel.
    """
    return sum(max(kernel.flops / flops_per_second, kernel.bytes / bytes_per_second) for kernel in counts.kernels)


def count(function: Callable[[], Any], *, fused: bool = True) -> Counts:
    """Count what a call of ``function`` takes: forward and backward passes, optimiser steps, whatever runs in it.

    What an optimiser makes in its first step counts as made by it: call ``function`` once before. Tensors on ``meta``
    are treated as on a GPU: matrix products in bfloat16 by autocast's rules, and fused attention. Operations on the CPU
    are left out if there are others.

    Args:
        function: not compiled, for compiled code hides its operations.
        fused: as one compiled graph; else every operation is a kernel, as in eager PyTorch, and memory is held for as
            long as it is there.
    """
    return _count(function, (), Place("", "" if fused else None))[""]


class Part(NamedTuple):
    """Calls of a method that are counted apart."""

    name: str
    owner: Any
    """An object or a class."""
    method: str
    graph: str | None = None
    """The compiled graph that it belongs to; forward and backward pass are of one. None if it runs as what calls it."""


def count_parts(function: Callable[[], Any], parts: Iterable[Part], rest: str = "rest") -> dict[str, Counts]:
    """``count`` by parts, in the order in which they are first met; the ``rest`` runs eagerly.

    A part's memory is the most that is held at a time while it runs, whoever made it. A call within another part's
    counts there. Between graphs whatever is handed over passes through memory.
    """
    return _count(function, parts, Place(rest, None))


def _count(function: Callable[[], Any], parts: Iterable[Part], place: Place) -> dict[str, Counts]:
    trace = _Trace(place)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(patch.object(part.owner, part.method, trace.within(part)))
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", _backward(_engine_run_backward)))
        stack.enter_context(_AsOnGPU())
        stack.enter_context(trace)
        result = function()
    return trace.counts(result)


class _AsOnGPU(TorchFunctionMode):
    """For tensors on ``meta``, what a GPU does: autocast to bfloat16, and attention in one kernel."""

    LOWER = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.einsum, torch.bmm, torch.mm, F.conv3d)
    FLOAT32 = (F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, torch.sum, Tensor.sum, Tensor.logsumexp)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        def cast(dtype: torch.dtype, *of: torch.dtype) -> Any:
            return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_meta and x.dtype in of else x, (args, kwargs))

        kwargs = kwargs or {}
        if func in self.LOWER or func is F.scaled_dot_product_attention:
            args, kwargs = cast(torch.bfloat16, torch.float32, torch.float16)
        elif func in self.FLOAT32:
            args, kwargs = cast(torch.float32, torch.bfloat16, torch.float16)
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return aten._scaled_dot_product_flash_attention(*args[:3], scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


def _backward(engine: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd's engine, under a mode of its own: backward() calls it with the mode off, and forward passes are made
    anew in it where activations are checkpointed."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _AsOnGPU():
            return engine(*args, **kwargs)

    return run


class _Trace(TorchDispatchMode):
    """Records each operation with what it reads and writes."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.rest = self.place = place
        self.operations: list[Operation] = []
        self._present: dict[int, Value] = {}
        self._parameters: dict[int, Tensor] = {}

    def within(self, part: Part) -> Callable[..., Any]:
        """The part's method, whose operations belong to it."""
        method = getattr(part.owner, part.method)

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            outside = self.place
            self.place = Place(part.name if outside is self.rest else outside.part, part.graph or outside.graph)
            try:
                return method(*args, **kwargs)
            finally:
                self.place = outside

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in FORMULAS:  # under inference_mode compound operations arrive whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._record(func, packet, args, kwargs, result)
        return result

    def _record(self, func: Any, packet: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        name = packet.__name__
        if name.startswith(("empty", "new_empty")):
            return
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        changed = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        known = {x.untyped_storage()._cdata for x in inputs}
        made = [x for x in outputs if x.untyped_storage()._cdata not in known]
        if not changed and not made:
            return  # a view
        index = len(self.operations)
        overwritten = {id(x) for x in changed} if name in _OVERWRITES or "out" in kwargs else set()
        reads: Sources = {}
        for x in inputs:
            if x.is_leaf and x.requires_grad:
                self._parameters[id(x)] = x
            if id(x) in overwritten and _num_bytes(x) >= x.untyped_storage().nbytes():
                continue
            size = 0 if id(x) in overwritten else _num_bytes(x)
            if x is inputs[0] and name in _INDEXED:
                size = min(size, sum(y.numel() * y.element_size() for y in outputs))
            value = self._value(x)
            reads[value, (x.storage_offset(), x.shape, x.stride())] = size
        flops = FORMULAS[packet](*args, **kwargs, out_val=result) if packet in FORMULAS else 0
        device = (made or changed)[0].device.type
        alone = self.place.graph is None or packet in FORMULAS or name.startswith(_ALONE) or _sums_columns(name, args)
        repeatable = not changed and (torch.Tag.pointwise in func.tags or name.removeprefix("new_") in _COPIES)
        operation = Operation(index, name, device, self.place, flops, alone, repeatable, reads)
        self.operations.append(operation)
        for value, _ in reads:
            value.readers.append(operation)
        for x in {id(x): x for x in (*changed, *made)}.values():
            operation.writes.append(self._value(x, operation))

    def _value(self, x: Tensor, maker: Operation | None = None) -> Value:
        """What ``x`` holds; with a maker, what that has just written to it."""
        memory = x.untyped_storage()
        value = self._present.get(key := memory._cdata)
        if value is None or maker is not None:
            if value is None:
                made = -1 if maker is None else maker.index
                storage = Storage(memory.nbytes(), made, self.place.graph is None)

                def forget(_: Any) -> None:
                    storage.died = len(self.operations)
                    del self._present[key]

                storage.ref = weakref.ref(memory, forget)
            else:
                storage, value.written_over = value.storage, True
            value = self._present[key] = Value(storage, min(_num_bytes(x), storage.size), maker)
        return value

    def counts(self, result: Any) -> dict[str, Counts]:
        """Work out what was recorded, by part; ``result`` is what the computation returned."""
        devices = {operation.device for operation in self.operations}
        operations = [x for x in self.operations if x.device != "cpu" or devices == {"cpu"}]
        kept = [x for x in _tensors(result)] + [p.grad for p in self._parameters.values() if p.grad is not None]
        returned = {self._present[key] for x in kept if (key := x.untyped_storage()._cdata) in self._present}
        touched = {value.storage for x in operations for value in (*(value for value, _ in x.reads), *x.writes)}
        left = {value for value in self._present.values() if value.storage in touched} - returned
        plan = Plan(operations, returned, left)
        found, peaks = {self.rest.part: [], **plan.kernels()}, plan.peak_bytes()
        return {
            name: Counts(
                sum(x.flops for x in kernels), sum(x.bytes for x in kernels), len(kernels), peaks[name], tuple(kernels)
            )
            for name, kernels in found.items()
        }


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _num_bytes(x: Tensor) -> int:
    """Of the distinct elements of a view."""
    return prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size) * x.element_size()


def _sums_columns(name: str, args: Any) -> bool:
    """Whether it sums a matrix down its columns, as for the gradient of a bias: that can't be done row by row."""
    if name != "sum" or len(args) < 2 or not args[1]:
        return False
    last = args[0].ndim - 1
    return args[0].ndim > 1 and not {-1, last} & set(args[1]) and args[0].shape[-1] > 1
