"""Trajectory attention against the paper's equations written out literally."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agents.attention import TrajectoryAttention

# (B, T', S, D, heads), with one step, one position, one head, more heads than steps
SHAPES = [(2, 3, 4, 8, 2), (1, 1, 5, 6, 3), (2, 4, 1, 8, 2), (1, 1, 1, 4, 1), (2, 2, 3, 15, 5)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make(dim: int, heads: int, dtype: torch.dtype = torch.float64) -> TrajectoryAttention:
    """A module whose weights keep the scale of its input, so that attention is far from uniform."""
    module = TrajectoryAttention(dim, heads).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=dim**-0.5)
    return module


def literal(module: TrajectoryAttention, x: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """Equations of Patrick et al. 2021, section 3, term by term: every trajectory token is projected."""
    heads, (b, t, s, d) = module.num_heads, x.shape
    scale = (d // heads) ** -0.5
    q, k, v = (y.reshape(b, t, s, heads, -1) for y in module.qkv(x).chunk(3, -1))
    spatial = (torch.einsum("btshd,buphd->bhtsup", q, k) * scale).softmax(-1)
    trajectory = torch.einsum("bhtsup,buphd->btsuhd", spatial, v).reshape(b, t, s, t, d)
    own = torch.stack([trajectory[:, i, :, i] for i in range(t)], 1)
    q2 = module.proj_q(own).reshape(b, t, s, heads, -1)
    k2 = module.proj_k(trajectory)
    if key_bias is not None:
        k2 = k2 + key_bias
    v2 = module.proj_v(trajectory).reshape(b, t, s, t, heads, -1)
    logits = torch.einsum("btshd,btsuhd->bhtsu", q2, k2.reshape(b, t, s, t, heads, -1)) * scale
    return module.proj(torch.einsum("bhtsu,btsuhd->btshd", logits.softmax(-1), v2).reshape(b, t, s, d))


class LargestTensor(TorchDispatchMode):
    """Remembers the element count of the largest tensor that any operation returned, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def largest(forward: Callable[[Tensor], Tensor], x: Tensor) -> int:
    with LargestTensor() as seen:
        forward(x).square().sum().backward()
    return seen.numel


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_literal_equations(shape: tuple[int, ...]) -> None:
    *size, dim, heads = shape
    module, x = make(dim, heads), torch.randn(*size, dim, dtype=torch.float64)
    expected = literal(module, x)
    assert module(x).shape == x.shape
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_the_literal_equations(shape: tuple[int, ...]) -> None:
    *size, dim, heads = shape
    module, x = make(dim, heads), torch.randn(*size, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*size, dim, dtype=torch.float64)
    inputs = dict(module.named_parameters(), x=x)
    ours = torch.autograd.grad((module(x) * weight).sum(), list(inputs.values()))
    expected = torch.autograd.grad((literal(module, x) * weight).sum(), list(inputs.values()))
    for name, a, b in zip(inputs, ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8, msg=f"gradient of {name} is off")


def test_float32_agrees_with_float64() -> None:
    module, x = make(24, 4), torch.randn(2, 4, 9, 24, dtype=torch.float64)
    expected = literal(module, x).float()
    torch.testing.assert_close(module.float()(x.float()), expected, rtol=0, atol=1e-5)


def test_a_bias_on_the_temporal_key_would_change_nothing() -> None:
    module, x = make(8, 2), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    biased = literal(module, x, key_bias=torch.randn(8, dtype=torch.float64))
    torch.testing.assert_close(module(x), biased, rtol=0, atol=1e-10)


def test_each_clip_is_attended_on_its_own() -> None:
    module, x = make(8, 2), torch.randn(3, 2, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("steps", "heads"), [(3, 2), (2, 4), (1, 4)])
def test_no_tensor_is_larger_than_trajectory_tokens_or_folded_queries(steps: int, heads: int) -> None:
    batch, positions, dim = 2, 30, 8
    tokens = steps * positions
    module = make(dim, heads, torch.float32)
    x = torch.randn(batch, steps, positions, dim)
    # with fewer than three steps and heads the fused projection to queries, keys and values is the larger one
    bound = batch * tokens * dim * max(steps, heads, 3)
    assert largest(lambda y: literal(module, y), x) >= batch * heads * tokens * tokens > bound
    assert largest(module, x) <= bound


def test_compiles_into_one_graph() -> None:
    module, x = make(8, 4, torch.float32), torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


def test_weights_start_as_in_timm() -> None:
    module = TrajectoryAttention(96, 4)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


@pytest.mark.parametrize(("dim", "heads"), [(10, 4), (8, 0), (0, 2)])
def test_a_width_that_heads_cannot_share_is_refused(dim: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"dim={dim} .*num_heads={heads}:"):
        TrajectoryAttention(dim, heads)


def test_tokens_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 12, 8\); expected \[B, T', S, 8\]"):
        TrajectoryAttention(8, 2)(torch.zeros(2, 12, 8))
