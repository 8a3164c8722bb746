"""Encoder and sampler as ONNX graphs that take bytes, checked in onnxruntime against what they were made of."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.refusals import ConfigError
from tats_env.grid import TokenGrid, visible_mask
from tats_env.mae import MAELearner
from tats_env.mae.model import gather_tokens

TOLERANCE = 1e-4
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRACED, _CHECKED = 3, 5  # clips, of which no graph may remember how many there were
_LARGEST = 2**31 - 2**24
"""Bytes of weights that fit into one file, whose format ends at 2 GiB."""


class EncoderGraph(nn.Module):
    """Clips uint8 [B, T, H, W, 3] and visible tokens int64 [B, K] -> latents [B, K, D]."""

    def __init__(self, mae: MAELearner) -> None:
        super().__init__()
        self.mae, self.model = mae, mae.model

    def forward(self, clips: Tensor, visible: Tensor) -> Tensor:
        """As the class says."""
        patches = gather_tokens(self.mae.grid.patchify(clips), visible)
        return self.model.encode(self.mae.normalize(patches), visible)


class SamplerGraph(nn.Module):
    """Clips uint8 [B, T, H, W, 3] -> logits [B, N], by way of the MAE's embedding.

    Args:
        mae: which the sampler was trained with.
        network: observation [B, T', S, D] -> logits [B, N], or a tuple that begins with them.
    """

    def __init__(self, mae: MAELearner, network: nn.Module) -> None:
        super().__init__()
        self.mae, self.model, self.network = mae, mae.model, network

    def forward(self, clips: Tensor) -> Tensor:
        """As the class says."""
        grid = self.mae.grid
        tokens = self.model.tokens(self.mae.normalize(grid.patchify(clips)))
        found = self.network(tokens.unflatten(1, (grid.num_steps, grid.num_positions)))
        return found[0] if isinstance(found, tuple) else found


def check_installed() -> None:
    """Raise ConfigError, with what to install, unless all packages are there."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx: needs {' and '.join(missing)}: pip install 'tats-env[onnx]'")


def random_clips(grid: TokenGrid, count: int) -> Tensor:
    """Noise as bytes, the same every time: [count, T, H, W, 3]."""
    shape = (count, grid.num_frames, grid.height, grid.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def random_tokens(grid: TokenGrid, count: int, num_visible: int) -> Tensor:
    """Different tokens of each clip, the same every time: int64 [count, num_visible], ascending."""
    order = torch.rand(count, grid.num_tokens, generator=torch.Generator().manual_seed(count)).argsort(1)
    return order[:, :num_visible].sort(dim=1).values


@torch.no_grad()
def write_encoder(mae: MAELearner, path: Path) -> str:
    """Write encoder.onnx; returns what the check found. Batch and number of visible tokens are free.

    Raises:
        ConfigError: if it computes something else than the MAE.
    """
    graph, n = EncoderGraph(mae).eval(), mae.grid.num_tokens

    def inputs(count: int, num_visible: int) -> dict[str, Tensor]:
        return {"clips": random_clips(mae.grid, count), "visible": random_tokens(mae.grid, count, num_visible)}

    traced, checked = (inputs(_TRACED, max(2, n // 2)), inputs(_CHECKED, max(1, n // 4)))
    _write(graph, traced, {"clips": ["clip"], "visible": ["clip", "token"]}, "latents", path)
    return _told(path, *_compared(graph, checked, path))


@torch.no_grad()
def write_sampler(mae: MAELearner, network: nn.Module, num_visible: int, path: Path) -> str:
    """Write sampler.onnx; returns what the check found. The batch is free.

    Args:
        network: as of ``SamplerGraph``.
        num_visible: K, of the tokens that the check looks for.

    Raises:
        ConfigError: if it computes something else than the sampler.
    """
    graph = SamplerGraph(mae, network).eval()
    traced, checked = ({"clips": random_clips(mae.grid, count)} for count in (_TRACED, _CHECKED))
    _write(graph, traced, {"clips": ["clip"]}, "logits", path)
    ours, theirs = _compared(graph, checked, path)
    chosen = [visible_mask(x.topk(num_visible).indices, x.shape[1]) for x in (ours, theirs)]
    same = int((chosen[0] & chosen[1]).sum())
    return f"{_told(path, ours, theirs)}; {same} of the {num_visible * len(ours)} tokens with the highest logits agree"


def _write(graph: nn.Module, inputs: dict[str, Tensor], free: dict[str, list[str]], output: str, path: Path) -> None:
    """Trace a graph on some inputs and write it.

    Args:
        free: names of each input's first axes, which may have any length.
    """
    axes = {name: torch.export.Dim(name) for names in free.values() for name in names}
    weights = sum(x.numel() * x.element_size() for x in graph.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names of axes, and of what becomes of torch's own modules
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes={name: {i: axes[axis] for i, axis in enumerate(free[name])} for name in inputs},
            dynamo=True,  # the older exporter writes the traced batch into the sampler's attention
            external_data=weights > _LARGEST,
            verbose=False,
        )


def _compared(graph: nn.Module, inputs: dict[str, Tensor], path: Path) -> tuple[Tensor, Tensor]:
    """What the module and the file make of the same inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return graph(**inputs), torch.from_numpy(theirs)


def _told(path: Path, ours: Tensor, theirs: Tensor) -> str:
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE:
        raise ConfigError(
            f"{path.name}: differs by {difference:.1e} from the network that it was made of, more than {TOLERANCE:g}; "
            "nothing was exported. Another release of torch or onnxscript may do better"
        )
    return f"{path.name}: differs by at most {difference:.1e} in onnxruntime, on {len(ours)} random clips"
