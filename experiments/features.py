"""The frozen encoder's features of a set's labelled videos, extracted once and cached in a run's folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor

from experiments.checkpoints import whole
from experiments.folder import stored
from tats_env.data import VideoSet
from tats_env.mae import MAELearner

TOKENS_LIMIT = 8 << 30
"""Bytes of a set's tokens up to which they are kept; those of a larger set are encoded whenever they are read."""
LOCK = ".lock"

TokenReader = Callable[[Sequence[np.ndarray]], Iterator[Tensor]]
"""Batches of positions in 0 .. V - 1, each [B], -> their tokens [B, T', S, D] in turn, on the device."""


@dataclass(frozen=True)
class Features:
    """What probes learn from and are tested on: V labelled videos."""

    tokens: TokenReader
    """Reads the encoder's output by batches of videos, float16."""
    pooled: Tensor
    """Its mean over space, frame pair by frame pair: float32 [V, T' * D]."""
    labels: Tensor
    """int64 [V], none of them -1."""

    def __len__(self) -> int:
        return len(self.labels)


def pool(tokens: Tensor) -> Tensor:
    """Tokens [B, T', S, D] -> their mean over space, float32 [B, T' * D]."""
    return tokens.float().mean(2).flatten(1)


def in_batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """An order [V] cut into batches, the last of which may be smaller."""
    return np.split(order, range(batch_size, len(order), batch_size))


class StoredTokens:
    """A ``TokenReader`` of tokens [R, T', S, D] in memory or memory-mapped, of which the rows [V] count."""

    def __init__(self, tokens: np.ndarray, rows: np.ndarray, device: torch.device) -> None:
        self._tokens, self._rows, self._device = tokens, rows, device
        self._resident: Tensor | None = None

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        # Probes pass over them tens of times: read from the disk once, where there is room
        if self._resident is None and self._device.type == "cuda" and self._fits():
            self._resident = torch.from_numpy(np.array(self._tokens)).to(self._device)
        for batch in batches:
            rows = self._rows[batch]
            if self._resident is None:
                yield torch.from_numpy(self._tokens[rows]).to(self._device)
            else:
                yield self._resident[torch.from_numpy(rows).to(self._device)]

    def _fits(self) -> bool:
        return 2 * self._tokens.nbytes <= torch.cuda.mem_get_info(self._device)[0]


class EncodedTokens:
    """A ``TokenReader`` that encodes the middle clip of the videos at ``rows`` [V] each time."""

    def __init__(self, mae: MAELearner, videos: VideoSet, rows: np.ndarray) -> None:
        self.mae, self.videos, self.rows = mae, videos, rows

    def __call__(self, batches: Sequence[np.ndarray]) -> Iterator[Tensor]:
        for i, batch in enumerate(batches):
            clips = self.videos.test_clips(self.rows[batch], 0, 1, self.mae.device)
            if i + 1 < len(batches):
                self.videos.prefetch_test(self.rows[batches[i + 1]], 0, 1, self.mae.device)
            yield self.mae.features(clips).half()


def labelled(videos: VideoSet) -> np.ndarray:
    """Which videos have a label and have not failed to decode so far: indices, ascending."""
    unreadable = {path for path, _ in videos.bad_videos}
    readable = np.array([str(path) not in unreadable for path in videos.paths], dtype=bool)
    return np.flatnonzero((videos.labels >= 0) & readable)


def extract(
    mae: MAELearner, videos: VideoSet, batch_size: int, folder: Path | None, *, tokens: bool, progress: bool = False
) -> Features:
    """Features of the middle clip of each video that has a label and can be decoded.

    ``folder`` holds one entry for each data set and split, which is read as long as weights, videos and clips are
    the same, and is replaced when they are not. It is safe for several processes, and survives a kill.

    Args:
        mae: the frozen encoder, left as it is.
        batch_size: clips that are encoded at a time.
        folder: of the cache; None keeps features in memory only.
        tokens: whether anyone is going to read tokens, rather than the pooled features only.
        progress: show a progress bar.
    """
    encoded = EncodedTokens(mae, videos, labelled(videos))
    # Now, for a video that fails while it is streamed takes on the label of the one that plays in its place
    labels = videos.labels[encoded.rows].copy()
    size = 2 * len(labels) * mae.grid.num_tokens * mae.embed_dim
    keep = tokens and size <= TOKENS_LIMIT
    stored: np.ndarray | None = None
    if folder is None:
        batches: list[np.ndarray] = []
        pooled, failed = _encode(encoded, batch_size, batches.append if keep else None, progress)
        stored = np.concatenate(batches) if keep else None
    else:
        folder.mkdir(parents=True, exist_ok=True)
        cache = _Cache(folder, encoded)
        with FileLock(folder / LOCK):
            if not cache.holds(keep):
                cache.fill(encoded, batch_size, keep, progress)
            pooled, failed, stored = cache.read(keep)
    good = np.setdiff1d(np.arange(len(labels)), failed)
    reader: TokenReader
    if stored is not None:
        reader = StoredTokens(stored, good, mae.device)
    else:
        reader = EncodedTokens(mae, videos, encoded.rows[good])
    return Features(
        reader, torch.from_numpy(pooled[good]).to(mae.device), torch.from_numpy(labels[good]).to(mae.device)
    )


