"""The rows of ``tats bench``: each a small function that makes a step to time, and the table of them all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agents.attention import TrajectoryAttention
from agents.base import first_seed
from agents.distributions import PlackettLuce, picks_to_scores
from agents.hooks import Hook, MAEUpdateHook
from agents.rollout import Rollout
from experiments.bench_schema import AttentionConfig, BenchConfig, FeedConfig, load_bench
from experiments.build import agent_maker, masking_env, new_learner, token_grid
from experiments.references import attention_step, bare_step, huggingface_step, literal_trajectory_attention
from experiments.schema import RunConfig
from experiments.stopwatch import Step
from tats_env.data import VideoSet
from tats_env.grid import token_budget
from tats_env.keyed import keyed_order
from tats_env.mae import SIZES
from tats_env.mae.learner import resolve_device
from tats_env.task import MaskingTask


def changed(run: RunConfig, **changes: Any) -> RunConfig:
    """The run with other values; ``mae__size`` names one of a section."""
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        inner = getattr(run, section).model_copy(update={name: value}) if section else value
        run = run.model_copy(update={section or name: inner})
    return run


class Setting:
    """What rows of one configuration are measured on, as ``tats run`` would make it, each when first asked for.

    Args:
        run: the configuration; its device may be ``meta`` too.
        videos: where clips come from.
    """

    def __init__(self, run: RunConfig, videos: VideoSet) -> None:
        self.run, self.videos, self.device = run, videos, resolve_device(run.device)
        self.grid, self.size = token_grid(run), SIZES[run.mae.size]
        self.num_visible = token_budget(self.grid.num_tokens, run.mask_ratio)

    @cached_property
    def mae(self) -> Any:
        """The learner."""
        return new_learner(self.run)

    @cached_property
    def env(self) -> Any:
        """The vector environment, without the truth that rendered videos alone have."""
        env = masking_env(self.run, self.videos, self.mae, self.run.batch_size, "tokens")
        env.task.with_foreground = False
        return env

    @cached_property
    def agent(self) -> Any:
        """Our PPO in the environment."""
        make, settings = agent_maker(self.run.agent, self.run)
        return make(self.env, seed=self.run.seed, **settings)

    @cached_property
    def hooks(self) -> list[Hook]:
        """What a run hangs into the agent's loop, but for the log."""
        return [MAEUpdateHook()]

    @cached_property
    def task(self) -> MaskingTask:
        """The environment's task, with clips."""
        task: MaskingTask = self.env.task
        task.seed(range(self.run.batch_size))
        task.begin_episode()
        return task

    @cached_property
    def like(self) -> Setting:
        """One like it on which operations can be counted: not compiled and, for a GPU, of one clip without values."""
        changes: dict[str, Any] = {"compile": False} if self.run.compile else {}
        if self.device.type == "cuda":
            changes = {"compile": False, "device": "meta", "batch_size": 1, "loader__repeats": 1}
        return Setting(changed(self.run, **changes), self.videos) if changes else self

    def random_mask(self) -> Tensor:
        """Uniform random masks: visible tokens [B, K], ascending."""
        key = torch.randint(1 << 62, (self.run.batch_size,), device=self.device)
        return keyed_order(key, self.grid.num_tokens)[:, : self.num_visible].sort(dim=1).values


def mae_step(s: Setting) -> Step:
    """Clips, random masks, reconstruction, update: what training costs without a sampler."""

    def act(_: None) -> None:
        s.task.begin_episode()
        s.mae.reconstruct(s.task.clips, s.random_mask())
        s.mae.update()

    return Step(act)


def joint_step(s: Setting) -> Step:
    """One iteration of ``PPO.learn``: rollout, the MAE's update in it, PPO's epochs."""
    observation = s.env.reset(seed=first_seed(s.run.seed))[0]

    def act(_: None) -> None:
        nonlocal observation
        rollout, observation = s.agent._collect(observation, s.hooks)
        s.agent._train(rollout)

    return Step(act)


