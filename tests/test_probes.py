"""Probes on frozen features, against signals planted where they can and can't be seen; and the features' cache."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from experiments import features, probes
from experiments.features import Features, StoredTokens, extract, pool
from experiments.probes import PROBES, AttentiveProbe, attentive, knn, linear, run_probes
from experiments.schema import ProbeConfig
from tats_env.data import VideoSet, open_dataset
from tats_env.grid import TokenGrid
from tats_env.mae import MAELearner

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
CLASSES, STEPS, POSITIONS, WIDTH = 4, 2, 6, 16
GRID = TokenGrid(num_frames=16, height=32, width=32, tubelet_size=2, patch_size=8)
QUICK = ProbeConfig(batch_size=32, epochs=20, learning_rate=3e-3, num_heads=2)


def stored(tokens: Tensor, labels: Tensor) -> Features:
    """Features of given tokens [V, T', S, D]."""
    reader = StoredTokens(tokens.half().numpy(), np.arange(len(labels)), CPU)
    return Features(reader, pool(tokens.half()), labels)


def noise(num_videos: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_videos, STEPS, POSITIONS, WIDTH, generator=generator)
    return tokens, torch.randint(CLASSES, (num_videos,), generator=generator)


def in_every_token(num_videos: int, seed: int) -> Features:
    """The class is a shift of all tokens."""
    tokens, labels = noise(num_videos, seed)
    tokens[..., :CLASSES] += torch.eye(CLASSES)[labels][:, None, None]
    return stored(tokens, labels)


def in_one_token(num_videos: int, seed: int) -> Features:
    """The class is a shift of one token at a known place; the opposite shift of another hides it from every mean."""
    tokens, labels = noise(num_videos, seed)
    for place, sign in ((2, 1), (4, -1)):
        tokens[:, 1, place, :CLASSES] += sign * 4 * torch.eye(CLASSES)[labels]
        tokens[:, 1, place, CLASSES + place] += 8  # by which the place is known
    return stored(tokens, labels)


def accuracy(probe: str, train: Features, test: Features, config: ProbeConfig = QUICK) -> float:
    scores = PROBES[probe](train, test, CLASSES, config, 0, False).scores
    assert scores.shape == (len(test), CLASSES)
    return float((scores.argmax(1) == test.labels).float().mean())


def test_every_probe_sees_a_class_that_is_in_every_token() -> None:
    train, test = in_every_token(160, 0), in_every_token(200, 1)
    for probe in PROBES:
        assert accuracy(probe, train, test) > 0.8, probe


def test_only_the_attentive_probe_sees_a_class_that_is_in_one_token() -> None:
    train, test = in_one_token(256, 0), in_one_token(200, 1)
    assert accuracy("attentive", train, test) > 0.85
    for probe in ("linear", "knn"):  # chance is 0.25 with a standard error of 0.03
        assert accuracy(probe, train, test) < 0.4, probe


def test_shuffled_labels_give_chance() -> None:
    train, test = in_every_token(160, 0), in_every_token(400, 1)
    shuffled = Features(train.tokens, train.pooled, train.labels[torch.randperm(160, generator=torch.manual_seed(3))])
    for probe in PROBES:
        assert accuracy(probe, shuffled, test) == pytest.approx(0.25, abs=0.1), probe


def test_linear_probe_is_at_the_minimum_that_scipy_finds() -> None:
    train, test = in_every_token(60, 0), in_every_token(20, 1)
    x, x_test = train.pooled.double().numpy(), test.pooled.double().numpy()
    mean, deviation = x.mean(0), x.std(0, ddof=1)
    x, x_test, y = (x - mean) / deviation, (x_test - mean) / deviation, train.labels.numpy()

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[CLASSES:].reshape(-1, CLASSES), flat[:CLASSES]
        z = x @ weight + bias
        z -= np.log(np.exp(z).sum(1, keepdims=True))
        rest = (np.exp(z) - np.eye(CLASSES)[y]) / len(y)
        value = -z[np.arange(len(y)), y].mean() + probes.LINEAR_WEIGHT_DECAY * np.square(weight).sum()
        gradient = x.T @ rest + 2 * probes.LINEAR_WEIGHT_DECAY * weight
        return value, np.concatenate([rest.sum(0), gradient.ravel()])

    found = minimize(loss, np.zeros(CLASSES * (x.shape[1] + 1)), jac=True, tol=1e-12).x
    expected = x_test @ found[CLASSES:].reshape(-1, CLASSES) + found[:CLASSES]
    actual = linear(train, test, CLASSES, QUICK).scores.numpy()
    assert np.abs(expected).max() > 2
    # The loss leaves a constant in all logits open
    np.testing.assert_allclose(
        actual - actual.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=0.02
    )


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_nearest_neighbours_vote_as_counted_by_hand(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "KNN_BATCH", 7)
    train, test = in_every_token(40, 0), in_every_token(15, 1)
    config = ProbeConfig(k=k, temperature=0.2)
    actual = knn(train, test, CLASSES, config).scores
    for i, asked in enumerate(test.pooled.double().numpy()):
        cosine = [
            float(asked @ known / np.linalg.norm(asked) / np.linalg.norm(known))
            for known in train.pooled.double().numpy()
        ]
        votes = np.zeros(CLASSES)
        for v in sorted(range(40), key=lambda v: -cosine[v])[:k]:
            votes[train.labels[v]] += np.exp(cosine[v] / 0.2)
        np.testing.assert_allclose(actual[i].numpy(), votes / votes.sum(), atol=1e-5)


def test_a_low_temperature_overflows_nothing() -> None:
    train, test = in_every_token(40, 0), in_every_token(15, 1)
    cold, nearest = (knn(train, test, CLASSES, ProbeConfig(k=k, temperature=1e-4)).scores for k in (10, 1))
    torch.testing.assert_close(cold, nearest, atol=1e-3, rtol=0)


def test_attentive_probe_is_one_query_over_all_tokens() -> None:
    torch.manual_seed(0)
    probe = AttentiveProbe(WIDTH, 2, CLASSES).double()
    x = torch.randn(3, STEPS, POSITIONS, WIDTH, dtype=torch.float64)
    weights = probe.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def project(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    kv = project(norm(x.flatten(1, 2), "input_norm"), "pool.kv")
    q = project(weights["pool.latent"][0, 0], "pool.q")
    attended = []
    for head in range(2):
        own = slice(head * WIDTH // 2, (head + 1) * WIDTH // 2)
        share = (kv[..., :WIDTH][..., own] @ q[own] / (WIDTH // 2) ** 0.5).softmax(1)
        attended.append((share[..., None] * kv[..., WIDTH:][..., own]).sum(1))
    y = project(torch.cat(attended, 1), "pool.proj")
    hidden = torch.nn.functional.gelu(project(norm(y, "pool.norm"), "pool.mlp.fc1"))
    y = y + project(hidden, "pool.mlp.fc2")
    torch.testing.assert_close(probe(x), project(norm(y, "norm"), "head"))


@pytest.mark.parametrize(("dim", "asked", "taken"), [(96, 3, 3), (10, 3, 2), (10, 4, 2), (7, 3, 1), (2, 5, 2)])
def test_heads_that_do_not_divide_the_width_give_way_to_the_next_fewer(dim: int, asked: int, taken: int) -> None:
    assert AttentiveProbe(dim, asked, 2).pool.num_heads == taken


def test_attentive_probe_depends_on_its_seed_and_nothing_else() -> None:
    train, test = in_one_token(64, 0), in_one_token(10, 1)
    config = ProbeConfig(batch_size=24, epochs=2, num_heads=2)
    first = attentive(train, test, CLASSES, config, 5).scores
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(attentive(train, test, CLASSES, config, 5).scores, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(attentive(train, test, CLASSES, config, 6).scores, first, atol=1e-2)


def test_of_several_restarts_the_best_on_the_training_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[AttentiveProbe] = []

    class Recorded(AttentiveProbe):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(probes, "AttentiveProbe", Recorded)
    train, (tokens, _) = in_one_token(64, 0), noise(10, 1)
    test = stored(tokens, torch.zeros(10, dtype=torch.int64))
    (x,) = train.tokens([np.arange(64)])
    (x_test,) = test.tokens([np.arange(10)])
    chosen = set()
    for seed in range(2):
        made.clear()
        config = ProbeConfig(batch_size=16, epochs=16, learning_rate=1e-2, num_heads=2, restarts=3)
        judged = attentive(train, test, CLASSES, config, seed)
        with torch.no_grad():
            losses = [float(torch.nn.functional.cross_entropy(p(x.float()), train.labels)) for p in made]
            assert len(losses) == 3 and max(losses) > 1.2 * min(losses)
            best = int(np.argmin(losses))
            torch.testing.assert_close(judged.scores, made[best](x_test.float()))
            for start, probe in zip(judged.starts, made, strict=True):
                torch.testing.assert_close(start, probe(x_test.float()))
        chosen.add(best)
    assert len(chosen) > 1


# With an encoder and videos


@pytest.fixture(scope="module")
def mae() -> MAELearner:
    return MAELearner(GRID, "tiny", device="cpu")


@pytest.fixture(scope="module")
def train_set() -> VideoSet:
    return open_dataset("motion", num_videos=30)


@pytest.fixture(scope="module")
def test_set() -> VideoSet:
    return open_dataset("motion", split="validation", num_videos=30)


@pytest.fixture
def encoded(mae: MAELearner, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the batches that the encoder was given."""
    sizes: list[int] = []
    real = MAELearner.features

    def counted(self: MAELearner, clips: Tensor) -> Tensor:
        sizes.append(len(clips))
        return real(self, clips)

    monkeypatch.setattr(MAELearner, "features", counted)
    yield sizes


def all_tokens(x: Features) -> Tensor:
    return torch.cat(list(x.tokens(np.array_split(np.arange(len(x)), 2))))


def direct(mae: MAELearner, videos: VideoSet) -> Tensor:
    start = (videos.lengths - videos.clip_span).clip(0) // 2
    return mae.features(videos.clips(np.arange(len(videos)), start, CPU))


def test_features_are_the_encoders_output_for_the_middle_clips(
    mae: MAELearner, train_set: VideoSet, tmp_path: Path
) -> None:
    expected = direct(mae, train_set)
    for folder in (None, tmp_path):
        found = extract(mae, train_set, 8, folder, tokens=True)
        torch.testing.assert_close(all_tokens(found).float(), expected, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(found.pooled, expected.mean(2).flatten(1), atol=1e-3, rtol=1e-3)
        assert found.labels.tolist() == train_set.labels.tolist()


def test_features_are_encoded_once(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path, encoded: list[int]
) -> None:
    config = ProbeConfig(batch_size=8, epochs=2)
    first = run_probes(mae, train_set, test_set, list(PROBES), config, folder=tmp_path)
    assert encoded == 2 * [8, 8, 8, 6]
    again = run_probes(mae, train_set, test_set, list(PROBES), config, folder=tmp_path)
    assert encoded == 2 * [8, 8, 8, 6]
    for kind in PROBES:
        assert np.array_equal(first[kind].confusion, again[kind].confusion)
        assert first[kind].num_videos == 30 and 0 <= first[kind].top1 <= first[kind].top5 <= 1
    fresh = open_dataset("motion", num_videos=30)
    extract(mae, fresh, 8, tmp_path, tokens=True)
    assert len(encoded) == 8
    assert not list(tmp_path.glob("*.partial"))


def test_what_each_restart_scores_is_written_beside_the_one_that_counts(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path
) -> None:
    written = {}
    for restarts in (1, 3):
        config = ProbeConfig(batch_size=8, epochs=8, learning_rate=1e-2, restarts=restarts)
        scores = run_probes(mae, train_set, test_set, ["attentive"], config)["attentive"]
        scores.write(tmp_path, "attentive")
        written[restarts] = json.loads((tmp_path / "attentive.json").read_text())
    assert "starts" not in written[1]
    starts = written[3]["starts"]
    assert len(starts) == 3 and written[3]["top1"] in starts
    assert all(round(30 * top1, 6).is_integer() for top1 in starts)


def test_other_weights_or_clips_are_not_answered_from_the_cache(
    train_set: VideoSet, tmp_path: Path, encoded: list[int]
) -> None:
    mae = MAELearner(GRID, "tiny", device="cpu")
    extract(mae, train_set, 30, tmp_path, tokens=True)
    with torch.no_grad():
        mae.model.get_parameter("blocks.2.mlp.fc1.bias")[5] += 1
    changed = extract(mae, train_set, 30, tmp_path, tokens=True)
    assert encoded == [30, 30]
    expected = direct(mae, train_set)
    torch.testing.assert_close(all_tokens(changed).float(), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(changed.pooled, expected.mean(2).flatten(1), atol=1e-3, rtol=1e-3)
    encoded.clear()
    # One thing at a time
    for num_videos, seed, sampling, frame_stride in (
        (29, 0, "dense", 1), (29, 1, "dense", 1), (29, 1, "dense", 2), (29, 1, "uniform", 2)
    ):  # fmt: skip
        videos = open_dataset("motion", num_videos=num_videos, seed=seed, sampling=sampling, frame_stride=frame_stride)
        found = extract(mae, videos, 30, tmp_path, tokens=False)
        assert encoded == [num_videos]
        expected = mae.features(videos.test_clips(np.arange(num_videos), 0, 1, CPU)).mean(2).flatten(1)
        encoded.clear()
        torch.testing.assert_close(found.pooled, expected, atol=1e-3, rtol=1e-3)
    # One entry a data set and split, however many came before
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_tokens_are_written_only_for_who_reads_them(
    mae: MAELearner, test_set: VideoSet, tmp_path: Path, encoded: list[int]
) -> None:
    pooled = extract(mae, test_set, 30, tmp_path, tokens=False).pooled
    assert not list(tmp_path.glob("*tokens*"))
    extract(mae, test_set, 30, tmp_path, tokens=True)
    (file,) = tmp_path.glob("*-tokens.npy")
    assert np.load(file).shape == (30, 8, 16, 96) and encoded == [30, 30]
    assert torch.equal(extract(mae, test_set, 30, tmp_path, tokens=False).pooled, pooled)
    assert encoded == [30, 30]
    file.unlink()  # to save space, say
    extract(mae, test_set, 30, tmp_path, tokens=False)
    assert encoded == [30, 30]
    extract(mae, test_set, 30, tmp_path, tokens=True)
    assert encoded == [30, 30, 30]


def test_tokens_beyond_the_limit_are_encoded_anew_with_the_same_result(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path, encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = ProbeConfig(batch_size=10, epochs=3)
    results = []
    for limit in (features.TOKENS_LIMIT, 30 * 8 * 16 * 96 * 2 - 1):
        monkeypatch.setattr(features, "TOKENS_LIMIT", limit)
        folder = tmp_path / str(limit)
        x, x_test = (extract(mae, videos, 10, folder, tokens=True) for videos in (train_set, test_set))
        results.append(attentive(x, x_test, 15, config).scores)
    assert len(list(folder.glob("*-pooled.npy"))) == 2 and not list(folder.glob("*-tokens.npy"))
    # Twice three batches to cache; beyond the limit also one clip to know the width, three epochs and the test
    assert sum(encoded) == 60 + 60 + 1 + 3 * 30 + 30
    torch.testing.assert_close(*results, atol=1e-3, rtol=0)


KILLED = """
import os, signal, sys
from pathlib import Path
from experiments.features import extract
from tats_env.data import open_dataset
from tats_env.grid import TokenGrid
from tats_env.mae import MAELearner

real, calls = MAELearner.features, []
def deadly(self, clips):
    calls.append(0)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, clips)
MAELearner.features = deadly
mae = MAELearner(TokenGrid(16, 32, 32, 2, 8), "tiny", device="cpu")
extract(mae, open_dataset("motion", num_videos=30), 8, Path(sys.argv[1]), tokens=True)
"""


def test_what_a_killed_process_left_is_not_taken_for_whole(
    mae: MAELearner, train_set: VideoSet, tmp_path: Path, encoded: list[int]
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.npy"))
    found = extract(mae, train_set, 8, tmp_path, tokens=True)
    assert encoded == [8, 8, 8, 6] and not list(tmp_path.glob("*.partial"))
    torch.testing.assert_close(all_tokens(found).float(), direct(mae, train_set), atol=2e-3, rtol=1e-3)
    # Killed between two files: what they are of is written last
    (record,) = tmp_path.glob("*.json")
    whole = record.read_text()
    for left in (None, whole[: len(whole) // 2]):
        record.unlink()
        if left is not None:
            record.write_text(left)
        encoded.clear()
        extract(mae, train_set, 8, tmp_path, tokens=True)
        assert encoded == [8, 8, 8, 6]
        assert json.loads(record.read_text()) == json.loads(whole)


def test_a_process_that_fails_leaves_nothing_behind(
    mae: MAELearner, train_set: VideoSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MAELearner, "features", lambda self, clips: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract(mae, train_set, 8, tmp_path, tokens=True)
    assert [path.name for path in tmp_path.iterdir()] == [features.LOCK]


def test_videos_without_a_label_are_left_out(mae: MAELearner, tmp_path: Path, encoded: list[int]) -> None:
    videos = open_dataset("motion", num_videos=30)
    videos.labels[[0, 7, 29]] = -1
    found = extract(mae, videos, 30, tmp_path, tokens=True)
    kept = np.setdiff1d(np.arange(30), [0, 7, 29])
    assert encoded == [27] and found.labels.tolist() == videos.labels[kept].tolist()
    torch.testing.assert_close(all_tokens(found).float(), direct(mae, videos)[kept], atol=2e-3, rtol=1e-3)


def test_videos_that_fail_while_they_are_streamed_are_left_out(
    mae: MAELearner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    monkeypatch.setattr("tats_env.data.video_set.MEMORY_LIMIT", 0)
    for i, path in enumerate(open_dataset("motion", num_videos=8).paths):
        target = tmp_path / "videos" / "train" / f"class{i % 4}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    videos = open_dataset(f"folder:{tmp_path / 'videos'}")
    labels, path, content = videos.labels.copy(), videos.paths[3], videos.paths[3].read_bytes()
    kept = np.delete(np.arange(len(videos)), 3)
    expected = direct(mae, videos)[kept]
    path.write_bytes(b"no video any more")
    encoded.clear()
    for _ in range(2):
        found = extract(mae, videos, 3, tmp_path / "cache", tokens=True)
        assert found.labels.tolist() == labels[kept].tolist()
        torch.testing.assert_close(all_tokens(found).float(), expected, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(found.pooled, expected.mean(2).flatten(1), atol=1e-3, rtol=1e-3)
        # A set that has yet to find out is told so by the cache
        path.write_bytes(content)
        videos = open_dataset(f"folder:{tmp_path / 'videos'}")
    assert sum(encoded) == len(labels)


def test_without_two_classes_to_tell_apart_there_are_no_scores(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, encoded: list[int]
) -> None:
    same, unknown = open_dataset("motion", num_videos=4), open_dataset("motion", num_videos=4)
    same.labels[:], unknown.labels[:] = 3, -1
    for train, test in ((same, test_set), (unknown, test_set), (train_set, unknown)):
        assert run_probes(mae, train, test, ["linear", "knn"], QUICK) == {}
    assert not encoded


def test_sets_of_different_classes_are_refused(mae: MAELearner, train_set: VideoSet) -> None:
    other = open_dataset("motion", split="validation", num_videos=30)
    other.class_names = [*other.class_names[1:], other.class_names[0]]
    with pytest.raises(ValueError, match=r"motion \(train\) and motion \(validation\) have different classes"):
        run_probes(mae, train_set, other, ["linear"], QUICK)
