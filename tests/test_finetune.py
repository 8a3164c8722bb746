"""Fine-tuning, on videos whose class is the colour of a small square that moves over a grey, still background."""

from __future__ import annotations

import csv
import json
import math
import subprocess
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from pydantic import ValidationError
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from torch import Tensor

from agents.heuristics import MotionMask
from experiments.classifier import PolicySampler, VideoClassifier, choose_tokens, load_classifier
from experiments.finetune import CHECKPOINT, finetune, mix
from experiments.multi_view import class_scores
from experiments.schema import FinetuneConfig
from tats_env.data import VideoSet, open_dataset
from tats_env.grid import TokenGrid
from tats_env.keyed import keyed_order
from tats_env.mae import MAELearner, MAESize

COLOURS = {"blue": (40, 70, 230), "green": (30, 200, 60), "red": (230, 40, 50), "white": (245, 245, 245)}
GRID = TokenGrid(num_frames=4, height=32, width=32, tubelet_size=2, patch_size=8)
CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"epochs": 3, "warmup_epochs": 1, "batch_size": 8, "test_clips": 1, "test_crops": 1}


def write_video(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """12 frames of 48 x 32 pixels; the square stays where all three crops see it."""
    rng = np.random.default_rng(seed)
    frames = np.broadcast_to(rng.integers(90, 150, (32, 48, 1)), (12, 32, 48, 3)).astype(np.uint8)
    top, left = rng.integers(0, 22), rng.integers(16, 22)
    for t in range(12):
        y, x = top + t % 3, left + t % 4
        frames[t, y : y + 7, x : x + 7] = colour
    command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "48x32",
               "-r", "12", "-i", "-", "-c:v", "libx264", "-qp", "8", "-pix_fmt", "yuv444p", str(path)]  # fmt: skip
    subprocess.run(command, input=frames.tobytes(), check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    for c, (name, colour) in enumerate(COLOURS.items()):
        (root / name).mkdir()
        for i in range(12):
            write_video(root / name / f"{i:02d}.mp4", colour, 100 * c + i)
    return root


def opened(folder: Path, split: str, **options: Any) -> VideoSet:
    return open_dataset(f"folder:{folder}", split=split, num_frames=4, size=(32, 32), **options)


@pytest.fixture(scope="module")
def train_set(folder: Path) -> VideoSet:
    return opened(folder, "train")


@pytest.fixture(scope="module")
def test_set(folder: Path) -> VideoSet:
    return opened(folder, "validation")


@pytest.fixture
def mae() -> MAELearner:
    return MAELearner(GRID, "tiny", device="cpu")


def run(mae: MAELearner, train: Any, test: Any, folder: Path, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return finetune(mae, train, test, FinetuneConfig(**settings), folder, console=Console(file=StringIO()), **more)


def weights(folder: Path) -> dict[str, list[Any]]:
    return {name: x.tolist() for name, x in load_file(folder / CHECKPOINT).items()}


class Brightest:
    """Keeps the brightest tokens; of equally bright ones, for the background stands still, the later."""

    observation = "pixels"

    def logits(self, observation: Tensor) -> Tensor:
        return observation.mean(-1).flatten(1) + torch.linspace(0, 1e-3, 32)


class Watched:
    """A set of videos that notes which clips it is asked for, and stops at a given request as Ctrl-C would."""

    def __init__(self, videos: VideoSet, stop: int | None = None) -> None:
        self.videos, self.stop = videos, stop
        self.asked: list[tuple[np.ndarray, np.ndarray, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.videos, name)

    def __len__(self) -> int:
        return len(self.videos)

    def clips(
        self, video: np.ndarray, start: np.ndarray, device: torch.device, key: Tensor, position: np.ndarray
    ) -> Tensor:
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        self.asked.append((video, start, key))
        return self.videos.clips(video, start, device, key, position)


def test_a_sampler_that_finds_what_matters_beats_chance_where_few_tokens_enter(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path
) -> None:
    before = {name: x.clone() for name, x in mae.model.state_dict().items()}
    agent = MotionMask(explore=0.0)
    settings = {
        "epochs": 30, "warmup_epochs": 3, "batch_size": 18, "learning_rate": 0.06, "layer_decay": 1.0,
        "drop_path": 0.05, "mixup": 0.1, "cutmix": 0.5, "randaugment_magnitude": 2, "sampler": "policy",
        "keep_ratio": 0.5, "test_keep_ratios": [0.0625, 1.0], "test_clips": 2, "test_crops": 3,
    }  # fmt: skip
    result = run(mae, train_set, test_set, tmp_path, settings, agent=agent)
    print(json.dumps(result))
    policy, random = result["tokens_kept"]["policy"], result["tokens_kept"]["random"]
    assert [row["tokens"] for row in policy] == [2, 32]
    assert result["top1"] == policy[1]["top1"] == random[1]["top1"] > 0.85  # chance is 0.25
    assert policy[0]["top1"] > random[0]["top1"] + 0.2
    assert all(torch.equal(x, before[name]) for name, x in mae.model.state_dict().items())
    assert json.loads((tmp_path / "finetune.json").read_text()) == result
    for name in ("tokens_kept.png", "confusion.png", "confusion.json", "metrics.csv"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("settings", [{"keep_ratio": 0.5}, {"mixup": 0.0, "cutmix": 0.0, "max_grad_norm": 0.5}])
def test_interrupted_and_resumed_training_gives_the_same_weights_bit_for_bit(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {**SHORT, **settings}
    whole = run(mae, train_set, test_set, tmp_path / "whole", settings)
    torch.manual_seed(1)  # global generators must not matter
    np.random.seed(1)
    with pytest.raises(KeyboardInterrupt):
        run(mae, Watched(train_set, stop=13), test_set, tmp_path / "parts", settings)  # in the second of three epochs
    with (tmp_path / "parts" / "metrics.csv").open("a") as file:
        file.write("2,9,9,9,9\n")  # as if killed between the epoch's line and its checkpoint
    resumed = run(mae, train_set, test_set, tmp_path / "parts", settings)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert resumed["tokens_kept"] == whole["tokens_kept"]
    rows = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("parts", "whole")]
    assert [{**row, "seconds": ""} for row in rows[0]] == [{**row, "seconds": ""} for row in rows[1]]
    assert [row["epoch"] for row in rows[0]] == ["1", "2", "3"]


def test_another_seed_gives_other_weights_and_the_global_generators_are_left_alone(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path
) -> None:
    settings = {**SHORT, "epochs": 1, "warmup_epochs": 0}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(mae, train_set, test_set, tmp_path / name, settings, seed=seed)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_finished_folder_is_only_tested_again_and_another_fine_tunings_is_refused(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path
) -> None:
    run(mae, train_set, test_set, tmp_path, SHORT)
    before = weights(tmp_path)
    watched = Watched(train_set)
    again = run(mae, watched, test_set, tmp_path, {**SHORT, "test_keep_ratios": [0.5, 1.0]})
    assert not watched.asked
    assert weights(tmp_path) == before
    assert len(again["tokens_kept"]["random"]) == 2
    with pytest.raises(ValueError, match=r"of another fine-tuning: learning_rate \(0.001 there, 0.5 here\)"):
        run(mae, train_set, test_set, tmp_path, {**SHORT, "learning_rate": 0.5})


@pytest.mark.parametrize("size", ["tiny", MAESize(24, 2, 3, 12, 1, 2, mlp_dim=50, norm_eps=1e-3)])
def test_what_was_written_comes_back_as_the_classifier_that_was_tested(
    train_set: VideoSet, test_set: VideoSet, tmp_path: Path, size: str | MAESize
) -> None:
    mae = MAELearner(GRID, size, device="cpu")
    settings = {**SHORT, "epochs": 2, "learning_rate": 0.05}
    result = run(mae, train_set, test_set, tmp_path, settings)
    state = torch.get_rng_state()
    model, class_names, *_ = load_classifier(tmp_path / CHECKPOINT)
    assert torch.equal(torch.get_rng_state(), state)
    assert class_names == sorted(COLOURS) and not model.training
    index = np.arange(len(test_set))
    config = FinetuneConfig(**settings)
    found = class_scores(model, mae, test_set, index, config, None, 0, Console(file=StringIO()))
    (scores,) = found.values()
    assert scores.std() > 0
    assert (scores.argmax(1).numpy() == test_set.labels).mean() == pytest.approx(result["top1"])
    confusion = json.loads((tmp_path / "confusion.json").read_text())
    assert np.array(confusion["confusion"]).sum(0).tolist() == torch.bincount(scores.argmax(1), minlength=4).tolist()
    run(mae, train_set, test_set, tmp_path, settings)  # the settings that were written are those that are asked for


def test_a_file_that_holds_no_classifier_is_refused(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path
) -> None:
    run(mae, train_set, test_set, tmp_path, {**SHORT, "epochs": 1, "warmup_epochs": 0})
    path, odd = tmp_path / CHECKPOINT, tmp_path / "odd.safetensors"
    with safe_open(path, "pt") as file:
        metadata, settings = file.metadata(), json.loads(file.metadata()["settings"])
    tensors = load_file(path)
    few = {name: x for name, x in tensors.items() if name != "model.fc_norm.bias"}
    for weights, changes in (
        (few, {}),
        (tensors, {"format": "tats-env mae 1"}),
        (tensors, {"settings": "{"}),
        (tensors, {"settings": json.dumps({**settings, "mae": "MAESize(embed_dim=24)"})}),
        (tensors, {"settings": json.dumps({**settings, "class_names": ["a"]})}),
    ):
        save_file(weights, odd, {**metadata, **changes})
        with pytest.raises(ValueError, match=r"odd\.safetensors is (damaged|not a checkpoint of format)"):
            load_classifier(odd)
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path / "none.safetensors")


def test_an_epoch_visits_each_video_once_in_augmented_versions_of_one_clip(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path
) -> None:
    watched = Watched(train_set)
    settings = {**SHORT, "epochs": 2, "batch_size": 12, "repeats": 3, "randaugment_ops": 0}
    run(mae, watched, test_set, tmp_path, settings)
    assert len(train_set) == 40
    assert len(watched.asked) == 2 * 10
    keys = torch.cat([key for _, _, key in watched.asked])
    assert len(keys.unique()) == len(keys) == 240
    for videos, starts, _ in watched.asked:
        for of_clips in (videos, starts):
            assert (of_clips.reshape(4, 3) == of_clips.reshape(4, 3)[:, :1]).all()
    epochs = [np.concatenate([videos[::3] for videos, _, _ in watched.asked[i : i + 10]]) for i in (0, 10)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1])
    starts = np.concatenate([starts for _, starts, _ in watched.asked])
    assert sorted(set(starts)) == list(range(12 - 4 + 1))


def test_the_learning_rate_of_256_clips_is_scaled_by_the_batch_and_follows_a_cosine_after_a_linear_warm_up(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path
) -> None:
    settings = {**SHORT, "epochs": 4, "repeats": 1, "learning_rate": 0.01, "randaugment_ops": 0}
    run(mae, train_set, test_set, tmp_path, settings)
    with (tmp_path / "metrics.csv").open() as file:
        found = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    peak, low = 0.01 * 8 / 256, 1e-3 * 0.01 * 8 / 256
    last = [low + (peak - low) * 4 / 5] + [  # of the five steps of each epoch
        low + (peak - low) * (1 + math.cos(math.pi * step / 15)) / 2 for step in (4, 9, 14)
    ]
    assert found == pytest.approx(last, rel=1e-4)


def test_a_videos_probabilities_are_averaged_over_its_views(mae: MAELearner, test_set: VideoSet) -> None:
    torch.manual_seed(0)
    model = VideoClassifier(mae.model, 4)
    torch.nn.init.normal_(model.head.weight)
    sampler = PolicySampler(Brightest(), mae)  # type: ignore[arg-type]
    config = FinetuneConfig(batch_size=4, test_clips=2, test_crops=3, test_keep_ratios=[1.0, 0.25], sampler="policy")
    found = class_scores(model, mae, test_set, np.arange(len(test_set)), config, sampler, 0, Console(file=StringIO()))
    assert {(name, ratio) for name, ratio in found} == {(n, r) for n in ("policy", "random") for r in (0.25, 1.0)}
    everything = torch.arange(32)[None]
    for v in range(len(test_set)):
        index, total, chosen = np.array([v]), torch.zeros(4), torch.zeros(4)
        for j in range(2):
            for crop in range(3):
                patches = mae.normalize(GRID.patchify(test_set.test_clips(index, j, 2, CPU, crop)))
                total += model(patches, everything)[0].softmax(0).detach()
                best = (patches.mean(-1)[0] + torch.linspace(0, 1e-3, 32)).argsort(descending=True)[:8]
                chosen += model(patches, best.sort().values[None])[0].softmax(0).detach()
        assert torch.allclose(found["random", 1.0][v], total / 6, atol=1e-5)
        assert torch.allclose(found["policy", 1.0][v], total / 6, atol=1e-5)
        assert torch.allclose(found["policy", 0.25][v], chosen / 6, atol=1e-5)
        assert not torch.allclose(found["random", 0.25][v], chosen / 6, atol=1e-3)


def test_the_views_of_a_video_differ_and_one_crop_is_the_centre(mae: MAELearner, test_set: VideoSet) -> None:
    torch.manual_seed(0)
    model = VideoClassifier(mae.model, 4)
    torch.nn.init.normal_(model.head.weight)

    def scores(**views: Any) -> Tensor:
        config = FinetuneConfig(test_clips=1, **views)
        return class_scores(model, mae, test_set, np.arange(len(test_set)), config, None, 0, Console(file=StringIO()))[
            "random", 1.0
        ]

    centre = mae.normalize(GRID.patchify(test_set.test_clips(np.arange(len(test_set)), 0, 1, CPU, None)))
    assert torch.allclose(scores(test_crops=1), model(centre).softmax(1).detach(), atol=1e-5)
    assert not torch.allclose(scores(test_crops=1), scores(test_crops=3), atol=1e-4)


@pytest.mark.parametrize(("alphas", "seed"), [((0.8, 0.0), 3), ((0.0, 1.0), 3)])
def test_mixed_clips_and_targets_agree_in_every_frame(alphas: tuple[float, float], seed: int) -> None:
    pixels = torch.rand(4, 6, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 2])
    state = np.random.get_state()[1].tolist()
    mixed, targets = mix(Mixup(*alphas, label_smoothing=0.1, num_classes=5), pixels.clone(), labels, seed)
    assert np.random.get_state()[1].tolist() == state
    partner = pixels.flip(0)
    # Label smoothing of 0.1 over 5 classes leaves 0.92 and 0.02
    hard = torch.full((4, 5), 0.02).scatter(1, labels[:, None], 0.92)
    if alphas[0]:
        share = float(((mixed - partner) / (pixels - partner)).median())
        assert torch.allclose(mixed, share * pixels + (1 - share) * partner, atol=1e-5)
    else:
        own = (mixed == pixels).all(-1)
        assert torch.equal(mixed, torch.where(own[..., None], pixels, partner))
        assert (own == own[:1, :1]).all()  # one box for all clips and frames
        share = float(own.float().mean())
    assert 0.05 < share < 0.95
    assert torch.allclose(targets, share * hard + (1 - share) * hard.flip(0), atol=1e-4)


def test_fewer_random_tokens_are_some_of_the_more() -> None:
    order = keyed_order(torch.arange(5), 32)
    few, more = choose_tokens(4, order), choose_tokens(16, order)
    assert few is not None and more is not None
    assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(few, more, strict=True))