def fed(s: Setting) -> Callable[[Tensor], None]:
    """The joint step on clips that are given to it, uint8 [B, T, H, W, 3].

    The environment goes on to clips of its own, and makes an observation of them that nobody sees: 2 % too much.
    """
    s.env.reset(seed=first_seed(s.run.seed))

    def step(clips: Tensor) -> None:
        s.env.task.clips = clips
        rollout, _ = s.agent._collect(s.env.task.observe(), s.hooks)
        s.agent._train(rollout)

    return step


def data(s: Setting) -> Step:
    """The next clips, drawn from the set in memory."""
    return Step(lambda _: s.task.begin_episode())


def tokenise(s: Setting) -> Step:
    """The observation."""
    return Step(lambda _: s.task.observe())


def policy_forward(s: Setting) -> Step:
    """Logits and values, with the graph that an update uses where it is the same."""
    observation = s.task.observe()

    def act(_: None) -> None:
        with torch.set_grad_enabled(s.agent._reuses):
            s.agent._forward(observation)

    return Step(act)


def sampling(s: Setting) -> Step:
    """A draw from the policy, the scores that carry it, and the K highest of them."""
    agent, task = s.agent, s.task
    logits = agent.logits(task.observe())

    @torch.no_grad()
    def act(_: None) -> None:
        policy = PlackettLuce(logits, task.num_picks, agent.explore)
        picks = policy.sample(uniform=agent.draws.uniform(*logits.shape))
        task._pick(picks_to_scores(picks, logits.shape[1]))

    return Step(act)


def mae_forward(s: Setting) -> Step:
    """Loss and errors, with a graph."""
    visible = s.random_mask()
    return Step(lambda _: s.mae.reconstruct(s.task.clips, visible))


def _learn(s: Setting, visible: Tensor) -> None:
    s.mae._guard.accumulate(s.mae._loss)
    s.mae._loss = None


def mae_backward(s: Setting) -> Step:
    """The gradient of the loss."""
    visible = s.random_mask()
    return Step(lambda _: _learn(s, visible), lambda: s.mae.reconstruct(s.task.clips, visible))


def mae_optimiser(s: Setting) -> Step:
    """Norm, guard and AdamW."""
    visible = s.random_mask()

    def prepare() -> None:
        s.mae.reconstruct(s.task.clips, visible)
        _learn(s, visible)

    return Step(lambda _: s.mae.update(), prepare)


def ppo_epochs(s: Setting) -> Step:
    """All passes over a rollout."""
    observation = s.env.reset(seed=first_seed(s.run.seed))[0]

    def prepare() -> Rollout:
        nonlocal observation
        rollout, observation = s.agent._collect(observation, s.hooks)
        return rollout

    return Step(s.agent._train, prepare)


def stepping(s: Setting) -> Step:
    """A step of the vector environment under random scores, with an MAE that does not learn."""
    s.mae.train(False)
    s.env.reset(seed=first_seed(s.run.seed))
    shape = s.run.batch_size, s.grid.num_tokens
    return Step(lambda _: s.env.step(2 * torch.rand(shape, device=s.device) - 1))


def bare(s: Setting) -> Step:
    """The same network's training step, written straight down."""
    step = bare_step(s.grid, s.size, s.run.batch_size, s.num_visible, s.device, s.run.compile)
    return Step(lambda _: step())


def huggingface(s: Setting) -> Step:
    """The same sizes in Hugging Face's code."""
    step = huggingface_step(s.grid, s.size, s.run.batch_size, s.num_visible, s.device)
    return Step(lambda _: step())


def attention(config: AttentionConfig, literal: bool, s: Setting) -> Step:
    """Trajectory attention forward and backward, ours or the literal one."""
    module = TrajectoryAttention(config.width, config.num_heads).to(s.device)
    shape = config.clips, s.grid.num_steps, s.grid.num_positions, config.width
    tokens = torch.randn(shape, device=s.device)
    forward: Any = partial(literal_trajectory_attention, module) if literal else module
    if s.run.compile and not literal:
        forward = torch.compile(module, fullgraph=True, dynamic=False)
    step = attention_step(forward, module, tokens)
    return Step(lambda _: step())


