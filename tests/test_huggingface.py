"""Hugging Face's VideoMAE, loaded and written, with transformers' own network as the oracle."""

from __future__ import annotations

import json
import logging
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tats_env  # noqa: F401 (registers the environment)
from experiments.classifier import VideoClassifier
from tats_env.grid import TokenGrid, hidden_tokens, visible_mask
from tats_env.mae import (
    SIZES,
    MAELearner,
    MAESize,
    load_learner,
    save_learner,
    write_huggingface,
    write_huggingface_classifier,
)
from tats_env.mae.learner import IMAGENET_MEAN, IMAGENET_STD

transformers = pytest.importorskip("transformers")

GRID = TokenGrid(num_frames=4, height=16, width=16, tubelet_size=2, patch_size=4)
N, K = GRID.num_tokens, 6
SMALL = {
    "image_size": 16, "patch_size": 4, "num_frames": 4, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 96, "decoder_hidden_size": 12, "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2, "decoder_intermediate_size": 48,
}  # fmt: skip
# An epsilon that shows wherever it is left out, and widths of MLPs that are no multiple of the block's
ODD = {
    "use_mean_pooling": False, "layer_norm_eps": 1e-2, "intermediate_size": 49,
    "decoder_hidden_size": 22, "decoder_intermediate_size": 49,
}  # fmt: skip
CONFIGS: list[dict[str, Any]] = [{}, {"use_mean_pooling": False}, ODD, {"qv_bias": False}, {"tubelet_size": 4}]


def make(kind: str = "ForPreTraining", **changes: Any) -> Any:
    """One of theirs, far from initialisation, so that biases, norms and attention all matter."""
    torch.manual_seed(0)
    model = getattr(transformers, f"VideoMAE{kind}")(transformers.VideoMAEConfig(**{**SMALL, **changes})).eval()
    model.set_attn_implementation("eager")
    return randomised(model)


@torch.no_grad()
def randomised(model: Any) -> Any:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.normal_(std=0.2).add_(isinstance(module, nn.LayerNorm) and name == "weight")
    return model


def saved(folder: Path, kind: str = "ForPreTraining", **changes: Any) -> Any:
    model = make(kind, **changes)
    model.save_pretrained(folder)
    return model


