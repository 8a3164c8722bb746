"""What a user may write, what it becomes, and what is said when it can't be."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

from experiments import cli
from experiments.config import dump_config, load_config, parse_config, to_values
from experiments.refusals import ConfigError
from experiments.schema import (
    AgentConfig,
    ClipConfig,
    EvaluateConfig,
    MAEConfig,
    OtherAgentConfig,
    RunConfig,
)
from experiments.section import RENDERED_SETS, REWARDS, ROOTED_SETS
from experiments.yaml_files import packaged_configs

ROOT = Path(__file__).parents[1]
SETS = (
    "motion, scenes or folder:/path, list:/path, ssv2:/path, kinetics400:/path, ucf101:/path, hmdb51:/path, "
    "shards:/path"
)


def complaint(tmp_path: Path, text: str) -> str:
    """What is said of this YAML, less the file's name, which every line must begin with."""
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return "\n".join(line.removeprefix(f"{path}: ") for line in lines)


def tats(*args: str, cwd: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, *flags, "-m", "experiments", *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def leaves(tree: dict[str, object], prefix: str = "") -> list[str]:
    return [
        path
        for key, value in tree.items()
        for path in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key])
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("agent: {clip_rnage: 0.1}", "agent.clip_rnage: unknown key; did you mean agent.clip_range?"),
        ("clip_range: 0.1", "clip_range: unknown key; did you mean agent.clip_range?"),
        ("agnet: {clip_range: 0.1}", "agnet: unknown key; did you mean agent?"),
        ("mae: {learning_rte: 1}", "mae.learning_rte: unknown key; did you mean mae.learning_rate?"),
        ("learning_rate: 1", "did you mean mae.learning_rate or agent.learning_rate or probe."),
        ("agent.clip_range: 0.1", "agent.clip_range: unknown key; write it as a mapping, agent: {clip_range: ...}"),
        ("evaluate: {xyz: 1}", "evaluate.xyz: unknown key; there are num_videos, seed, clips, tasks, data, points"),
        ("1: 2", "1: unknown key; there are name, seed"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_valid_one(
    tmp_path: Path, text: str, said: str
) -> None:
    assert said in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: ten", "steps: 'ten' is text; expected a whole number, such as 600"),
        ("steps: '32'", "steps: '32' is text; expected a whole number, such as 600 (write 32 without quotes)"),
        ("steps: true", "steps: True is a truth value; expected a whole number"),
        ("steps: 32.0", "steps: 32.0 is a number; expected a whole number"),
        ("steps: [1]", "steps: [1] is a list; expected a whole number"),
        ("num_videos: many", "num_videos: 'many' is text; expected a whole number, such as 480"),
        ("mae: {learning_rate: abc}", "mae.learning_rate: 'abc' is text; expected a number"),
        ("mae: {learning_rate: true}", "mae.learning_rate: True is a truth value; expected a number"),
        ("compile: 'yes'", "compile: 'yes' is text; expected true or false"),
        ("name: 12", "name: 12 is a whole number; expected text, such as run (put it in quotes)"),
        ("name:", "name: nothing is given; expected text, such as run"),
        ("mae: base", "mae: 'base' is text; expected a mapping of keys to values: size, init, frozen,"),
        ("mae:", "mae: nothing is given; expected a mapping of keys to values"),
    ],
)
def test_a_wrong_type_is_refused_with_what_was_given_and_what_is_expected(tmp_path: Path, text: str, said: str) -> None:
    assert complaint(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "mask_ratio: 1.2",
            "mask_ratio: 1.2 is not below 1; a ratio such as 0.9 keeps a tenth of the tokens visible",
        ),
        ("mask_ratio: 0", "mask_ratio: 0.0 is not above 0; a ratio such as 0.9"),
        ("mask_ratio: .nan", "mask_ratio: nan is not finite; the default is 0.9"),
        ("steps: 0", "steps: 0 is not above 0; the default is 600"),
        ("seed: -1", "seed: -1 is below 0; the default is 0"),
        ("evaluate: {num_videos: 0}", "evaluate.num_videos: 0 is not above 0; the default is 240"),
        ("agent: {gamma: 1.5}", "agent.gamma: 1.5 is above 1; the default is 0.0"),
        ("agent: {gae_lambda: -0.1}", "agent.gae_lambda: -0.1 is below 0; the default is 0.95"),
        ("agent: {explore: 1}", "agent.explore: 1 is not below 1; the default is 0.5"),
        ("agent: {clip_range: 0}", "agent.clip_range: 0 is not above 0; the default is 0.2"),
        ("agent: {target_kl: 0}", "agent.target_kl: 0 is not above 0; the default is 0.05"),
        ("agent: {entropy_floor: 0.5}", "agent.entropy_floor: 0.5 is below 1; the default is null"),
        ("agent: {credit: token_moton}", "agent.credit: 'token_moton' is unknown; give 'clip', 'pick_surprise',"),
        ("mae: {size: bse}", "mae.size: 'bse' is unknown; give 'tiny', 'mini', 'small', 'base' or 'large'; did you"),
        ("device: gpu", "device: 'gpu' is unknown; give auto, cpu, cuda or cuda:N, such as cuda:0"),
        ("name: ../elsewhere", "name: '../elsewhere' is unknown; give a folder's name, of letters, digits"),
        ("reward: reconstruction_eror", "reward: 'reconstruction_eror' is unknown; give one of surprise,"),
        ("data: 'folder:'", f"data: 'folder:' is unknown; give {SETS}; did you mean folder:/path?"),
        ("data: moton", f"data: 'moton' is unknown; give {SETS}; did you mean motion?"),
        ("data: ucf:/x/y", f"data: 'ucf:/x/y' is unknown; give {SETS}; did you mean ucf101:/x/y?"),
        (
            "data: /x/y",
            f"data: '/x/y' is unknown; give {SETS}; did you mean folder:/x/y?",
        ),
    ],
)
def test_an_impossible_value_is_refused_with_a_remedy(tmp_path: Path, text: str, said: str) -> None:
    assert complaint(tmp_path, text).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clip: {patch_size: 5}", "clip.patch_size: 5 does not divide size = 32; give 4 or 8"),
        ("clip: {size: 30}", "clip.patch_size: 8 does not divide size = 30; give 6 or 10"),
        ("clip: {num_frames: 7}", "clip.tubelet_size: 2 does not divide num_frames = 7; give 1 or 7"),
        ("clip: {patch_size: 64}", "clip.patch_size: 64 does not divide size = 32; give 32"),
        ("agent: {num_heads: 5}", "agent.num_heads: 5 does not divide width = 64; give 4 or 8"),
        (
            "agent: {n_minibatches: 3}",
            "agent.n_minibatches: 3 does not divide agent.n_steps * batch_size = 32; give 2 or 4",
        ),
        (
            "agent: {entropy_floor: 500}",
            "agent.entropy_floor: 500.0 is above the N = 128 tokens of a clip; give 128 or less",
        ),
        (
            "mae: {learning_rate: 1e-3, base_learning_rate: 1.5e-4}",
            "mae.base_learning_rate: 0.00015 is given beside mae.learning_rate = 0.001; give one",
        ),
        ("clip: {num_frames: 2, size: 8}", "clip: one token is the whole clip, which can't be masked"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_what_would_fit(
    tmp_path: Path, text: str, said: str
) -> None:
    assert complaint(tmp_path, text).startswith(said)


def test_a_mask_ratio_that_leaves_nothing_visible_says_n_k_and_ratios_that_work(tmp_path: Path) -> None:
    said = complaint(tmp_path, "mask_ratio: 0.999")
    assert said.startswith("mask_ratio: 0.999 keeps K = 0 of the N = 128 tokens of a clip visible")
    bounds = re.search(r"give a ratio from ([\d.]+) to ([\d.]+)$", said)
    assert bounds is not None
    for ratio in map(float, bounds.groups()):
        assert RunConfig(mask_ratio=ratio).mask_ratio == ratio


def test_every_problem_of_a_file_is_reported_on_a_line_of_its_own(tmp_path: Path) -> None:
    said = complaint(tmp_path, "steps: 0\nagent: {gamma: 2, lamda: 1}\nclip: {patch_size: 5}")
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "steps",
        "clip.patch_size",
        "agent.gamma",
        "agent.lamda",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 1\nclip: [", "line 2, column 8: "),
        ("steps:\n\t3", "line 2, column 1: found character '\\t'"),
        ("steps: 1\nseed: 1\nsteps: 2", "line 3, column 1: the key steps is given twice; keep one"),
        ("agent:\n  gamma: 0\n  gamma: 1", "line 3, column 3: the key gamma is given twice; keep one"),
        ("- steps: 1", "holds a list; a configuration is a mapping of keys to values, such as 'steps: 600'"),
        ("# nothing yet", "holds nothing; a configuration is a mapping"),
        ("\x01", "is not YAML: "),
    ],
)
def test_a_file_that_is_not_a_mapping_in_yaml_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert str(error.value).startswith(f"{path}: {said}")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"my\.yaml: can't be read"):
        load_config(str(tmp_path / "my.yaml"))


