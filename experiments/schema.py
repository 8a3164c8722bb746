"""The one schema of an experiment: every setting with its type, default and meaning, and what is refused."""

from __future__ import annotations

import re
from math import ceil, floor
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from agents import AGENTS
from experiments.refusals import close, did_you_mean
from experiments.section import Section, check_divides, check_text, data_text, data_texts

MOST_TOKENS = 1_000_000
"""In a clip; more are a mistake."""


class ClipConfig(Section):
    """What a clip is, and how it is cut into tokens."""

    num_frames: PositiveInt = 16
    """Frames in a clip."""
    frame_stride: PositiveInt = 1
    """Frames of the video from one frame of the clip to the next."""
    size: PositiveInt = 32
    """Height and width of a clip, in pixels."""
    tubelet_size: PositiveInt = 2
    """Frames in a token."""
    patch_size: PositiveInt = 8
    """Height and width of a token, in pixels."""
    sampling: Literal["dense", "uniform"] = "dense"
    """dense: frames frame_stride apart; uniform: one frame out of each of num_frames equal parts of the video (TSN)."""
    augment: Literal["none", "multi_scale", "random_resized"] = "none"
    """How training clips are cropped: centre, VideoMAE's multi-scale corner crops, or Inception's random areas."""
    flip: bool = False
    """Mirror half of the training clips; never done where left or right is the label."""

    @property
    def num_tokens(self) -> int:
        """N, the tokens of a clip."""
        return self.num_frames // self.tubelet_size * (self.size // self.patch_size) ** 2


class LoaderConfig(Section):
    """How videos become clips in memory."""

    decoder: Literal["decord", "torchcodec"] = "decord"
    """What decodes; torchcodec is an extra, pip install 'tats-env[torchcodec]'."""
    workers: NonNegativeInt | None = None
    """Processes that decode; 0 decodes in threads of the run itself; None is one process a core."""
    repeats: PositiveInt = 1
    """Clips in a batch that share one decoded video, under different crops and masks."""
    cache: str | None = None
    """Folder for decoded, resized videos, which may be shared by several runs; None keeps none."""
    cache_gb: NonNegativeFloat = 50.0
    """Size at which the least recently used videos leave that folder; 0 reads it and writes nothing."""


class MAEConfig(Section):
    """The masked autoencoder and its training."""

    size: Literal["tiny", "mini", "small", "base", "large"] = "tiny"
    """Network size: tiny is for CPUs, mini for small clips, base is VideoMAE's ViT-B."""
    init: str | None = None
    """Start from a run's mae.safetensors, hf:/folder or pth:/file.pth of VideoMAE, sizes too; None is from scratch."""
    frozen: bool = False
    """Leave the MAE as it is, which makes the environment a stationary one."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate as it is; without this and base_learning_rate, the size's own."""
    base_learning_rate: PositiveFloat | None = None
    """Peak learning rate for 256 clips, scaled by the global batch; give this or learning_rate."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's weight decay, on matrices only."""
    warmup_steps: NonNegativeInt = 40
    """Updates over which the learning rate rises to its peak."""
    update_every: PositiveInt = 1
    """Environment steps from one update of the MAE to the next; those between are skipped, not accumulated."""
    decode_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the hidden tokens, drawn at random, that the decoder is asked for in training."""
    checkpointing: bool = False
    """Compute the blocks' activations anew in the backward pass rather than keep them: less memory, more time."""

    @field_validator("base_learning_rate")
    @classmethod
    def _one_learning_rate(cls, value: float | None, info: ValidationInfo) -> float | None:
        absolute = info.data.get("learning_rate")
        if value is not None and absolute is not None:
            raise ValueError(f"{value} is given beside mae.learning_rate = {absolute}; give one, set the other to null")
        return value


