"""One cache of rendered videos for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)  # nets this small only wait for one another on more
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, likewise


@pytest.fixture(scope="session", autouse=True)
def video_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the user's own cache alone, but honour one that was named."""
    with pytest.MonkeyPatch.context() as patch:
        if "TATS_CACHE" not in os.environ:
            patch.setenv("TATS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
