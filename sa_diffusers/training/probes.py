"""Probes: how much a model in training has forgotten, and how far the rest has drifted, told from its predictions
alone, without sampling."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from ..data.concepts import UNIFORM_NOISE
from ..data.sample_set import is_prompt
from ..families.base import Conditions, Denoiser, Objective, index_conditions
from ..processes import say, shrinking
from ..seeds import generator_of

Role = str
FORGOTTEN_ROLES = ("concept", "surrogate")
_QUANTILE = 0.9
# What an image shows is settled where there is most noise, on this share of the timesteps. Drift under a prompt counts
# there in units of what that prompt changes, or of this share of what others do, if that is more: red hearts turned
# orange while they had drifted by .03 in units of what any prompt changes anywhere.
_NOISIEST = 0.25
_LEAST_CHANGE = 0.25
# Where there is no empty prompt, what a prompt changes is told from the mean over so many at the most.
AVERAGED = 10


@dataclass(frozen=True)
class ProbeSet:
    """Held-out samples on which predictions are compared.

    Attributes:
        name: The concept, or the neighbour, that it is of.
        role: `"concept"` or `"surrogate"`: samples of either, predicted under the concept's prompts, where the
            surrogate's answer is wanted; `"own"` (the surrogate under its own prompts), `"remembered"`, `"empty"` or
            `"neighbour"`, where the frozen model's answer is.
        samples: `[n, ...]` float32 on the CPU.
        prompts: What the model is asked under, one for each sample.
        wanted: Whose answer is right: the frozen model's under this prompt, `UNIFORM_NOISE`'s mean, or, where it is
            None, that of the noise itself.
    """

    name: str
    role: Role
    samples: torch.Tensor
    prompts: list[str]
    wanted: list[str | None]

    def __len__(self) -> int:
        return len(self.samples)


@dataclass
class Reading:
    """What the probes say of a model.

    Forgotten is 1 where the model predicts under the concept's prompts what the surrogate asks for, 0 where it predicts
    what it did, and less where it is farther away than that. Drift is in units of what a prompt changes in the frozen
    model's predictions. Both are of predictions guided as the saved pipeline samples; what ends in `_unguided` is not.

    Attributes:
        forgotten: Concept -> forgotten, on noised samples of the concept.
        forgotten_surrogate: Concept -> forgotten, on noised samples of its surrogate.
        drift: Of remembered prompts, the mean.
        drift_p90: The 90th percentile over them.
        drift_empty: Of the empty prompt; None where there is none.
        drift_surrogate: Of the surrogate under its own prompts; None where no prompt samples it.
        neighbours: Neighbour -> its drift: over all timesteps, or over the noisiest quarter of them in units of what
            its own prompt changes there, whichever is larger.
        forgotten_unguided: As `forgotten`.
        drift_unguided: As `drift`.
        rise: By how much the loss of remembered prompts has risen at the least, in units of the loss.
    """

    forgotten: dict[str, float] = field(default_factory=dict)
    forgotten_surrogate: dict[str, float] = field(default_factory=dict)
    drift: float = 0.0
    drift_p90: float = 0.0
    drift_empty: float | None = None
    drift_surrogate: float | None = None
    neighbours: dict[str, float] = field(default_factory=dict)
    forgotten_unguided: dict[str, float] = field(default_factory=dict)
    drift_unguided: float = 0.0
    rise: float = 0.0

    @property
    def worst_forgotten(self) -> float:
        """Of the concept that is forgotten least; 1 where nothing can be said of any.

        What its own samples say of a concept counts; where they say nothing, those of its surrogate.
        """
        least = _least({**self.forgotten_surrogate, **self.forgotten})
        return 1.0 if least is None else least

    @property
    def tells_of_all(self) -> bool:
        """Whether something can be said of every concept."""
        return not any(map(math.isnan, {**self.forgotten_surrogate, **self.forgotten}.values()))

    @property
    def worst_drift(self) -> float:
        """The largest of what must not drift: nine of ten remembered prompts, and each neighbour."""
        return max([self.drift_p90, *self.neighbours.values()])

    def values(self) -> dict[str, float]:
        """Figures by name, for history and trackers."""
        figures = {
            "forgotten": self.worst_forgotten,
            # Of distances in place of their squares.
            "forgotten_root": 1 - max(1 - self.worst_forgotten, 0.0) ** 0.5,
            "forgotten_surrogate": _least(self.forgotten_surrogate),
            "forgotten_unguided": _least(self.forgotten_unguided),
            "drift": self.drift,
            "drift_p90": self.drift_p90,
            "drift_unguided": self.drift_unguided,
            "drift_empty": self.drift_empty,
            "drift_surrogate": self.drift_surrogate,
            "drift_neighbours": max(self.neighbours.values(), default=None),
        }
        return {name: value for name, value in figures.items() if value is not None}


@dataclass
class _Noised:
    """A probe set at its timesteps, and what the frozen model says of it; `[n, ...]` each.

    Attributes:
        of: The set.
        timesteps: `int64` `[n]`.
        noise: As the objective draws it.
        prompts: Rows of the prompts' conditions.
        wanted: What should be predicted, without guidance.
        before: What the frozen model predicts under the same prompts.
        empty: What it predicts under the empty prompt; None where there is none.
        mean: Without an empty prompt, what it predicts on average under remembered prompts (of a VAE, its mean image);
            None of what is forgotten.
        floor: For images that no prompt drew, the frozen model's own error on samples of its own; else 0.
    """

    of: ProbeSet
    timesteps: torch.Tensor
    noise: torch.Tensor
    prompts: torch.Tensor
    wanted: torch.Tensor
    before: torch.Tensor
    empty: torch.Tensor | None
    mean: torch.Tensor | None = None
    floor: float = 0.0


class Probes:
    """Compares a model's predictions with the frozen model's, on held-out samples, noise and timesteps.

    All that is random is drawn once, so that readings of one run differ by the weights alone. Each process predicts its
    share, and all have the same reading.

    Args:
        objective: The model.
        sets: What is probed.
        guidance: Guidance of the saved pipeline; 1 leaves predictions as they are.
        seed: Of timesteps and noise.
        accelerator: Processes and precision.
        batch_size: Predictions at once. It changes rounding and speed only.
    """

    def __init__(
        self,
        objective: Objective,
        sets: Sequence[ProbeSet],
        guidance: float,
        seed: int,
        accelerator: Accelerator,
        batch_size: int = 64,
    ) -> None:
        self.objective = objective
        self.accelerator = accelerator
        self.batch_size = batch_size
        # Below 1 samplers leave guidance out.
        self.guidance = max(guidance, 1.0) if objective.unconditional else 1.0
        self.sets = list(sets)
        empty = [""] if objective.unconditional else []
        used = [*empty, *(text for part in sets for text in (*part.prompts, *filter(is_prompt, part.wanted)))]
        self._row = {text: row for row, text in enumerate(dict.fromkeys(used))}
        with torch.no_grad(), accelerator.autocast():
            self._conditions = objective.encode_prompts(list(self._row))
        self._seed = seed
        self._noised: list[_Noised] = []
        # Neighbours that are added later are told from the same.
        self.averaged = _averaged(sets)
        self.denominator = math.nan
        self.denominator_guided = math.nan
        self._noisiest_from = self._noisiest_denominator = math.nan

    @property
    def predictions(self) -> int:
        """Network evaluations of one reading."""
        return sum(len(part) * (1 if self._unguided(part) else 2) for part in self.sets)

    def _unguided(self, part: ProbeSet) -> bool:
        return part.role == "empty" or not self.objective.unconditional

    def prepare(self, teacher: Denoiser) -> None:
        """Predict with the frozen model, once.

        Raises:
            ValueError: There is nothing to measure drift by: the model says the same under all remembered prompts.
        """
        self._noised = [self._with_teacher(number, part, teacher) for number, part in enumerate(self.sets)]
        kept = [noised for noised in self._noised if noised.of.role in ("remembered", "neighbour")]
        kept = [noised for noised in kept if noised.of.role == "remembered"] or kept
        changes = torch.cat([self._change(noised) for noised in kept]) if kept else torch.tensor([math.nan])
        self.denominator = changes.mean().item()
        if not self.denominator > 0:
            raise ValueError(
                "drift cannot be measured: the model predicts the same under every remembered prompt. Give other "
                "prompts, or leave the probes out (num_probe_images 0, and an ewc_weight or ewc 0)"
            )
        timesteps = torch.cat([noised.timesteps for noised in kept]).float()
        self._noisiest_from = timesteps.quantile(1 - _NOISIEST).item()
        self._noisiest_denominator = changes[timesteps >= self._noisiest_from].mean().item()
        # Guidance multiplies what a prompt changes.
        self.denominator_guided = self.denominator * self.guidance**2
        floor = self._own_error()
        for noised in self._noised:
            if any(text is None for text in noised.of.wanted):
                noised.floor = floor
                self._say_if_unknown(noised)

    @property
    def remembered(self) -> ProbeSet:
        """Prompts to remember, with samples of them."""
        return next(part for part in self.sets if part.role == "remembered")

    def add(self, sets: Sequence[ProbeSet], teacher: Denoiser) -> None:
        """Probe further sets, of prompts that are remembered: the frozen model predicts for them now."""
        first = len(self.sets)
        self.sets += sets
        self._noised += [self._with_teacher(first + place, part, teacher) for place, part in enumerate(sets)]

    def weakest(self) -> tuple[str, float]:
        """The concept whose surrogate differs least from it, and by how much, in units of drift.

        Below some hundredths there is nothing to forget that a probe could see: the model does not know the concept, or
        the surrogate looks the same to it.
        """
        shares = {}
        for noised in self._noised:
            if noised.of.role in FORGOTTEN_ROLES and not noised.floor:
                change = self._deviation(noised.before, noised.wanted, noised.timesteps).mean().item()
                shares[noised.of.name] = max(shares.get(noised.of.name, 0.0), change / self.denominator)
        return min(shares.items(), key=lambda item: item[1]) if shares else ("", math.inf)

    def asked(self) -> float:
        """What a surrogate asks for, of the concept that is to change most: in units of drift, beyond the model's own
        error where images stand in the concept's place."""
        shares = [0.0]
        for noised in self._noised:
            if noised.of.role == "surrogate":
                change = self._deviation(noised.before, noised.wanted, noised.timesteps).mean().item()
                shares.append((change - noised.floor) / self.denominator)
        return max(shares)

    @torch.no_grad()
    def read(self, module: Denoiser) -> Reading:
        """What the probes say of a model: `objective.module`, in evaluation mode, or what stands in for it."""
        reading = Reading()
        rises, remembered, unguided = [], [], []
        for noised in self._noised:
            part = noised.of
            plain, guided = self._predicted(module, noised)
            far = self._deviation(plain, noised.wanted, noised.timesteps)
            if noised.empty is None or self.guidance == 1 or part.role == "empty":
                far_guided, scale = far, 1.0
            else:
                wanted = noised.empty + self.guidance * (noised.wanted - noised.empty)
                far_guided, scale = self._deviation(guided, wanted, noised.timesteps), self.guidance**2
            if part.role in FORGOTTEN_ROLES:
                whole = self._deviation(noised.before, noised.wanted, noised.timesteps)
                less = noised.floor * len(part)
                into = reading.forgotten if part.role == "concept" else reading.forgotten_surrogate
                into[part.name] = _forgotten(far_guided.sum() - scale * less, scale * (whole.sum() - less))
                if part.role == "concept":
                    reading.forgotten_unguided[part.name] = _forgotten(far.sum() - less, whole.sum() - less)
                continue
            drift = far_guided / (self.denominator * scale)
            if part.role == "remembered":
                by_prompt: dict[str, list[float]] = {}
                for prompt, value in zip(part.prompts, drift.tolist(), strict=True):
                    by_prompt.setdefault(prompt, []).append(value)
                remembered += [sum(values) / len(values) for values in by_prompt.values()]
                unguided.append(far / self.denominator)
                rises.append(far)
            elif part.role == "empty":
                reading.drift_empty = drift.mean().item()
            elif part.role == "own":
                own = drift.mean().item()
                reading.drift_surrogate = max(own, reading.drift_surrogate or 0.0)
            else:
                noisiest = far_guided / scale / self._noisiest_unit(noised)
                is_noisy = noised.timesteps >= self._noisiest_from
                means = [values.mean().item() for values in (drift, noisiest[is_noisy]) if len(values)]
                reading.neighbours[part.name] = max(means)
        over = torch.tensor(remembered)
        reading.drift, reading.drift_p90 = over.mean().item(), over.quantile(_QUANTILE).item()
        reading.drift_unguided = torch.cat(unguided).mean().item()
        reading.rise = torch.cat(rises).mean().item()
        return reading

    def _change(self, noised: _Noised) -> torch.Tensor:
        """What a prompt changes, against the empty one, or against a mean. `[n]`."""
        other = noised.empty if noised.empty is not None else noised.mean
        assert other is not None
        return self._deviation(noised.before, other, noised.timesteps)

    def _noisiest_unit(self, noised: _Noised) -> float:
        """What the prompt of a neighbour changes where there is most noise."""
        usual = self._noisiest_denominator
        if noised.empty is None:
            return usual
        own = self._change(noised)[noised.timesteps >= self._noisiest_from]
        return max(own.mean().item(), _LEAST_CHANGE * usual) if len(own) else usual

    def _deviation(self, prediction: torch.Tensor, wanted: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.objective.deviation(prediction, wanted, timesteps)

    def _with_teacher(self, number: int, part: ProbeSet, teacher: Denoiser) -> _Noised:
        objective, device = self.objective, self.objective.device
        generator = generator_of("probe noise", self._seed, number)
        timesteps = objective.path.strata(min(len(part), objective.num_train_timesteps), generator)
        timesteps = timesteps.repeat(-(-len(part) // len(timesteps)))[: len(part)]
        timesteps = timesteps[torch.randperm(len(part), generator=generator)].to(device)
        samples = part.samples.to(device)
        noise = objective.draw_noise(samples, generator)
        rows = torch.tensor([self._row[text] for text in part.prompts], device=device)
        noised = _Noised(part, timesteps, noise, rows, samples, samples, None)
        noised.before = self._answers(teacher, noised, rows)
        if not self._unguided(part):
            noised.empty = self._answers(teacher, noised, torch.full_like(rows, self._row[""]))
        elif not objective.unconditional and part.role in ("remembered", "neighbour"):
            noised.mean = self._mean(teacher, noised, rows)
        wanted = objective.target(samples, timesteps, noise).float().clone()
        uniform = [row for row, text in enumerate(part.wanted) if text == UNIFORM_NOISE]
        if uniform:
            mean = objective.uniform_noise_target(samples[uniform], timesteps[uniform], noise[uniform])
            wanted[uniform] = mean.float()
        taught = [row for row, text in enumerate(part.wanted) if is_prompt(text)]
        if taught:
            asked = torch.tensor([self._row[text] for text in part.wanted if is_prompt(text)], device=device)
            if torch.equal(asked, rows[taught]):
                wanted[taught] = noised.before[taught]
            else:
                whole = rows.clone()
                whole[taught] = asked
                wanted[taught] = self._answers(teacher, noised, whole)[taught]
        noised.wanted = wanted
        return noised

    def _mean(self, teacher: Denoiser, noised: _Noised, rows: torch.Tensor) -> torch.Tensor:
        """What stands for the answer to the empty prompt, where there is none."""
        if self.objective.shows_means:
            # A decoder's answer is an image without noise: the mean image is the answer where nothing is known.
            return noised.before.mean(0, keepdim=True).expand_as(noised.before)
        answers = [self._answers(teacher, noised, torch.full_like(rows, self._row[text])) for text in self.averaged]
        return torch.stack(answers).mean(0)

    def _say_if_unknown(self, noised: _Noised) -> None:
        """Say so where the model errs no more on images in the concept's place than on samples of its own."""
        whole = self._deviation(noised.before, noised.wanted, noised.timesteps).mean().item()
        if whole <= noised.floor and self.accelerator.is_main_process:
            say(
                f'warning: what is forgotten of "{noised.of.name}" cannot be told from predictions, as the images in '
                "its place are no harder for the model than samples of its own: sampled images alone decide on it"
            )

    def _own_error(self) -> float:
        """The frozen model's mean error on samples of its own, against the noise that they were given."""
        errors = []
        for noised in self._noised:
            if noised.of.role == "remembered":
                samples = noised.of.samples.to(noised.noise.device)
                target = self.objective.target(samples, noised.timesteps, noised.noise).float()
                errors.append(self._deviation(noised.before, target, noised.timesteps))
        return torch.cat(errors).mean().item()

    def _predicted(self, module: Denoiser, noised: _Noised) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions without guidance, and with."""
        plain = self._answers(module, noised, noised.prompts)
        if noised.empty is None:
            return plain, plain
        empty = self._answers(module, noised, torch.full_like(noised.prompts, self._row[""]))
        return plain, empty + self.guidance * (plain - empty)

    @torch.no_grad()
    def _answers(self, module: Denoiser, noised: _Noised, rows: torch.Tensor) -> torch.Tensor:
        """Predictions `[n, ...]` under rows of the conditions, by all processes together."""
        count, result = len(noised.of), None
        for part in self._shares(count):
            answer = self._answer(module, noised, rows, range(part.start, part.stop))
            if result is None:
                result = torch.zeros((count, *answer.shape[1:]), device=answer.device)
            result[part] = answer
        if self.accelerator.num_processes > 1:
            if result is None:
                result = torch.zeros((count, *self._shape(noised)), device=rows.device)
            result = self.accelerator.reduce(result, reduction="sum")
        assert result is not None
        return result

    def _answer(self, module: Denoiser, noised: _Noised, rows: torch.Tensor, places: range) -> torch.Tensor:
        """Predictions at some places; where memory runs out, in smaller batches."""
        samples = noised.of.samples.to(rows.device)

        def answer(size: int) -> torch.Tensor:
            answers = []
            for first in places[::size]:
                part = slice(first, min(first + size, places.stop))
                conditions: Conditions = index_conditions(self._conditions, rows[part])
                with self.accelerator.autocast():
                    answers.append(self.objective.answer(
                        module, samples[part], conditions, noised.timesteps[part], noised.noise[part]
                    ).float())  # fmt: skip
            return torch.cat(answers)

        return shrinking(answer, len(places), "sample_batch_size")

    def _shape(self, noised: _Noised) -> torch.Size:
        # Predictions are as large as samples are, in every family so far.
        return noised.of.samples.shape[1:]

    def _shares(self, count: int) -> Iterator[slice]:
        """This process's parts of so many rows."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        size = min(self.batch_size, -(-count // processes))
        for start in range(rank * size, count, processes * size):
            yield slice(start, min(start + size, count))


def _averaged(sets: Sequence[ProbeSet]) -> list[str]:
    """Prompts whose mean stands for the empty one, where a model has none."""
    kept, forgotten = (
        list(dict.fromkeys(text for part in sets if part.role in roles for text in part.prompts))
        for roles in (("remembered", "neighbour"), FORGOTTEN_ROLES)
    )
    # One alone is its own mean.
    prompts = kept if len(kept) > 1 else kept + forgotten
    return prompts[:: -(-len(prompts) // AVERAGED)]


def _least(of_each: Mapping[str, float]) -> float | None:
    return min((value for value in of_each.values() if not math.isnan(value)), default=None)


def _forgotten(left: torch.Tensor, whole: torch.Tensor) -> float:
    return (1 - left / whole).item() if whole > 0 else math.nan