def _encode(
    encoded: EncodedTokens, batch_size: int, keep: Callable[[np.ndarray], Any] | None, progress: bool
) -> tuple[np.ndarray, list[int]]:
    """Pooled features [R, T' * D] of all videos and the positions of those that failed; ``keep`` gets the tokens."""
    batches = in_batches(np.arange(len(encoded.rows)), batch_size)
    each: Iterator[Tensor] = encoded(batches)
    if progress:
        each = iter(track(each, f"features, {encoded.videos.split}", total=len(batches)))
    pooled = []
    for tokens in each:
        pooled.append(pool(tokens).cpu().numpy())
        if keep is not None:
            keep(tokens.cpu().numpy())
    readable = labelled(encoded.videos)
    return np.concatenate(pooled), np.flatnonzero(~np.isin(encoded.rows, readable)).tolist()


class _Cache:
    """One data set's and split's files in a folder: tokens and pooled features, and last of all what they are of."""

    def __init__(self, folder: Path, encoded: EncodedTokens) -> None:
        mae, videos = encoded.mae, encoded.videos
        weights, files = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        for name, x in sorted({**mae.model.state_dict(), **dict(mae.model.named_buffers())}.items()):
            weights.update(name.encode())
            weights.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for v in encoded.rows:
            files.update(f"{videos.paths[v]}\n{videos.lengths[v]}\n".encode("utf-8", "surrogateescape"))
        self._key: dict[str, Any] = {
            "data": videos.name,
            "split": videos.split,
            "num_videos": len(encoded.rows),
            "videos": files.hexdigest(),
            "clip_shape": list(videos.clip_shape),
            "clip_span": videos.clip_span,
            "canvas": list(videos.canvas),
            "sampling": videos.sampling,
            "mae": str(mae.model.size),
            "grid": asdict(mae.grid),
            "weights": weights.hexdigest(),
        }
        name = hashlib.blake2b(videos.name.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
        stem = f"{re.sub(r'[^A-Za-z0-9]+', '-', videos.name)[:40]}-{name}-{videos.split}"
        self._record, self._pooled, self._tokens = (
            folder / f"{stem}{suffix}" for suffix in (".json", "-pooled.npy", "-tokens.npy")
        )
        self._shape = (len(encoded.rows), mae.grid.num_steps, mae.grid.num_positions, mae.embed_dim)

    def holds(self, tokens: bool) -> bool:
        """Whether everything is there and of these weights and videos."""
        record = stored(self._record)
        if record.get("of") != self._key or not isinstance(record.get("failed"), list):
            return False
        files = [self._pooled, self._tokens] if tokens else [self._pooled]
        try:
            shapes = [np.load(file, mmap_mode="r").shape for file in files]
        except Exception:  # of many kinds where one is damaged, for numpy reads its header as Python
            return False
        return shapes == [(self._shape[0], self._shape[1] * self._shape[3]), self._shape][: len(files)]

    def read(self, tokens: bool) -> tuple[np.ndarray, list[int], np.ndarray | None]:
        """Pooled features, positions of videos that failed, and the tokens, memory-mapped, if they are wanted."""
        failed = stored(self._record)["failed"]
        return np.load(self._pooled), failed, np.load(self._tokens, mmap_mode="r") if tokens else None

    def fill(self, encoded: EncodedTokens, batch_size: int, tokens: bool, progress: bool) -> None:
        """Encode the videos and write what comes out, the record last: without it there is no entry."""
        for old in (self._record, self._tokens, self._pooled):
            old.unlink(missing_ok=True)
        if tokens:
            header = {"descr": "<f2", "fortran_order": False, "shape": self._shape}
            # Written rather than mapped, for a full disk kills whoever writes to a map
            with whole(self._tokens) as partial, partial.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                pooled, failed = _encode(encoded, batch_size, lambda x: file.write(x.tobytes()), progress)
        else:
            pooled, failed = _encode(encoded, batch_size, None, progress)
        with whole(self._pooled) as partial, partial.open("wb") as file:
            np.save(file, pooled)
        with whole(self._record) as partial:
            partial.write_text(json.dumps({"of": self._key, "failed": failed}, indent=2))