class AgentConfig(Section):
    """Our PPO and its token sampler; another class has settings of its own (OtherAgentConfig)."""

    class_: Literal["ppo"] = Field(default="ppo", alias="class")
    """ppo, adamae, random, tube, frame, block, motion, oracle, greedy, sb3:ALGORITHM or package.module:Class."""
    credit: Literal["clip", "pick_surprise", "token_error", "token_motion"] = "token_motion"
    """Which outcome speaks for which token; the token credits show what was hidden and hard to predict."""
    form: Literal["standardised", "inverted", "proportional"] = "standardised"
    """How a token's outcome becomes its advantage; inverted has hard tokens hidden. Clip credit knows no forms."""
    power: PositiveFloat = 1.0
    """Exponent of the proportional form: probabilities settle in proportion to outcome^power."""
    learning_rate: PositiveFloat = 2e-3
    """Learning rate of the sampler."""
    n_steps: PositiveInt = 1
    """Environment steps in a rollout."""
    n_epochs: PositiveInt = 2
    """Passes over a rollout in an update."""
    update_every: PositiveInt = 1
    """Rollouts from one update of the sampler to the next; those between are not learned from, and cost less."""
    n_minibatches: PositiveInt = 1
    """Equal parts into which a rollout of n_steps * batch_size clips is cut."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """PPO's bound on how far a probability ratio counts, either side of 1."""
    ent_coef: NonNegativeFloat = 0.1
    """Weight of the entropy bonus."""
    entropy_floor: Annotated[float, Field(ge=1)] | None = None
    """Effective number of tokens, exp(entropy), below which a clip's policy is pushed back up; None for no floor."""
    vf_coef: NonNegativeFloat = 0.5
    """Weight of the value loss."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Discount; 0, since a mask never changes the next clip."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Trace decay of generalised advantage estimation."""
    target_kl: PositiveFloat | None = 0.05
    """An update stops once the KL divergence exceeds 1.5 times this; None never stops."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm to which the sampler's gradient is clipped."""
    normalize_advantage: bool = True
    """Standardise clip advantages over each rollout."""
    explore: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of uniform draws mixed into the policy."""
    width: PositiveInt = 64
    """Channels of the sampler."""
    num_heads: PositiveInt = 4
    """Attention heads of the sampler."""
    depth: PositiveInt = 1
    """Trajectory attention blocks of the sampler."""
    logit_cap: PositiveFloat = 8.0
    """c of c * tanh((logit - mean) / c), which bounds how far apart two tokens can be."""


class OtherAgentConfig(Section):
    """An agent other than our PPO: what else is given goes to its constructor, which is asked before a run starts."""

    model_config = ConfigDict(extra="allow")

    class_: str = Field(alias="class")
    """Its name in ``agents.AGENTS``, sb3:ALGORITHM, or package.module:Class."""

    @field_validator("class_")
    @classmethod
    def _is_understood(cls, value: str) -> str:
        if value not in AGENTS and not re.fullmatch(r"sb3:\w+|\w+(\.\w+)*:\w+", value):
            raise ValueError(
                f"{value!r} is unknown; give one of {', '.join(AGENTS)}, sb3:ALGORITHM of stable-baselines3 or "
                f"package.module:Class{did_you_mean(*close(value, list(AGENTS)))}"
            )
        return value


def _agent_kind(value: Any) -> str:
    """Which of the two an ``agent`` section is; in angle brackets, so that no key of a path can be taken for it."""
    name = value.get("class", "ppo") if isinstance(value, dict) else getattr(value, "class_", "ppo")
    return "<ppo>" if name == "ppo" else "<other>"


class ProbeConfig(Section):
    """Classifiers on frozen features: linear, attentive and nearest neighbours."""

    batch_size: PositiveInt = 64
    """Clips in a batch, while features are extracted and while the attentive probe is trained."""
    k: PositiveInt = 10
    """Neighbours that vote."""
    temperature: PositiveFloat = 0.07
    """Of a neighbour's vote, exp(cosine similarity / temperature)."""
    epochs: PositiveInt = 40
    """Passes of the attentive probe over the training clips."""
    learning_rate: PositiveFloat = 1e-3
    """The attentive probe's."""
    weight_decay: NonNegativeFloat = 0.05
    """The attentive probe's."""
    num_heads: PositiveInt = 3
    """Heads of the attentive probe."""
    restarts: PositiveInt = 1
    """Attentive probes with different initial weights; the one with the lowest training loss counts."""
    keep_features: bool = True
    """Keep features in the run's folder, so that a second probe starts at once."""