@pytest.mark.parametrize("number", ["1e-3", "1E-3", ".1e-2", "+1e-3", "0.001"])
def test_numbers_may_be_written_with_an_exponent(tmp_path: Path, number: str) -> None:
    (tmp_path / "my.yaml").write_text(f"agent: {{learning_rate: {number}}}")
    assert load_config(str(tmp_path / "my.yaml")).agent.learning_rate == 1e-3


def test_what_a_file_leaves_out_takes_its_default(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("mask_ratio: 0.95\nnum_videos: null\nclip: {size: 64}")
    config = load_config(str(tmp_path / "my.yaml"))
    assert config == RunConfig(mask_ratio=0.95, num_videos=None, clip=ClipConfig(size=64))
    assert (config.clip.num_tokens, config.agent.credit) == (512, "token_motion")


def test_a_data_set_may_be_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "data: {ucf101: /my videos, split: 2}\nevaluate: {data: [motion, {hmdb51: /h}, {folder: /f}]}\n"
    )
    config = load_config(str(tmp_path / "my.yaml"))
    assert config.data == "ucf101:/my videos?split=2"
    assert config.evaluate.data == ["motion", "hmdb51:/h", "folder:/f"]
    assert "data: 'ucf:/x' is unknown" in complaint(tmp_path, "data: {ucf: /x}")


