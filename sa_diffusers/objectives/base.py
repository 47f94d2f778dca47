"""What the Fisher estimator and the trainer know of a generative model: nothing but this protocol."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

Conditions = dict[str, torch.Tensor]


class Denoiser(Protocol):
    """The trainable module, or anything that is called as it is (a wrapped module, a frozen copy)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn from a model.

    Attributes:
        sampler: Name of the sampler, one of `sa_diffusers.configuration.SAMPLERS`.
        num_inference_steps: Its steps.
        guidance_scale: Classifier-free guidance as diffusers defines it; 1 draws without.
        batch_size: Images drawn at once. It changes rounding, nothing else.
        resolution: Height and width in pixels; None is the model's own.
    """

    sampler: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    batch_size: int = 8
    resolution: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Objective(ABC):
    """One kind of generative model: how to encode, what one sample's negative ELBO is, how to sample, how to save.

    A new family of models is a new subclass, and nothing else: the Fisher estimator and the trainer see only what is
    declared here. Samples are what the denoiser works on (latents, for latent diffusion), `[batch, ...]`, float32.
    Conditions are tensors by name, each `[batch, ...]`.

    Attributes:
        kind: Name of the family, recorded with everything computed under it.
        module: The trainable module.
        num_train_timesteps: Timesteps of the ELBO's sum; 1 for a model that has none.
        prediction_type: What the module predicts.
        reduction: How a sample's squared error is reduced over its elements, `"mean"` or `"sum"`. The weight of the
            EWC term does not carry over between the two.
        snr_gamma: Min-SNR weighting of the ELBO's terms, if any.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.
        labels: Names of the classes, where conditions are classes; None where they are text.
        unconditional: Whether the empty prompt is a condition of its own.
        channels: Channels of its images.
        shows_means: Whether a drawn sample is the mean of its pixels' distribution, not a draw from it.
    """

    kind: str
    module: nn.Module
    num_train_timesteps: int
    prediction_type: str
    reduction: str
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    labels: list[str] | None = None
    unconditional: bool = True
    channels: int = 3
    shows_means: bool = False

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Height and width of the model's own images in pixels."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def to(self, device: torch.device | str) -> "Objective":
        """Move what encoding, sampling and training need."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of all weights and settings that samples depend on."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """Conditions of prompts, `[len(prompts), ...]`, on the model's device."""

    def why_unseen(self, prompt: str, name: str) -> str | None:
        """Why the model does not see all of a prompt's first mention of a name, as a sentence.

        None if it does, and where conditions are classes.
        """
        return None

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than what the model reads of them; 0 where conditions are classes."""
        return 0

    def check_sampling(self, settings: SamplingSettings, scheduler: Any = None) -> None:
        """Refuse, before anything is sampled, settings that the model cannot be sampled by.

        Args:
            settings: Sampler, steps, guidance.
            scheduler: The pipeline's own, where it has one.

        Raises:
            ValueError: The sampler cannot follow the model's noise schedule, say.
        """
        return

    def means_the_same(self, first: str, second: str) -> bool:
        """Whether two prompts are one and the same condition to the model."""
        return first == second

    @abstractmethod
    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        """Samples of images `[batch, 3 or channels, height, width]` in [-1, 1]; `seed` draws from an encoder's
        posterior."""

    @abstractmethod
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings) -> torch.Tensor:
        """Draw one sample for each prompt; all its randomness comes from the seed of the same index."""

    @abstractmethod
    def decode(self, samples: torch.Tensor) -> list[Image.Image]:
        """Pictures of samples."""

    @abstractmethod
    def draw_noise(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The noise of one ELBO estimate, of the samples' shape and on their device; `generator` is on the CPU."""

    @abstractmethod
    def negative_elbo(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One term of each sample's (reweighted) negative ELBO (paper, section 2.1).

        Args:
            module: `self.module`, or what stands in for it.
            samples: `[batch, ...]`.
            conditions: Each `[batch, ...]`.
            timesteps: `int64` `[batch]` in [0, num_train_timesteps).
            noise: As from `draw_noise`.
            target: What the module should predict, of the prediction's shape. Default: the target that the noise
                gives.

        Returns:
            `[batch]`, float32, not yet reduced over the batch.
        """

    @abstractmethod
    def predict(
        self,
        module: Denoiser,
        samples: torch.Tensor,
        conditions: Conditions,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """What the module predicts for noised samples; the arguments of `negative_elbo`."""

    @abstractmethod
    def target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the module should predict, of the prediction's shape: the noise, for epsilon prediction."""

    def uniform_noise_target(self, samples: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """As `target`, for samples that are uniform noise: where it is known, the mean of what `target` gives over all
        samples and noises that could have led to the same noised sample. It has the same gradient on average."""
        return self.target(samples, timesteps, noise)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the whole pipeline, for `DiffusionPipeline.from_pretrained`."""


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


def index_conditions(conditions: Conditions, index: torch.Tensor) -> Conditions:
    """Rows of conditions."""
    return {name: values[index] for name, values in conditions.items()}


def fingerprint_module(module: nn.Module) -> str:
    """A digest of a module's parameters and buffers: names, shapes, types and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()