class FinetuneConfig(Section):
    """Full fine-tuning of the encoder into a classifier, and its test."""

    epochs: PositiveInt = 30
    """Passes over the training videos."""
    batch_size: PositiveInt = 32
    """Clips in a step."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate for 256 clips."""
    warmup_epochs: NonNegativeInt = 5
    """Epochs over which the learning rate rises to its peak."""
    weight_decay: NonNegativeFloat = 0.05
    """AdamW's weight decay, on matrices only."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Factor on the learning rate from each layer to the one before."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Stochastic depth of the last block; the others' rise to it linearly."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Label smoothing."""
    mixup: NonNegativeFloat = 0.8
    """Mixup's alpha; 0 turns it off."""
    cutmix: NonNegativeFloat = 1.0
    """CutMix's alpha; 0 turns it off."""
    randaugment_ops: NonNegativeInt = 2
    """RandAugment's operations a clip; 0 turns it off."""
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """RandAugment's strength, of 30."""
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability of random erasing."""
    repeats: PositiveInt = 2
    """Augmented versions of one decoded clip in a batch."""
    sampling: Literal["dense", "uniform"] = "dense"
    """As of clip, for training and test alike."""
    augment: Literal["none", "multi_scale", "random_resized"] = "none"
    """As of clip."""
    flip: bool = False
    """As of clip."""
    max_grad_norm: PositiveFloat | None = None
    """Norm to which the gradient is clipped; None leaves it."""
    test_clips: PositiveInt = 2
    """Clips of a video in the test, spread over its length."""
    test_crops: Literal[1, 3] = 3
    """Crops of each test clip: the centre, or along the longer side three."""
    sampler: Literal["random", "policy"] = "random"
    """Who chooses the tokens that enter the encoder where keep_ratio is below 1: chance, or the run's own agent."""
    keep_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of tokens that enter the encoder in fine-tuning."""
    test_keep_ratios: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] | None = None
    """Shares of tokens that enter the encoder in the test; several are plotted, and None is keep_ratio alone."""

    @property
    def tested(self) -> list[float]:
        """The shares of tokens that enter the encoder in the test, ascending."""
        return sorted(set(self.test_keep_ratios or [self.keep_ratio]))

    @property
    def judged(self) -> float:
        """The share of tokens whose score counts: as in training, if that is tested, else the most."""
        return self.keep_ratio if self.keep_ratio in self.tested else self.tested[-1]

    @field_validator("warmup_epochs")
    @classmethod
    def _leaves_epochs(cls, value: int, info: ValidationInfo) -> int:
        epochs = info.data.get("epochs")
        if epochs is not None and value >= epochs:
            raise ValueError(f"{value} is not below epochs = {epochs}; give {epochs - 1} at most")
        return value

    @field_validator("mixup", "cutmix")
    @classmethod
    def _has_pairs(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("batch_size", 0) % 2:
            raise ValueError(
                f"{value} is given, and mixes clips in pairs, beside batch_size = {info.data['batch_size']}; "
                "give 0, or an even batch_size"
            )
        return value


class GuardsConfig(Section):
    """From when on training is told to go wrong; null switches a warning off."""

    skipped: Annotated[float, Field(ge=0, lt=1)] | None = 0.1
    """Share of updates skipped since a loss or gradient was not finite."""
    approx_kl: PositiveFloat | None = 0.2
    """KL divergence of the policy in an update from the one that drew."""
    effective_tokens: PositiveFloat | None = 1.0
    """Effective number of tokens, exp(entropy of a draw), as a multiple of the K that are kept: a bound from below."""
    explained_variance: Annotated[float, Field(le=1)] | None = 0.02
    """Share of the return's variance that the value function explains, where it is used: a bound from below."""
    reward_scale: Annotated[float, Field(gt=1)] | None = 3.0
    """Factor, either way, between the reward's size and the running deviation that it is measured in."""


class EvaluateConfig(Section):
    """What is measured after training."""

    num_videos: PositiveInt | None = 240
    """Validation videos, rendered or at most read; None is all of a folder, or 60 rendered."""
    seed: NonNegativeInt = 0
    """Of the validation videos: another one renders, or picks, some on which nothing has been chosen yet."""
    clips: PositiveInt = 512
    """Validation clips on which samplers are compared."""
    tasks: list[Literal["linear", "attentive", "knn", "finetune"]] = Field(default=["linear"])
    """What the encoder is asked to do downstream."""
    data: list[str] = Field(default=[])
    """Data sets to do it on; none is the one of the run."""
    points: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[])
    """Shares of the training after which the encoder is probed as well."""
    baseline: bool = True
    """Also train under uniform random masks for as long, and compare."""
    pictures: bool = True
    """Follow the masks of a few validation clips through training, draw them at its end, and write report.html."""

    @field_validator("data", mode="before")
    @classmethod
    def _are_understood(cls, value: Any) -> Any:
        return data_texts(value)


