"""What families and those who call them hand to each other: conditions, settings of sampling, handles on the text."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

Conditions = dict[str, torch.Tensor]


class Denoiser(Protocol):
    """The trainable module, or anything that is called as it is (a wrapped module, a frozen copy)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled from a model.

    Attributes:
        sampler: Name of the sampler, one of `sa_diffusers.samplers.SAMPLERS`.
        num_inference_steps: Its steps.
        guidance_scale: Classifier-free guidance as diffusers defines it; 1 samples without.
        batch_size: Images sampled at once. It changes rounding, nothing else.
        resolution: Height and width in pixels; None is the model's own.
    """

    sampler: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    batch_size: int = 8
    resolution: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TextEncoder:
    """A handle on a model's text for attacks.

    Attributes:
        tokenizer: Takes new tokens.
        encoder: Its text encoder; the new token's row is added to its input embeddings.
    """

    tokenizer: Any
    encoder: nn.Module


def index_conditions(conditions: Conditions, index: torch.Tensor) -> Conditions:
    """Rows of conditions."""
    return {name: values[index] for name, values in conditions.items()}


def match_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Images `[batch, 3 or channels, height, width]` as a model of so many channels takes them: themselves, or grey."""
    if channels == images.shape[1]:
        return images
    if channels == 1:
        return images.mean(1, keepdim=True)
    raise ValueError(f"images have {images.shape[1]} channels, the model takes {channels}")