@pytest.mark.parametrize("path", ["quickstart", "quickstart.yaml", "experiments/quickstart.yaml"])
def test_a_packaged_configuration_is_found_by_name_or_path_from_any_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(path) == load_config(str(ROOT / "experiments" / "quickstart.yaml"))


def test_a_file_of_the_current_folder_goes_before_a_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("name: mine")
    assert load_config("quickstart.yaml").name == "mine"
    assert load_config("quickstart").name == "quickstart"


@pytest.mark.parametrize("path", ["quickstrat", "elsewhere/quickstart.yaml"])
def test_an_unknown_configuration_names_those_there_are_and_the_nearest(path: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: no such file, nor a configuration that comes with the package (")
    assert str(error.value).endswith("; did you mean quickstart?")
    assert all(name in str(error.value) for name in packaged_configs())


def test_the_folder_of_a_run_is_refused_with_the_file_inside(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(RunConfig()))
    with pytest.raises(ConfigError, match=f"is a run's folder; give {tmp_path}/config.yaml"):
        load_config(str(tmp_path))


def test_the_quickstart_spells_out_every_setting() -> None:
    text = (ROOT / "experiments" / "quickstart.yaml").read_text(encoding="utf-8")
    assert leaves(yaml.safe_load(text)) == leaves(to_values(load_config("quickstart")))


@pytest.mark.parametrize("name", packaged_configs())
def test_a_packaged_configuration_begins_with_its_command(name: str) -> None:
    text = (ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8")
    config = load_config(name)
    assert config.name == name
    command = re.search(rf"^#   tats run {name}( --data \S+)?$", text.split("\n\n")[0], re.MULTILINE)
    overrides = re.findall(rf"^#   tats run {name} (--.+)$", text, re.MULTILINE)
    assert command and overrides
    assert any(load_config(name, shlex.split(options)) != config for options in overrides)


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        RunConfig(
            name="1e5",
            out="Läufe/null",
            data="folder:/a b: c#d",
            num_videos=None,
            compile=True,
            mae=MAEConfig(base_learning_rate=1e-7),
            agent=AgentConfig(learning_rate=1e22, target_kl=None, entropy_floor=1.0),
        ),
    ],
)
def test_what_is_dumped_loads_back_equal(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert leaves(yaml.safe_load(dump_config(config))) == leaves(to_values(config))


@pytest.mark.parametrize(
    ("options", "read", "expected"),
    [
        ("--agent.clip-range 0.1", lambda c: c.agent.clip_range, 0.1),
        ("--agent.clip_range 0.1", lambda c: c.agent.clip_range, 0.1),
        ("--agent.clip-range=1e-1", lambda c: c.agent.clip_range, 0.1),
        ("--data folder:/x", lambda c: c.data, "folder:/x"),
        ("--reward my.module:function", lambda c: c.reward, "my.module:function"),
        ("--num-videos None --agent.target-kl None", lambda c: (c.num_videos, c.agent.target_kl), (None, None)),
        ("--compile", lambda c: c.compile, True),
        ("--compile True", lambda c: c.compile, True),
        ("--evaluate.no-pictures", lambda c: c.evaluate.pictures, False),
        ("--agent.normalize_advantage false", lambda c: c.agent.normalize_advantage, False),
        ("--agent.credit clip", lambda c: c.agent.credit, "clip"),
        ("--clip.size 60 --clip.patch-size 10", lambda c: c.clip.num_tokens, 288),
    ],
)
def test_an_option_sets_its_value_and_leaves_the_files_others(
    tmp_path: Path, options: str, read: Callable[[RunConfig], object], expected: object
) -> None:
    (tmp_path / "my.yaml").write_text("steps: 7\nagent: {width: 48}")
    config = load_config(str(tmp_path / "my.yaml"), options.split())
    assert read(config) == expected != read(RunConfig())
    assert (config.steps, config.agent.width) == (7, 48)


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("--agent.class tube", {}),
        ("--agent.class=motion --agent.temperature 0.5 --agent.camera", {"temperature": 0.5, "camera": True}),
        ("--agent.class my.module:Agent --agent.layers.sizes [1,2]", {"layers": {"sizes": [1, 2]}}),
        ("--agent.class sb3:PPO '--agent.policy-kwargs={net_arch: [8]}'", {"policy_kwargs": {"net_arch": [8]}}),
    ],
)
def test_agent_class_swaps_the_agent_and_drops_the_settings_of_the_one_before(
    options: str, settings: dict[str, object], tmp_path: Path
) -> None:
    config = load_config("quickstart", [*shlex.split(options), "--steps", "7"])
    assert isinstance(config.agent, OtherAgentConfig)
    assert config.agent.model_extra == settings and config.steps == 7
    (tmp_path / "my.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "my.yaml")) == config
    back = load_config(str(tmp_path / "my.yaml"), ["--agent.class", "ppo", "--agent.width", "16"])
    assert back.agent == AgentConfig(width=16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--agent.class tub", "agent.class: 'tub' is unknown; give one of ppo, adamae, random, tube, frame, block"),
        ("--rounds 5", "rounds: 5 does not divide the number of visible tokens K = 12; give 4 or 6"),
        ("--agent.n-steps 7", "agent.n_steps: 7 does not divide steps * rounds = 600; give 6 or 8"),
        ("--rounds 4 --horizon 2", "horizon: 2 is given beside rounds = 4; set one of them to 1"),
        ("--agent.class tube --agent.a.b 1 --agent.a 2 --agent.a.c 3", "--agent.a.c: a is not a mapping"),
        ("--agent.class tube --agent.a={b:", "--agent.a: '{b:' is not YAML: expected the node content"),
    ],
)
def test_an_agent_that_cannot_be_had_is_refused(options: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("quickstart", options.split())
    assert str(error.value).startswith(f"command line: {said}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--mask-ratio 1.2", "mask_ratio: 1.2 is not below 1; a ratio such as 0.9 keeps a tenth of the tokens visible"),
        ("--clip.patch_size 5", "clip.patch_size: 5 does not divide size = 32; give 4 or 8"),
        ("--seed -1", "seed: -1 is below 0; the default is 0"),
        ("--data moton", f"data: 'moton' is unknown; give {SETS}; did you mean motion?"),
    ],
)
def test_an_option_with_an_impossible_value_is_refused_in_the_same_words(options: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("quickstart", options.split())
    assert str(error.value) == f"command line: {said}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--agent.clip-rnage 0.1", "--agent.clip-range"),
        ("--clip-range 0.1", "--agent.clip-range"),
        ("--steps ten", "invalid literal for int"),
        ("--agent.form proportionate", "proportional"),
    ],
)
def test_an_option_that_cannot_be_read_is_refused_with_the_nearest(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "quickstart", *options.split()])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().steps = 1  # type: ignore[misc]