class RunConfig(Section):
    """One run: train the MAE and the token sampler together, then evaluate both."""

    name: str = "run"
    """What the run's folder is called."""
    seed: NonNegativeInt = 0
    """Fixes clips, masks and initial weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is CUDA where there is one."""
    data: str = "motion"
    """motion or scenes (rendered here), or folder, list, ssv2, kinetics400, ucf101, hmdb51 or shards with :/path."""
    num_videos: PositiveInt | None = 480
    """Training videos, rendered or at most read; None is all of a folder, or 60 rendered."""
    mask_ratio: float = 0.9
    """Share of tokens that is hidden, between 0 and 1."""
    batch_size: PositiveInt = 32
    """Clips in a step, one an environment, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Clips in one forward and backward pass; gradients add up over the batch. None is all of a process's clips."""
    compile: bool = False
    """Run MAE and sampler through torch.compile."""
    steps: PositiveInt = 600
    """Batches of clips to train for: steps of the environment times rounds."""
    reward: str = "reconstruction_error"
    """surprise, motion_surprise, reconstruction_error, negative_reconstruction_error or package.module:function."""
    rounds: PositiveInt = 1
    """Above 1, tokens are revealed in that many rounds, each rewarded by the fall of the error (reward is unused)."""
    horizon: PositiveInt = 1
    """Consecutive clips of one video in an episode."""
    log_interval: PositiveInt = 10
    """Steps between two lines of metrics."""
    checkpoint_minutes: NonNegativeFloat = 5.0
    """Training that a crash can cost, in minutes: after that long, a checkpoint comes with the next line of metrics."""
    deterministic: bool = False
    """Have torch take deterministic algorithms, on a GPU the slower ones; a CPU's runs repeat as it is."""
    tracker: Literal["wandb"] | None = None
    """Send curves and pictures to Weights & Biases as well; takes pip install 'tats-env[wandb]'."""
    out: str = "runs"
    """Folder in which the run's own folder is made."""
    clip: ClipConfig = ClipConfig()
    loader: LoaderConfig = LoaderConfig()
    mae: MAEConfig = MAEConfig()
    agent: Annotated[
        Annotated[AgentConfig, Tag("<ppo>")] | Annotated[OtherAgentConfig, Tag("<other>")], Discriminator(_agent_kind)
    ] = AgentConfig()
    probe: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    guards: GuardsConfig = GuardsConfig()

    @field_validator("data", mode="before")
    @classmethod
    def _name_of_data(cls, value: Any) -> Any:
        return data_text(value)

    @field_validator("name", "device", "data", "reward")
    @classmethod
    def _is_understood(cls, value: str, info: ValidationInfo) -> str:
        return check_text(info.field_name or "", value)

    @field_validator("mask_ratio")
    @classmethod
    def _is_a_share(cls, value: float) -> float:
        if not 0 < value < 1:
            side = "above 0" if value <= 0 else "below 1"
            raise ValueError(f"{value} is not {side}; a ratio such as 0.9 keeps a tenth of the tokens visible")
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        n = self.clip.num_tokens
        if n > MOST_TOKENS:
            raise ValueError(f"clip: size and num_frames make more than {MOST_TOKENS} tokens; give smaller ones")
        k = int(n * (1 - self.mask_ratio) + 1e-9)
        if n == 1:
            raise ValueError("clip: one token is the whole clip, which can't be masked; give a smaller patch_size")
        if not 1 <= k < n:
            least, most = ceil(1e4 / n) / 1e4, floor(1e4 * (1 - 1 / n)) / 1e4
            raise ValueError(
                f"mask_ratio: {self.mask_ratio} keeps K = {k} of the N = {n} tokens of a clip visible, "
                f"and K must be from 1 to {n - 1}; give a ratio from {least} to {most}"
            )
        if self.rounds > 1 and self.horizon > 1:
            raise ValueError(f"horizon: {self.horizon} is given beside rounds = {self.rounds}; set one of them to 1")
        if self.rounds > 1 and self.mae.decode_ratio < 1:
            raise ValueError(
                f"mae.decode_ratio: {self.mae.decode_ratio} is given beside rounds = {self.rounds}, whose reward "
                "is the fall of the error of all hidden tokens; give 1.0"
            )
        if self.rounds > 1 and self.finetune.sampler == "policy":
            raise ValueError(
                "finetune.sampler: a policy that acts in rounds sees more than a clip's tokens and can't choose those "
                "of a classifier; give random, or set rounds to 1"
            )
        checks: list[tuple[str, int, int, str]] = [
            ("rounds", k, self.rounds, "the number of visible tokens K"),
            ("loader.repeats", self.batch_size, self.loader.repeats, "batch_size"),
            ("micro_batch_size", self.batch_size, self.micro_batch_size or 1, "batch_size"),
            ("finetune.repeats", self.finetune.batch_size, self.finetune.repeats, "finetune.batch_size"),
        ]
        if isinstance(self.agent, AgentConfig):
            floor_, n_steps = self.agent.entropy_floor, self.agent.n_steps
            if floor_ is not None and floor_ > n:
                raise ValueError(
                    f"agent.entropy_floor: {floor_} is above the N = {n} tokens of a clip; give {n} or less"
                )
            rollout = "agent.n_steps * batch_size"
            checks += [
                ("agent.n_steps", self.steps * self.rounds, n_steps, "steps * rounds"),
                ("agent.n_minibatches", n_steps * self.batch_size, self.agent.n_minibatches, rollout),
            ]
            update = n_steps * self.batch_size // self.agent.n_minibatches
            checks.append(("micro_batch_size", update, self.micro_batch_size or 1, f"{rollout} / agent.n_minibatches"))
        for key, whole, part, what in checks:
            try:
                check_divides(whole, part, what)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        return self