def matrix_product(n: int, s: Setting) -> Step:
    """n x n by n x n, in bfloat16 on a GPU."""
    dtype = torch.float32 if s.device.type == "cpu" else torch.bfloat16
    a, b, out = (torch.randn(n, n, device=s.device, dtype=dtype) for _ in range(3))
    return Step(lambda _: torch.mm(a, b, out=out))


def copy(mib: int, s: Setting) -> Step:
    """From memory to memory of the device."""
    source = torch.randint(256, (mib << 20,), dtype=torch.uint8, device=s.device)
    target = torch.empty_like(source)
    return Step(lambda _: target.copy_(source))


class Row(NamedTuple):
    """One line of the table."""

    name: str
    make: Callable[[Setting], Step]
    clips: int = 0
    """In a step; 0 where none are."""
    against: tuple[str, ...] = ()
    """Rows with whose clips a second its own are compared."""
    part_of: str = ""
    """The row of whose time it is a share."""
    eager: bool = False
    """Whether it is never compiled."""
    per_clip: bool = True
    """Whether its operations are those of one clip times the batch."""
    needs_values: bool = False
    """Whether its operations can't be counted on ``meta``."""


class Group(NamedTuple):
    """Rows that share what they are measured on."""

    run: RunConfig
    rows: list[Row]
    goals: bool = False
    """Whether goals are read off them."""
    predicted: bool = False
    """Whether their times on an H100 are worked out rather than anything measured."""
    feed: FeedConfig | None = None
    """Of the rows that ``feeding`` names."""


PARTS = {
    "data": data,
    "tokenise": tokenise,
    "policy forward": policy_forward,
    "sampling": sampling,
    "MAE forward": mae_forward,
    "MAE backward": mae_backward,
    "MAE optimiser": mae_optimiser,
    "PPO epochs": ppo_epochs,
}
JOINT, MAE, BARE, HUGGING_FACE, STEPPING = "joint step", "MAE step", "bare MAE step", "Hugging Face", "environment"
MATRIX, COPY = "matrix product", "copy"
ATTENTION, LITERAL = "trajectory attention", "trajectory attention, literal"
PREDICTED = "H100, predicted: "
LOADER, FED = "loader", "joint step, fed by the loader"


AXES = {
    "mask_ratio": "share of tokens hidden",
    "batch_size": "clips in a step",
    "num_tokens": "tokens of a clip",
    "parameters": "parameters of the MAE",
}
"""What is varied for plots and fits."""


def named(kind: str, batch: int, *rest: str) -> str:
    """A row's name: ``joint step, batch 64`` and what else is special about it."""
    return ", ".join([kind, f"batch {batch}", *rest])


def feeding(feed: FeedConfig, batch: int) -> tuple[str, str, str]:
    """The rows: the loader alone, each clip decoded for itself; the same, repeated; and the step that it feeds."""
    return named(LOADER, batch), named(LOADER, batch, f"{feed.repeats} clips a video"), named(FED, batch)


def table(config: BenchConfig, run: RunConfig) -> list[Group]:
    """All rows of a bench, those that goals are judged by first; each is there once."""
    groups = [*_ceilings(config, run), *_goals(config, run), _huggingface(config, run)]
    if config.feed is not None:
        names = feeding(config.feed, run.batch_size)
        reference = (named(JOINT, run.batch_size),)
        rows = [Row(name, joint_step, run.batch_size, reference) for name in names]
        groups.append(Group(run, rows, feed=config.feed))
    if config.predict is not None:
        groups += _predicted(*load_bench(config.predict))
    groups += [group for curve in curves(config, run).values() for group in curve]
    seen: set[str] = set()
    result = []
    for group in groups:
        rows = [row for row in group.rows if row.name not in seen]
        seen |= {row.name for row in rows}
        result += [group._replace(rows=rows)] if rows else []
    return result


def _ceilings(config: BenchConfig, run: RunConfig) -> list[Group]:
    makers = {MATRIX: partial(matrix_product, config.matrix), COPY: partial(copy, config.copy_mib)}
    return [Group(run, [Row(name, make, eager=True, per_clip=False) for name, make in makers.items()], goals=True)]


