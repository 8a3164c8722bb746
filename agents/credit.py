"""Credit assignment: which probabilities a decision's outcome speaks to, and how strongly.

A credit turns an outcome into advantages and names the probability ratio that goes with them:

==================  ==================================  ====================================================
name                advantage                           ratio
==================  ==================================  ====================================================
``clip``            the reward's, one a clip            joint Plackett-Luce of the picks, log-ratio over K
``pick_surprise``   each visible pick's surprise        Plackett-Luce, one conditional draw a pick
``token_error``     each hidden token's error           categorical p_new / p_old: a *surrogate*, since the
                                                        hidden tokens are not the action (PPO's form of AdaMAE,
                                                        Bandara et al., CVPR 2023)
``token_motion``    each hidden token's motion error    the same surrogate
==================  ==================================  ====================================================

Of the forms, ``inverted`` is minus ``standardised``: what was hard to predict is to stay hidden, for the MAE to be
asked for it, where the others have it shown (the two readings of Rai et al.'s paper).

Mind the sign: as a reward, +error teaches an agent to *hide* hard tokens; as credit on hidden tokens, +error raises
the probability that they are *shown* next time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from agents.distributions import PlackettLuce
from tats_env.rewards import Decision, pick_surprise

CREDITS = ("clip", "pick_surprise", "token_error", "token_motion")
FORMS = ("standardised", "inverted", "proportional")
STANDARDISED_BOUND = 3.0
PROPORTIONAL_BOUND = 20.0
LOG_RATIO_BOUND = 10.0
"""Far beyond any clip range: it only keeps exp() finite should two policies drift apart."""
DUAL_CLIP = 3.0
"""A negative advantage counts at most this ratio (dual clip: Ye et al., AAAI 2020); PPO's clip does not bound it."""


class Credit(NamedTuple):
    """Advantages [B, X] and which of them count, bool [B, X]; X is 1, K or N as the credit has it."""

    advantage: Tensor
    counts: Tensor


def standardised(values: Tensor, counts: Tensor) -> Tensor:
    """(value - clip mean) / clip deviation, within +-3, over what counts and 0 elsewhere: [B, X] -> [B, X]."""
    weight = counts.double()  # in float32 the rounding of the mean would pass for a deviation where all are equal
    total = weight.sum(1, keepdim=True).clamp_min(1)
    kept = values.double() * weight
    centred = kept - kept.sum(1, keepdim=True) / total * weight
    deviation = (centred.square().sum(1, keepdim=True) / total).sqrt()
    floor = 1e-8 * kept.abs().amax(1, keepdim=True) + 1e-30
    return (centred / (deviation + floor)).clamp(-STANDARDISED_BOUND, STANDARDISED_BOUND).to(values.dtype)


def proportional(values: Tensor, counts: Tensor, power: float) -> Tensor:
    """value^a / clip mean of value^a over what counts, at most 20: under it p settles in proportion to value^a."""
    kept = values.clamp_min(0) * counts
    raised = (kept / kept.amax(1, keepdim=True).clamp_min(1e-30)).pow(power) * counts  # whatever the values' unit
    mean = raised.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)
    return (raised / mean.clamp_min(1e-30)).clamp_max(PROPORTIONAL_BOUND)


def token_credit(name: str, form: str, power: float, decision: Decision, picks: Tensor) -> Credit:
    """Credit by token for one decision; ``clip`` credit comes from the rewards instead (PPO's own advantages).

    Args:
        name: of ``CREDITS``, but ``clip``.
        form: of ``FORMS``.
        power: exponent of the proportional form.
        decision: what came of it.
        picks: [B, K], in the order drawn.
    """
    if name == "pick_surprise":
        shown = decision.uniform_visible
        surprise = pick_surprise(decision.uniform_reconstruction.token_error, shown)
        values, counts = surprise.gather(1, picks), ~shown.gather(1, picks)
    else:
        found = decision.reconstruction
        values = found.token_error if name == "token_error" else found.motion_error
        counts = found.scored
    if form == "proportional":
        return Credit(proportional(values, counts, power), counts)
    advantage = standardised(values, counts)
    return Credit(-advantage if form == "inverted" else advantage, counts)


def log_ratio(name: str, new: PlackettLuce, old: PlackettLuce, picks: Tensor) -> Tensor:
    """log of the new probability over the old, [B, X] as the credit's advantages, bounded to +-10."""
    if name == "clip":
        ratio = ((new.log_prob(picks) - old.log_prob(picks)) / picks.shape[1])[:, None]
    elif name == "pick_surprise":
        ratio = new.pick_log_prob(picks) - old.pick_log_prob(picks)
    else:
        ratio = new.log_p - old.log_p
    return ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def clipped_surrogate(ratio_log: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """PPO's objective (Schulman et al., 2017, eq. 7) with the dual clip, elementwise; to be maximised."""
    ratio = ratio_log.exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
    return torch.where(advantage < 0, torch.maximum(objective, DUAL_CLIP * advantage), objective)
