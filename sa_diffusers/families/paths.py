"""How a sample turns into noise, and what a model learns to predict on the way: noise, target, timesteps, weights."""

import math

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import compute_snr

from .samplers import check_flow_scheduler, check_scheduler, scheduler_of

PREDICTION_TYPES = ("epsilon", "v_prediction")


class Path:
    """The way from samples to noise that a model was trained on.

    Timesteps are uniform, and weighted alike, unless a subclass says otherwise. This class alone, of timesteps and
    nothing else, serves an objective that has a loss of its own.

    Args:
        num_train_timesteps: See below.

    Attributes:
        num_train_timesteps: Timesteps of the ELBO's sum; 1 for a model that has none.
        prediction_type: What the model predicts.
        snr_gamma: Min-SNR weighting of the ELBO's terms, if any.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.
    """

    num_train_timesteps: int
    prediction_type: str
    snr_gamma: float | None = None
    noise_offset: float = 0.0

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps

    def draw_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Timesteps `int64` `[count]` of the training's density; `generator` is on the CPU."""
        return draw_timesteps(count, self.num_train_timesteps, generator)

    def strata(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """One timestep, `int64`, of each of `count` strata of the same density; all of them, in order, if `count` is
        their number. `generator` is on the CPU."""
        total = self.num_train_timesteps
        if count == total:
            return torch.arange(total)
        edges = torch.linspace(0, total, count + 1, dtype=torch.float64)
        width = edges[1:] - edges[:-1]
        places = edges[:-1] + width * torch.rand(count, generator=generator, dtype=torch.float64)
        return places.long().clamp(max=total - 1)

    def shares(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """How often timesteps `[batch]` are drawn, in units of a uniform draw; None is once each."""
        return None

    def draw_noise(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The noise of one ELBO estimate, on the samples' device; `generator` is on the CPU."""
        raise NotImplementedError

    def add_noise(self, samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Samples `[batch, ...]` as they are at timesteps `[batch]`."""
        raise NotImplementedError

    def target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the model should predict, of the prediction's shape: the noise, for epsilon prediction."""
        raise NotImplementedError

    def uniform_noise_target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """As `target`, for samples that are uniform noise: where it is known, the mean of what `target` gives over all
        samples and noises that could have led to the same noised sample. It has the same gradient on average."""
        return self.target(samples, timesteps, noise)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Weights `[batch]` of the ELBO's terms; None leaves them alike."""
        return None


class DiscretePath(Path):
    """Discrete-time diffusion (DDPM), epsilon or v-prediction.

    Args:
        scheduler: The model's own; its betas are those of the training.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Attributes:
        schedule: The betas, as a scheduler of diffusers.
        zero_terminal_snr: Whether the last timestep is noise alone (Lin et al., 2024).

    Raises:
        ValueError: The prediction type is another one, or the scheduler's noise is not known or contradicts it.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        check_scheduler(type(scheduler).__name__, scheduler.config)
        self.prediction_type = prediction_type or scheduler.config.prediction_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f'prediction_type="{self.prediction_type}" is not one of "epsilon", "v_prediction": other models are '
                "not supported"
            )
        self.zero_terminal_snr = bool(scheduler.config.get("rescale_betas_zero_snr"))
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "the model's scheduler sets rescale_betas_zero_snr, after which nothing of an image is left at the "
                "last timestep, but the model predicts epsilon, from which no image can be told there: give "
                "prediction_type v_prediction if it was trained so, or set rescale_betas_zero_snr to false in "
                "scheduler/scheduler_config.json"
            )
        try:
            self.schedule = DDPMScheduler.from_config(scheduler.config, prediction_type=self.prediction_type)
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the model's scheduler cannot be used ({error}): correct its configuration") from error
        kept = self.schedule.alphas_cumprod
        if not len(kept) or not ((kept >= 0) & (kept <= 1)).all():
            raise ValueError(
                "the model's scheduler has no betas, or betas outside of [0, 1]: correct its configuration"
            )
        self.num_train_timesteps = self.schedule.config.num_train_timesteps
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset

    def draw_noise(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(samples.shape, generator=generator)
        if self.noise_offset:
            noise += self.noise_offset * torch.randn((*samples.shape[:2], 1, 1), generator=generator)
        return noise.to(samples.device)

    def add_noise(self, samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.schedule.add_noise(samples, noise, timesteps)

    def target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "v_prediction":
            return self.schedule.get_velocity(samples, noise, timesteps)
        return noise

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self.schedule, timesteps)
        return snr.clamp(max=self.snr_gamma) / (snr + 1 if self.prediction_type == "v_prediction" else snr)


class PixelPath(DiscretePath):
    """Discrete-time diffusion of pixels in [-1, 1]; arguments as `DiscretePath`."""

    def uniform_noise_target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Pixel by pixel, the sample given the noised one is a Gaussian cut off at -1 and 1, whose mean is known."""
        if self.noise_offset:
            # It ties the pixels to each other.
            return self.target(samples, timesteps, noise)
        shape = [-1, *[1] * (samples.dim() - 1)]
        keep = self.schedule.alphas_cumprod.to(samples.device)[timesteps].double().view(shape)
        signal, spread = keep.sqrt(), (1 - keep).sqrt()
        noisy = signal * samples + spread * noise
        # Where nothing of the sample is left, its mean is that of all samples.
        left = signal > 0
        mean = truncated_normal_mean(noisy / signal.where(left, 1), spread / signal.where(left, 1)) * left
        noise = (noisy - signal * mean) / spread
        return (signal * noise - spread * mean if self.prediction_type == "v_prediction" else noise).float()


class FlowPath(Path):
    """Rectified flow (Liu et al., 2023): samples `x` become `(1 - s) x + s noise`, and `noise - x` is predicted.

    Timesteps are places in the scheduler's own table of `s`, from the least noise to the most. The table holds the
    static shift, `s = shift u / (1 + (shift - 1) u)`; a shift that goes by the resolution is for sampling alone: `s` is
    `u` then.

    A density `p(s)` and a weight `v(s)` of the velocity's error make the loss a bound on the ELBO of noised data, up to
    a constant, if `p(s) v(s) s / (1 - s)`, the weight of the noise's error over log-SNR, nowhere falls with `s` (Kingma
    and Gao, 2023: a monotonic weighting). It does not for the uniform density without weight, at any shift of 1 or
    more. For the logit-normal density it falls towards pure noise, weighted or not: what Stable Diffusion 3 was trained
    with is a reweighted ELBO, as the unweighted loss of noise prediction is (paper, section 2.1). Training, probes and
    Fisher information all take the loss of the published script.

    Args:
        scheduler: The model's own.
        density: Of `u`: `"uniform"`, or `"logit_normal"` with mean 0 and deviation 1 (Esser et al., 2024).
        weighting: `"sigma_squared"` weighs the velocity's error by `s^2`, which makes it the error of the sample that
            the prediction stands for; None leaves it.

    Attributes:
        sigmas: `s` of each timestep, float32.
        times: What the model's scheduler calls each timestep, float32.

    Raises:
        ValueError: The scheduler is not one of rectified flow.
    """

    prediction_type = "velocity"

    def __init__(self, scheduler: SchedulerMixin, density: str = "uniform", weighting: str | None = None) -> None:
        check_flow_scheduler(type(scheduler).__name__, scheduler.config)
        table = scheduler_of(FlowMatchEulerDiscreteScheduler, scheduler)
        self.num_train_timesteps = table.config.num_train_timesteps
        self.density = density
        self.weighting = weighting
        # The table begins with noise.
        self.sigmas, self.times = table.sigmas[: self.num_train_timesteps].flip(0), table.timesteps.flip(0)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        if self.density == "uniform":
            return super().draw_timesteps(count, generator)
        half = self._places(torch.randn((count + 1) // 2, generator=generator, dtype=torch.float64).sigmoid())
        return torch.cat([half, self.num_train_timesteps - 1 - half])[:count]

    def strata(self, count: int, generator: torch.Generator) -> torch.Tensor:
        if self.density == "uniform" or count == self.num_train_timesteps:
            return super().strata(count, generator)
        parts = torch.arange(count, dtype=torch.float64) + torch.rand(count, generator=generator, dtype=torch.float64)
        return self._places(torch.special.ndtri(parts / count).sigmoid())

    def _places(self, u: torch.Tensor) -> torch.Tensor:
        total = self.num_train_timesteps
        return (u * total).long().clamp(max=total - 1)

    def shares(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        if self.density == "uniform":
            return None
        total = self.num_train_timesteps
        below, above = (torch.special.ndtr((place.double() / total).logit()) for place in (timesteps, timesteps + 1))
        return (total * (above - below)).float()

    def sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`s` at timesteps `[batch]`, to be multiplied with samples `[batch, ...]`."""
        return self.sigmas.to(like.device)[timesteps].view(-1, *[1] * (like.dim() - 1))

    def draw_noise(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(samples.shape, generator=generator).to(samples.device)

    def add_noise(self, samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigma = self.sigma(timesteps, samples)
        return (1 - sigma) * samples + sigma * noise

    def target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return noise - samples

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        if self.weighting is None:
            return None
        return self.sigmas.to(timesteps.device)[timesteps].square()


class OneStepPath(Path):
    """A VAE's: one timestep, nothing is noised, and the noise `[batch, size]` draws the code.

    Args:
        size: Width of the code.
    """

    num_train_timesteps = 1
    prediction_type = "bernoulli"

    def __init__(self, size: int) -> None:
        self.size = size

    def draw_noise(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(len(samples), self.size, generator=generator).to(samples.device)

    def add_noise(self, samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return samples

    def target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return samples


def draw_timesteps(count: int, num_train_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform timesteps in antithetic pairs: the second half mirrors the first.

    Args:
        count: Number of timesteps.
        num_train_timesteps: Timesteps lie in [0, num_train_timesteps).
        generator: On the CPU.

    Returns:
        `int64` `[count]`.
    """
    half = torch.randint(num_train_timesteps, ((count + 1) // 2,), generator=generator)
    return torch.cat([half, num_train_timesteps - 1 - half])[:count]


def truncated_normal_mean(mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The mean of a normal distribution that is cut off at -1 and 1; all float64."""
    # On one side of zero, where the difference of the tails loses no digits.
    sign, size = torch.where(mean < 0, -1.0, 1.0), mean.abs()
    low, high = (-1 - size) / std, (1 - size) / std
    density = torch.exp(-low.square() / 2) - torch.exp(-high.square() / 2)
    mass = torch.special.ndtr(high) - torch.special.ndtr(low)
    cut = size + std * density / (mass * math.sqrt(2 * math.pi)).clamp(min=torch.finfo(mass.dtype).tiny)
    return sign * cut.clamp(-1, 1)