def test_names_agree_with_those_that_the_code_offers() -> None:
    from agents.credit import CREDITS, FORMS
    from tats_env.data import listing
    from tats_env.mae import SIZES
    from tats_env.rewards import REWARDS as offered

    def choices(section: type[AgentConfig] | type[MAEConfig], name: str) -> set[str]:
        return set(get_args(section.model_fields[name].annotation))

    assert set(REWARDS) == set(offered)
    assert RENDERED_SETS == listing.RENDERED and (*RENDERED_SETS, *ROOTED_SETS) == listing.KINDS
    assert choices(AgentConfig, "credit") == set(CREDITS)
    assert choices(AgentConfig, "form") == set(FORMS)
    assert choices(MAEConfig, "size") == set(SIZES)


@pytest.mark.parametrize("ratio", [1e-12, 0.001, 0.0078125, 0.5, 0.9, 0.99, 0.9921875, 0.993, 0.9999])
def test_a_mask_ratio_is_accepted_exactly_where_the_environment_accepts_it(ratio: float) -> None:
    from tats_env.grid import TokenGrid, token_budget

    n = TokenGrid(16, 32, 32, 2, 8).num_tokens
    assert RunConfig().clip.num_tokens == n

    def accepts(check: Callable[[], object]) -> bool:
        try:
            check()
        except ValueError:
            return False
        return True

    assert accepts(lambda: parse_config({"mask_ratio": ratio}, "test")) == accepts(lambda: token_budget(n, ratio))