def random_clips(grid: TokenGrid = GRID) -> Tensor:
    shape = (2, grid.num_frames, grid.height, grid.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pixel_values(clips: Tensor) -> Tensor:
    """What their image processor makes of the clips: [B, T, C, H, W]."""
    return ((clips / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 1, 4, 2, 3)


def masks(grid: TokenGrid = GRID) -> Tensor:
    scores = torch.rand(2, grid.num_tokens, generator=torch.Generator().manual_seed(1))
    return scores.argsort(1)[:, :K].sort(1).values


def assert_same_predictions(learner: MAELearner, theirs: Any) -> None:
    clips, visible = random_clips(learner.grid), masks(learner.grid)
    with torch.no_grad():
        expected = theirs(pixel_values(clips), ~visible_mask(visible, learner.grid.num_tokens))
    found = learner.errors(clips, visible, keep_prediction=True)
    torch.testing.assert_close(found.prediction, expected.logits, rtol=0, atol=1e-5)
    hidden = found.token_error.gather(1, hidden_tokens(visible, learner.grid.num_tokens))
    torch.testing.assert_close(hidden.mean(), expected.loss, rtol=1e-5, atol=0)


def assert_same_features(learner: MAELearner, theirs: Any) -> None:
    with torch.no_grad():
        expected = theirs(pixel_values(random_clips(learner.grid))).last_hidden_state
    found = learner.features(random_clips(learner.grid)).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [*CONFIGS, {"image_size": [16, 24]}])
def test_predictions_loss_and_features_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = saved(tmp_path, **changes)
    learner = load_learner(f"hf:{tmp_path}", device="cpu")
    assert_same_predictions(learner, theirs)
    assert_same_features(learner, theirs.videomae)
    assert learner.model.decoder_norm.eps == theirs.decoder.norm.eps  # too small to show in the predictions


@pytest.mark.parametrize("kind", ["Model", "ForVideoClassification"])
@pytest.mark.parametrize("changes", CONFIGS)
def test_a_folder_without_a_decoder_gives_the_encoder_and_says_so(
    tmp_path: Path, changes: dict[str, Any], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = saved(tmp_path, kind, **changes)
    with caplog.at_level(logging.WARNING, "tats_env"):
        learner = load_learner(tmp_path, device="cpu", seed=3)
    assert f"{tmp_path} holds an encoder alone" in caplog.text
    assert_same_features(learner, theirs if kind == "Model" else theirs.videomae)
    fresh = MAELearner(learner.grid, learner.size, device="cpu", seed=3).model
    for name, parameter in learner.model.named_parameters():
        assert name.startswith(("patch_embed", "blocks", "norm")) or torch.equal(parameter, fresh.get_parameter(name))


def test_a_whole_folder_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path)
    caplog.clear()
    load_learner(tmp_path, device="cpu")
    assert not caplog.records


def test_a_head_on_the_pooled_encoder_gives_the_classifiers_logits(tmp_path: Path) -> None:
    theirs, clips = saved(tmp_path, "ForVideoClassification", num_labels=5), random_clips()
    learner = load_learner(tmp_path, device="cpu")
    patches, every = learner.normalize(GRID.patchify(clips)), torch.arange(N).expand(2, -1)
    with torch.no_grad():
        pooled = learner.model.encode(patches, every, final_norm=False).mean(1)
        found, expected = theirs.classifier(theirs.fc_norm(pooled)), theirs(pixel_values(clips)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_encoder_can_leave_its_final_norm_out(tmp_path: Path) -> None:
    theirs, clips = saved(tmp_path, "Model", use_mean_pooling=False), random_clips()
    learner = load_learner(tmp_path, device="cpu")
    patches, every = learner.normalize(GRID.patchify(clips)), torch.arange(N).expand(2, -1)
    with torch.no_grad():
        found = learner.model.encode(patches, every, final_norm=False)
        expected = theirs.encoder(theirs.embeddings(pixel_values(clips), None)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def rename_biases(tensors: dict[str, Tensor]) -> None:
    """As versions of transformers that gave keys a bias wrote them."""
    for name in [name for name in tensors if name.endswith((".q_bias", ".v_bias"))]:
        long = {"q_bias": "query.bias", "v_bias": "value.bias"}[name[-6:]]
        tensors[name[:-6] + long] = tensors.pop(name)
        tensors[name[:-6] + "key.bias"] = torch.randn(len(tensors[name[:-6] + long]))


def test_biases_are_found_under_the_names_of_every_version(tmp_path: Path) -> None:
    theirs = saved(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, rename_biases)
    assert before.keys() != load_file(tmp_path / "model.safetensors").keys()
    assert_same_predictions(load_learner(tmp_path, device="cpu"), theirs)


def test_shards_and_pickled_tensors_load_too_and_transformers_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    theirs.save_pretrained(tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled/model.safetensors"), tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "pickled/model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("shards", "pickled"):
        assert_same_predictions(load_learner(tmp_path / name, device="cpu"), theirs)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    theirs = make().half()
    theirs.save_pretrained(tmp_path)
    learner = load_learner(tmp_path, device="cpu")
    assert {x.dtype for x in learner.model.parameters()} == {torch.float32}
    assert_same_predictions(learner, theirs.float())


@pytest.mark.parametrize("changes", [{}, ODD])
def test_training_goes_on_from_there_and_its_checkpoint_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved(tmp_path / "theirs", **changes)
    learner = load_learner(tmp_path / "theirs", device="cpu", learning_rate=3e-3)
    losses = []
    for _ in range(20):
        losses.append(float(learner.reconstruct(random_clips(), masks()).reconstruction_error.mean()))
        learner.update()
    assert losses[-1] < 0.9 * losses[0]
    save_learner(learner, tmp_path / "ours.safetensors")
    again = load_learner(tmp_path / "ours.safetensors", device="cpu")
    assert (again.size, again.grid) == (learner.size, learner.grid)
    found, expected = (x.errors(random_clips(), masks()) for x in (again, learner))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_environment_takes_a_folder_and_says_which_clips_fit_it(tmp_path: Path) -> None:
    theirs = saved(tmp_path)
    fits: dict[str, Any] = {"num_frames": 4, "size": 16, "patch_size": 4, "num_videos": 15, "device": "cpu"}
    for mae in (f"hf:{tmp_path}", str(tmp_path), tmp_path):
        env = gym.make("TATSMasking-v0", mae=mae, **fits)
        assert env.reset(seed=0)[0].shape == (2, 16, 24)
        assert_same_predictions(env.unwrapped.mae, theirs)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="give it num_frames=4, size=16, tubelet_size=2, patch_size=4"):
        gym.make("TATSMasking-v0", mae=f"hf:{tmp_path}", **fits | {"size": 32})


def test_mae_seed_fixes_the_decoder_that_a_folder_lacks(tmp_path: Path) -> None:
    saved(tmp_path, "Model")
    fits: dict[str, Any] = {"num_frames": 4, "size": 16, "patch_size": 4, "num_videos": 15, "device": "cpu"}
    envs = [gym.make("TATSMasking-v0", mae=f"hf:{tmp_path}", mae_seed=seed, **fits) for seed in (0, 0, 1)]
    first, same, other = (env.unwrapped.mae.model for env in envs)  # type: ignore[attr-defined]
    assert torch.equal(first.decoder_head.weight, same.decoder_head.weight)
    assert not torch.equal(first.decoder_head.weight, other.decoder_head.weight)
    assert torch.equal(first.patch_embed.weight, other.patch_embed.weight)


# Written ---------------------------------------------------------------------------------------------------

OURS = MAESize(24, 2, 3, 12, 2, 2, decoder_norm_eps=1e-5)
SIZES_TO_WRITE = [
    OURS,
    replace(OURS, final_norm=False, norm_eps=1e-2, mlp_dim=49, decoder_embed_dim=22, decoder_mlp_dim=31),
]
WIDE = TokenGrid(num_frames=4, height=16, width=24, tubelet_size=4, patch_size=4)


def trained(size: MAESize = OURS, grid: TokenGrid = GRID) -> MAELearner:
    """One of ours, far from initialisation; keys have biases, which training leaves near 0."""
    torch.manual_seed(1)
    learner = MAELearner(grid, size, device="cpu")
    randomised(learner.model)
    return learner


def loaded(kind: str, folder: Path) -> tuple[Any, set[str]]:
    """What transformers makes of a folder, and the names of tensors that it did not use."""
    model, info = getattr(transformers, f"VideoMAE{kind}").from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["mismatched_keys"] or info["error_msgs"])
    return model.eval(), set(info["unexpected_keys"])


@pytest.mark.parametrize("size", SIZES_TO_WRITE)
@pytest.mark.parametrize("grid", [GRID, WIDE])
def test_transformers_computes_what_was_written_and_misses_nothing(
    tmp_path: Path, size: MAESize, grid: TokenGrid
) -> None:
    learner = trained(size, grid)
    write_huggingface(learner, tmp_path / "new" / "folder")
    theirs, unused = loaded("ForPreTraining", tmp_path / "new" / "folder")
    assert not unused
    assert_same_predictions(learner, theirs)
    encoder, unused = loaded("Model", tmp_path / "new" / "folder")
    assert_same_features(learner, encoder)
    assert unused and all(name.startswith(("decoder.", "encoder_to_decoder.", "mask_token")) for name in unused)


@pytest.mark.parametrize("size", SIZES_TO_WRITE)
def test_ours_comes_back_bit_for_bit_but_for_the_biases_of_keys(
    tmp_path: Path, size: MAESize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    learner = trained(size)
    write_huggingface(learner, tmp_path)
    again = load_learner(f"hf:{tmp_path}", device="cpu")
    widths = {"mlp_dim": size.mlp_dim or 96, "decoder_mlp_dim": size.decoder_mlp_dim or 48}
    assert (again.grid, again.size) == (GRID, replace(size, **widths))
    for name, expected in learner.model.state_dict().items():
        found = again.model.state_dict()[name]
        if name.endswith("qkv.bias"):
            query, key, value = expected.chunk(3)
            assert key.any()
            expected = torch.cat([query, torch.zeros_like(key), value])
        assert torch.equal(found, expected), name
    found, expected = (x.errors(random_clips(), masks(), keep_prediction=True).prediction for x in (again, learner))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, ODD])
def test_theirs_goes_back_bit_for_bit_under_the_same_names(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved(tmp_path / "theirs", **changes)
    write_huggingface(load_learner(tmp_path / "theirs", device="cpu"), tmp_path / "again")
    expected, found = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "again"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


@pytest.mark.parametrize("grid", [GRID, WIDE])
def test_their_processor_makes_of_frames_what_ours_are_normalised_to(tmp_path: Path, grid: TokenGrid) -> None:
    write_huggingface(trained(grid=grid), tmp_path)
    processor, clips = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path), random_clips(grid)
    larger = nn.functional.pad(clips, (0, 0, 4, 4, 4, 4))
    found = processor([list(clip.numpy()) for clip in larger], return_tensors="pt", do_resize=False).pixel_values
    torch.testing.assert_close(found, pixel_values(clips), rtol=0, atol=1e-5)
    square = torch.full((1, 4, 50, 50, 3), 255, dtype=torch.uint8)
    found = processor([list(clip.numpy()) for clip in square], return_tensors="pt").pixel_values
    white = pixel_values(torch.full_like(clips[:1], 255))  # to the edges: the crop lies within the resized frame
    torch.testing.assert_close(found, white, rtol=0, atol=1e-5)


def test_positions_that_transformers_does_not_have_are_refused(tmp_path: Path) -> None:
    tiny = MAELearner(GRID, "tiny", device="cpu")
    with pytest.raises(ValueError, match=r"by \(t, h, w\).*by flat index.*size small, base, large"):
        write_huggingface(tiny, tmp_path / "mae")
    with pytest.raises(ValueError, match="by flat index"):
        weights = VideoClassifier(tiny.model, 2).state_dict()
        write_huggingface_classifier(weights, GRID, "tiny", ["a", "b"], tmp_path / "classifier")
    assert not list(tmp_path.iterdir())


def test_sizes_with_a_name_that_can_be_written_have_transformers_epsilon() -> None:
    eps = make().decoder.norm.eps
    assert [x.decoder_norm_eps for x in SIZES.values() if not x.separable_positions] == [eps] * 3


def test_how_much_another_epsilon_matters_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learner = trained(replace(OURS, decoder_norm_eps=1e-6))
    write_huggingface(learner, tmp_path)
    (record,) = [x for x in caplog.records if x.name.startswith("tats_env")]
    assert "epsilon of 1e-06" in record.getMessage() and "about 4.5e-06 / v of itself" in record.getMessage()
    x = 0.03 * torch.randn(5, 12, dtype=torch.float64)
    theirs = loaded("ForPreTraining", tmp_path)[0].decoder.norm.double()
    ours = learner.model.decoder_norm.double()
    for norm in (theirs, ours):
        nn.init.zeros_(norm.bias)
    with torch.no_grad():
        found, told = 1 - theirs(x) / ours(x), 4.5e-6 / x.var(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(found, told.expand(-1, 12), rtol=0.05, atol=0)


@pytest.mark.parametrize("size", SIZES_TO_WRITE)
def test_a_written_classifier_gives_our_logits_and_names_the_classes(tmp_path: Path, size: MAESize) -> None:
    learner, names = trained(size), ["climbing", "Zähne putzen", "walking (dog)"]
    classifier = randomised(VideoClassifier(learner.model, 3)).eval()
    write_huggingface_classifier(classifier.state_dict(), GRID, size, names, tmp_path)
    theirs, unused = loaded("ForVideoClassification", tmp_path)
    assert not unused
    assert theirs.config.id2label == dict(enumerate(names))
    assert theirs.config.label2id == {name: i for i, name in enumerate(names)}
    with torch.no_grad():
        found = theirs(pixel_values(random_clips())).logits
        expected = classifier(learner.normalize(GRID.patchify(random_clips())))
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3 classes apart, but 2 have names"):
        write_huggingface_classifier(classifier.state_dict(), GRID, size, names[:2], tmp_path)


# What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit_mae"}, "model_type is 'vit_mae'; it must be 'videomae'"),
        ({"num_channels": 1}, "num_channels is 1; it must be 3"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it must be 'gelu'"),
        ({"norm_pix_loss": False}, r"norm_pix_loss is false.* save the encoder alone"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a positive whole number"),
        ({"image_size": [16]}, r"image_size is \[16\]; it must be a positive whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None; it must be a number"),
        ({"patch_size": [4, 2]}, r"patch_size is \[4, 2\]; patches must be square"),
        ({"patch_size": 5}, "patch_size=5 does not divide height=16: give a divisor of 16"),
        ({"num_frames": 5}, "tubelet_size=2 does not divide num_frames=5"),
        ({"num_attention_heads": 5}, "num_heads=5 does not divide embed_dim=24"),
        ({"num_hidden_layers": 3}, r"missing: videomae\.encoder\.layer\.2\..* and 12 more"),
        ({"num_hidden_layers": 1}, r"not asked for: videomae\.encoder\.layer\.1\."),
        ({"use_mean_pooling": False}, r"missing: videomae\.layernorm\.weight, videomae\.layernorm\.bias"),
        ({"qv_bias": False}, r"not asked for: .*q_bias"),
        (
            {"patch_size": 8},
            r"of another shape: .*projection\.weight, \(24, 3, 2, 4, 4\) rather than \(24, 3, 2, 8, 8\)",
        ),
        ({"hidden_size": 300000}, r"embeddings\.patch_embeddings\.projection\.bias, \(24,\) rather than \(300000,\)"),
        ({"intermediate_size": 48}, r"intermediate\.dense\.weight, \(96, 24\) rather than \(48, 24\)"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*{message}"):
        load_learner(f"hf:{tmp_path}", device="cpu")


def test_a_field_that_the_configuration_leaves_out_has_transformers_default() -> None:
    from tats_env.mae.huggingface import DEFAULTS

    theirs = transformers.VideoMAEConfig()
    assert {name: getattr(theirs, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    "name", ["mask_token", "decoder.head.bias", "videomae.encoder.layer.1.attention.attention.q_bias"]
)
def test_a_missing_or_surplus_tensor_is_named(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update(odd=tensors.pop(name)))
    with pytest.raises(ValueError, match=f"missing: {re.escape(name)}; not asked for: odd"):
        load_learner(tmp_path, device="cpu")


def test_pretraining_weights_without_any_decoder_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "Model")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("VideoMAEModel", "VideoMAEForPreTraining"))
    with pytest.raises(ValueError, match="missing: mask_token, encoder_to_decoder"):
        load_learner(tmp_path, device="cpu")


class Bomb:
    """Ends the test should anything unpickle it."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("the file was unpickled",)


def test_damaged_and_missing_files_are_refused_and_pickles_never_run(tmp_path: Path) -> None:
    saved(tmp_path)
    config, weights, pickled = (tmp_path / x for x in ("config.json", "model.safetensors", "pytorch_model.bin"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-100])
    with pytest.raises(ValueError, match="are damaged"):
        load_learner(tmp_path, device="cpu")
    weights.unlink()
    with pytest.raises(ValueError, match=r"lacks weights: it must hold model\.safetensors"):
        load_learner(tmp_path, device="cpu")
    for data in (pickle.dumps(Bomb(), protocol=2), b"", b"no checkpoint at all", pickle.dumps([1, 2], protocol=2)):
        pickled.write_bytes(data)
        with pytest.raises(ValueError, match="are damaged, or more than tensors"):
            load_learner(tmp_path, device="cpu")
    contents: list[Any] = [{"bomb": Bomb()}, {1: torch.zeros(1)}, torch.zeros(2)]
    for content in contents:
        torch.save(content, pickled)
        with pytest.raises(ValueError, match="are damaged, or more than tensors"):
            load_learner(tmp_path, device="cpu")
    torch.save({"model": {"mask_token": torch.zeros(1)}, "epoch": 3}, pickled)
    with pytest.raises(ValueError, match=r"missing: .*; not asked for: model, epoch"):
        load_learner(tmp_path, device="cpu")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"mask_token": "model-1.safetensors"}}')
    pickled.unlink()
    with pytest.raises(ValueError, match=r"lacks weights.*model-1\.safetensors"):
        load_learner(tmp_path, device="cpu")
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON"):
        load_learner(tmp_path, device="cpu")
    config.unlink()
    with pytest.raises(ValueError, match=r"has no config\.json: give a folder that save_pretrained wrote"):
        load_learner(tmp_path, device="cpu")


def test_a_name_on_the_hub_is_not_downloaded() -> None:
    with pytest.raises(FileNotFoundError, match="has to be downloaded first: hf download"):
        load_learner("hf:MCG-NJU/videomae-base", device="cpu")