def test_training_that_breaks_down_says_so(
    mae: MAELearner, train_set: VideoSet, test_set: VideoSet, tmp_path: Path
) -> None:
    with torch.no_grad():
        mae.model.patch_embed.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"try a lower finetune\.learning_rate"):
        run(mae, train_set, test_set, tmp_path, {**SHORT, "batch_size": 4, "randaugment_ops": 0})


def test_videos_without_a_label_are_left_out(mae: MAELearner, folder: Path, test_set: VideoSet, tmp_path: Path) -> None:
    train_set = opened(folder, "train")
    train_set.labels[::2] = -1
    watched = Watched(train_set)
    run(mae, watched, test_set, tmp_path, SHORT)
    assert set(np.concatenate([videos for videos, _, _ in watched.asked])) == set(range(1, 40, 2))


def test_sets_that_do_not_fit_and_a_policy_without_an_agent_are_refused(
    mae: MAELearner, folder: Path, train_set: VideoSet, test_set: VideoSet, tmp_path: Path
) -> None:
    other = open_dataset("motion", split="validation", num_videos=2, num_frames=4)
    with pytest.raises(ValueError, match=r"classes of folder:.* \(4\) and of motion \(15\) differ"):
        run(mae, train_set, other, tmp_path / "run", SHORT)
    with pytest.raises(ValueError, match="policy needs the agent of a run"):
        run(mae, train_set, test_set, tmp_path / "run", {**SHORT, "sampler": "policy"})
    unlabelled = opened(folder, "validation")
    unlabelled.labels[:] = -1
    with pytest.raises(ValueError, match="too few labelled videos"):
        run(mae, train_set, unlabelled, tmp_path / "run", SHORT)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 3, "warmup_epochs": 3}, "3 is not below epochs = 3; give 2 at most"),
        ({"batch_size": 7}, "beside batch_size = 7; give 0, or an even batch_size"),
        ({"test_keep_ratios": [0.5, 1.5]}, "less than or equal to 1"),
        ({"test_keep_ratios": []}, "at least 1 item"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FinetuneConfig(**settings)
