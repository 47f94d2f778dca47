"""What lies near a concept: the prompts under which a model drifts first when the concept is forgotten."""

from collections.abc import Sequence
from typing import Protocol

import torch
from accelerate import Accelerator

from ..data.sample_set import SampleSet
from ..families.base import Denoiser, Objective
from .probes import ProbeSet

# Each sample is compared at so many timesteps, and of so many samples at the most.
_TIMESTEPS = 6
_COMPARED = 400
# The share of the prompts that lies near, and how many of them at the most.
_NEAR_SHARE = 0.25
_NEAREST = 40


class Neighbours(Protocol):
    """Samples of what lies near a concept, once a training has found it."""

    def replay(self, prompts: Sequence[str]) -> SampleSet | None:
        """Further samples to replay; None for none."""

    def probes(self, prompts: Sequence[str]) -> list[ProbeSet]:
        """Samples that tell how far each of these prompts drifts."""


def comparisons(samples: int) -> int:
    """Network evaluations of `drifts`."""
    return 2 * _TIMESTEPS * min(samples, _COMPARED)


@torch.no_grad()
def drifts(
    objective: Objective,
    module: Denoiser,
    teacher: Denoiser,
    samples: torch.Tensor,
    prompts: Sequence[str],
    accelerator: Accelerator,
) -> dict[str, float]:
    """How far a model has drifted under each prompt, on samples of it that are all noised alike.

    Args:
        objective: The model.
        module: The model in training, in evaluation mode.
        teacher: The frozen model.
        samples: `[n, ...]`; the first of them are looked at.
        prompts: What each is sampled with; the empty prompt is left out.
        accelerator: The processes that share the work; all have the same result.

    Returns:
        Prompt -> mean deviation of its predictions from the frozen model's, in units of the loss.
    """
    rows = [row for row, prompt in enumerate(prompts[:_COMPARED]) if prompt]
    if not rows:
        return {}
    generator = torch.Generator().manual_seed(0)
    timesteps = objective.path.strata(min(_TIMESTEPS, objective.num_train_timesteps), generator).to(objective.device)
    noise = objective.draw_noise(samples[:1].expand(len(timesteps), *samples.shape[1:]).to(objective.device), generator)
    found = torch.zeros(len(rows), device=objective.device)
    with objective.reading():
        for place in range(accelerator.process_index, len(rows), accelerator.num_processes):
            row = rows[place]
            sample = samples[row : row + 1].to(objective.device).expand(len(timesteps), *samples.shape[1:])
            with accelerator.autocast():
                conditions = objective.encode_prompts([prompts[row]] * len(timesteps))
                ours, theirs = (
                    objective.answer(of, sample, conditions, timesteps, noise).float() for of in (module, teacher)
                )
            found[place] = objective.deviation(ours, theirs, timesteps).mean()
    if accelerator.num_processes > 1:
        found = accelerator.reduce(found, reduction="sum")
    by_prompt: dict[str, list[float]] = {}
    for row, value in zip(rows, found.tolist(), strict=True):
        by_prompt.setdefault(prompts[row], []).append(value)
    return {prompt: sum(values) / len(values) for prompt, values in by_prompt.items()}


def farthest(drift: dict[str, float], count: int | None = None) -> list[str]:
    """The prompts that drift most, the farthest first; without a count those that lie near, few of few prompts."""
    if count is None:
        count = min(_NEAREST, max(1, round(_NEAR_SHARE * len(drift))))
    return sorted(drift, key=lambda prompt: -drift[prompt])[:count]
