"""Loading Hugging Face's VideoMAE, with transformers' own network as the oracle."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tats_env  # noqa: F401 (registers the environment)
from tats_env.grid import TokenGrid, hidden_tokens, visible_mask
from tats_env.mae import MAELearner, load_learner, save_learner
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
    with torch.no_grad():
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
        ({"qv_bias": False}, r"not asked for: .*query\.bias"),
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
    asked = name.replace("q_bias", "query.bias").replace(".", r"\.")
    with pytest.raises(ValueError, match=f"missing: {asked}; not asked for: odd"):
        load_learner(tmp_path, device="cpu")


def test_pretraining_weights_without_any_decoder_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "Model")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("VideoMAEModel", "VideoMAEForPreTraining"))
    with pytest.raises(ValueError, match="missing: encoder_to_decoder"):
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
