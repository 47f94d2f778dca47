"""Which samples, conditions, noise and targets each step of a training gets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.concepts import UNIFORM_NOISE
from ..data.sample_set import SampleSet, is_prompt
from ..families.base import Conditions, Denoiser, Objective, index_conditions
from ..seeds import generator_of


@dataclass(frozen=True)
class Batch:
    """What one forward pass gets: surrogate samples, then replay samples.

    Attributes:
        surrogates: How many of them are surrogate samples.
        samples: `[batch, ...]`, on the model's device, as all that follows.
        conditions: Each `[batch, ...]`.
        timesteps: `int64` `[batch]`.
        noise: `[batch, ...]`.
        target: What the module should predict; None is the noise's own target.
    """

    surrogates: int
    samples: torch.Tensor
    conditions: Conditions
    timesteps: torch.Tensor
    noise: torch.Tensor
    target: torch.Tensor | None = None

    def losses(self, objective: Objective, module: Denoiser) -> torch.Tensor:
        """Mean surrogate loss and mean replay loss, `[2]`; 0 for replay if there is none."""
        loss = objective.negative_elbo(
            module, self.samples, self.conditions, self.timesteps, self.noise, self.target
        )  # fmt: skip
        surrogate, replay = loss[: self.surrogates].mean(), loss[self.surrogates :]
        return torch.stack([surrogate, replay.mean() if len(replay) else torch.zeros_like(surrogate)])


@dataclass
class BatchPolicy:
    """The batches of a training: each a function of the seed and the step alone, the same for any number of processes
    and any split of the global batch.

    Under the frozen target a sample that a prompt drew is taught by the frozen model, under the prompt that drew it;
    one that no prompt drew has no teacher and keeps the noise's target, uniform noise its mean where that is known. A
    dropped condition turns a replay sample into one of the empty prompt; a surrogate sample too, if it has a teacher,
    and a concept's own among them. One that no prompt drew goes without its condition under either target: it is new to
    the model.

    Attributes:
        objective: The model. Every prompt is embedded once, now.
        surrogates: Samples of the surrogate, under the concept's prompts.
        replay: Samples to remember, if there are any.
        size: Surrogate samples, and replay samples, of one optimiser step over all processes.
        seed: Of order, timesteps, noise and dropped conditions.
        condition_dropout: Share of the conditions that are dropped.
        keeps_surrogates: Whether those of surrogate samples never are.
        timestep_draws: Timesteps drawn for each sample; the noisiest of them is taken.
    """

    objective: Objective
    surrogates: SampleSet
    replay: SampleSet | None
    size: int
    seed: int = 0
    condition_dropout: float = 0.0
    keeps_surrogates: bool = False
    timestep_draws: int = 1

    def __post_init__(self) -> None:
        used = [""] if self.condition_dropout else []
        used += [*self.surrogates.conditions, *filter(is_prompt, self.surrogates.sources)]
        used += self.replay.conditions if self.replay else []
        prompts = list(dict.fromkeys(used))
        self._row = {prompt: row for row, prompt in enumerate(prompts)}
        self._are_own = self.surrogates.are_own
        with torch.no_grad():
            self._conditions = self.objective.encode_prompts(prompts)
        self._drawn: _Draws | None = None
        # Of each replay sample; None for epochs of all.
        self._shares: torch.Tensor | None = None

    def replay_too(self, further: SampleSet, share: float) -> None:
        """Replay further samples, of prompts that are replayed already.

        Args:
            further: The samples.
            share: Of the replayed samples that they are, in (0, 1).
        """
        assert self.replay is not None
        before = len(self.replay)
        self.replay = self.replay + further
        self._shares = torch.full((len(self.replay),), (1 - share) / before)
        self._shares[before:] = share / len(further)
        self._drawn = None

    def batch(self, step: int, part: slice, teacher: Denoiser | None = None) -> Batch:
        """A part of a step's global batch.

        Args:
            step: The step, from 0.
            part: Of the surrogate samples, and of the replay samples.
            teacher: The frozen model, under the frozen target.
        """
        objective = self.objective
        drawn = self._draw(step)
        rows = drawn.rows[0][part]
        count = len(rows)
        are_new = [not is_prompt(self.surrogates.sources[row]) and not self._are_own[row] for row in rows]
        samples = self.surrogates.samples[rows]
        prompts = [self.surrogates.conditions[row] for row in rows]
        sources = [self.surrogates.sources[row] for row in rows]
        if self.replay:
            rows = drawn.rows[1][part]
            samples = torch.cat([samples, self.replay.samples[rows]])
            prompts += [self.replay.conditions[row] for row in rows]
            sources += [self.replay.conditions[row] for row in rows]
        timesteps, dropped, noise = (
            torch.cat([values[part] for values in kind]) for kind in (drawn.timesteps, drawn.dropped, drawn.noise)
        )
        for place in dropped.nonzero().flatten().tolist():
            is_surrogate = place < count
            if is_surrogate and self.keeps_surrogates:
                continue
            if is_surrogate and are_new[place]:
                # New to the model, noise say: guidance would push away from what the empty prompt does not know.
                prompts[place] = ""
            elif not is_surrogate or teacher is not None:
                # For a surrogate, the noise's target would pull the empty prompt towards it.
                prompts[place] = sources[place] = ""
        samples = samples.to(objective.device)
        conditions = self._conditions_of(prompts)
        timesteps, noise = timesteps.to(objective.device), noise.to(objective.device)
        target = None if teacher is None else self._taught(teacher, samples, sources, timesteps, noise)
        return Batch(count, samples, conditions, timesteps, noise, target)

    def _taught(
        self,
        teacher: Denoiser,
        samples: torch.Tensor,
        sources: Sequence[str | None],
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """What the frozen model predicts, where it is a teacher; elsewhere the noise's target, or its known mean."""
        objective = self.objective
        target = objective.target(samples, timesteps, noise).float().clone()
        uniform = [row for row, source in enumerate(sources) if source == UNIFORM_NOISE]
        if uniform:
            mean = objective.uniform_noise_target(samples[uniform], timesteps[uniform], noise[uniform])
            target[uniform] = mean.float()
        taught = [row for row, source in enumerate(sources) if is_prompt(source)]
        if taught:
            conditions = self._conditions_of([sources[row] for row in taught])
            prediction = objective.predict(teacher, samples[taught], conditions, timesteps[taught], noise[taught])
            target[taught] = prediction.float()
        return target

    def _conditions_of(self, prompts: Sequence[str]) -> Conditions:
        rows = torch.tensor([self._row[prompt] for prompt in prompts], device=self.objective.device)
        return index_conditions(self._conditions, rows)

    def order(self, count: int, step: int, stream: str) -> list[int]:
        """Rows of a step's global batch, of `count` samples in reshuffled epochs."""
        start = step * self.size
        rows = []
        for place in range(start, start + self.size):
            epoch, offset = divmod(place, count)
            if not rows or offset == 0:
                order = torch.randperm(count, generator=generator_of(f"{stream} order", self.seed, epoch))
            rows.append(int(order[offset]))
        return rows

    def _draw(self, step: int) -> "_Draws":
        """All that is random in a step, for the global batch: every process samples the same, and takes its part."""
        if self._drawn is not None and self._drawn.step == step:
            return self._drawn
        objective, size = self.objective, self.size
        generator = generator_of("training", self.seed, step)
        sets = [(self.surrogates, "surrogate"), *([(self.replay, "replay")] if self.replay else [])]
        timesteps = [
            torch.stack([objective.path.draw_timesteps(size, generator) for _ in range(self.timestep_draws)]).amax(0)
            for _ in sets
        ]
        dropped = torch.rand(len(sets) * size, generator=generator) < self.condition_dropout
        like = self.surrogates.samples[:1].expand(len(sets) * size, *self.surrogates.samples.shape[1:])
        noise = objective.draw_noise(like, generator).cpu()
        rows = [self.order(len(samples), step, name) for samples, name in sets]
        if self._shares is not None:
            rows[1] = torch.multinomial(self._shares, size, replacement=True, generator=generator).tolist()
        self._drawn = _Draws(
            step, rows, timesteps,
            list(dropped.split(size)), list(noise.split(size)),
        )  # fmt: skip
        return self._drawn


@dataclass(frozen=True)
class _Draws:
    """What is random in one step, for the global batch; each list holds the surrogates' part and the replay's.

    Attributes:
        step: The step.
        rows: Of the samples.
        timesteps: `int64` `[batch]`.
        dropped: Whether the condition is left out, `[batch]`.
        noise: `[batch, ...]`, on the CPU.
    """

    step: int
    rows: list[list[int]]
    timesteps: list[torch.Tensor]
    dropped: list[torch.Tensor]
    noise: list[torch.Tensor]