def test_tats_alone_and_its_help_name_every_verb_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        said = capsys.readouterr().out
        assert all(name in said and verb.summary in said and verb.example in said for name, verb in cli.VERBS.items())


def test_tats_version_names_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"tats-env \d\S+\n", capsys.readouterr().out)


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rnu", "quickstart"]) == 2
    verbs = "run, compare, probe, finetune, report, export, bench, data"
    assert capsys.readouterr().err == f"tats: rnu: unknown verb; there are {verbs}; did you mean tats run?\n"


@pytest.mark.parametrize("argv", [["run"], ["run", "--steps", "5"]])
def test_run_without_a_configuration_says_how(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert "tats run CONFIG" in said and all(name in said for name in packaged_configs())


@pytest.mark.parametrize("config", [[], ["my.yaml"]])
def test_help_shows_every_setting_with_its_docstring_and_value(
    config: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("mask_ratio: 0.85")
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", *config, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert ("(default: 0.85)" in said) == bool(config)
    for path in leaves(to_values(RunConfig())):
        assert f"--{path.replace('_', '-')}" in said
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", said).split())
    assert f"usage: tats run {config[0] if config else 'CONFIG'} " in words
    for section in (RunConfig, ClipConfig, MAEConfig, AgentConfig, EvaluateConfig):
        for name, field in section.model_fields.items():
            if not isinstance(field.default, BaseModel):
                assert field.description, name
                assert field.description in words


def test_help_and_refusals_answer_without_torch_gymnasium_or_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("agent: {clip_rnage: 0.1}")
    for args, code, said in (
        (["run", "quickstart", "--help"], 0, "--agent.clip-range"),
        (["run", "my.yaml"], 2, "my.yaml: agent.clip_rnage: unknown key; did you mean agent.clip_range?\n"),
        (["run", "quickstart", "--mask-ratio", "1.2"], 2, "command line: mask_ratio: 1.2 is not below 1"),
    ):
        done = tats(*args, cwd=tmp_path, flags=("-X", "importtime"))
        assert done.returncode == code
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time" in line}
        assert "tyro" in imported and not imported & {"torch", "gymnasium", "experiments.run"}


def dispatch(monkeypatch: pytest.MonkeyPatch, run: Callable[..., int], *argv: str) -> int:
    """``tats run quickstart`` with this in place of what a run does."""
    module = ModuleType("experiments.run")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "experiments.run", module)
    return cli.main(["run", "quickstart", *argv])


def test_run_gets_the_configuration_with_its_options_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[RunConfig] = []

    def run(config: RunConfig, folder: Path | None) -> int:
        started.append(config)
        return 3

    assert dispatch(monkeypatch, run, "--steps", "5") == 3
    assert started == [load_config("quickstart", ["--steps", "5"])]


def test_bad_data_and_ctrl_c_end_a_run_in_one_line_but_a_defect_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tats_env.data import DataError

    def failing(error: BaseException) -> Callable[..., int]:
        def run(config: RunConfig, folder: Path | None) -> int:
            raise error

        return run

    assert dispatch(monkeypatch, failing(DataError("/x: there is no such folder"))) == 2
    assert capsys.readouterr().err == "/x: there is no such folder\n"
    assert dispatch(monkeypatch, failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ValueError, match="a defect"):
        dispatch(monkeypatch, failing(ValueError("a defect")))