def _goals(config: BenchConfig, run: RunConfig) -> list[Group]:
    """Stepping alone and attention alone, which are soon done; the step at each batch; with fewer tokens decoded."""
    first, section = config.batches[0], config.attention
    ours, literal = (partial(attention, section, literal) for literal in (False, True))
    return [
        Group(run, [Row(named(STEPPING, first), stepping, first)], goals=True),
        Group(
            run,
            [
                Row(ATTENTION, ours, section.clips, (LITERAL,), per_clip=False),
                Row(LITERAL, literal, section.clips, eager=True, per_clip=False),
            ],
            goals=True,
        ),
        *(_steps(changed(run, batch_size=batch)) for batch in config.batches),
        _some_decoded(config, run)._replace(goals=True),
    ]


def _some_decoded(config: BenchConfig, run: RunConfig) -> Group:
    batch, ratio = config.batches[-1], config.decode_ratio
    name = named(JOINT, batch, f"{100 * ratio:g} % decoded")
    row = Row(name, joint_step, batch, (named(JOINT, batch), named(BARE, batch)))
    return Group(changed(run, batch_size=batch, mae__decode_ratio=ratio), [row])


def _steps(run: RunConfig) -> Group:
    batch = run.batch_size
    joint, mae, bare_mae, theirs = (named(kind, batch) for kind in (JOINT, MAE, BARE, HUGGING_FACE))
    rows = [
        Row(mae, mae_step, batch, (bare_mae, theirs)),
        Row(joint, joint_step, batch, (mae, bare_mae, theirs)),
        *(Row(named(name, batch), make, batch, part_of=joint) for name, make in PARTS.items()),
        Row(bare_mae, bare, batch, (theirs,)),  # last, for it takes long to compile
    ]
    return Group(run, rows, goals=True)


def _huggingface(config: BenchConfig, run: RunConfig) -> Group:
    batch = config.batches[0]
    row = Row(named(HUGGING_FACE, batch), huggingface, batch, eager=True, needs_values=True)
    return Group(run, [row])


def _predicted(config: BenchConfig, run: RunConfig) -> list[Group]:
    """The steps of another bench."""
    steps = [_curve(run, changed(run, batch_size=batch)) for batch in config.batches]
    return [
        Group(group.run, [row._replace(name=PREDICTED + row.name, against=()) for row in group.rows], predicted=True)
        for group in (*steps, _some_decoded(config, run))
    ]


def curves(config: BenchConfig, run: RunConfig) -> dict[str, list[Group]]:
    """What is plotted against what: the step with and without a sampler at values of ``AXES``."""
    growth = config.growth
    ratios = sorted({*config.mask_ratios, run.mask_ratio}) if config.mask_ratios else []
    small = changed(run, batch_size=growth.batch_size)
    shapes = [(clip.num_frames, clip.size) for clip in growth.clips]
    return {
        "mask_ratio": [_curve(run, changed(run, mask_ratio=ratio)) for ratio in ratios],
        "batch_size": [_curve(run, changed(run, batch_size=batch)) for batch in growth.batches],
        "num_tokens": [
            _curve(run, changed(small, clip__num_frames=frames, clip__size=size)) for frames, size in shapes
        ],
        "parameters": [_curve(run, changed(small, mae__size=size)) for size in growth.models],
    }


def _curve(base: RunConfig, run: RunConfig) -> Group:
    """The two steps of a run, named after how it differs from the base."""
    special = []
    if run.mask_ratio != base.mask_ratio:
        special.append(f"{100 * run.mask_ratio:g} % hidden")
    if run.clip != base.clip:
        special.append(f"{run.clip.num_frames}x{run.clip.size}x{run.clip.size}")
    if run.mae != base.mae:
        special.append(run.mae.size)
    kinds = {MAE: mae_step, JOINT: joint_step}
    rows = [Row(named(kind, run.batch_size, *special), make, run.batch_size) for kind, make in kinds.items()]
    return Group(run, rows)
