"""The paper's conditional variational autoencoder. A copy of this file travels with every saved model, so it imports
nothing but diffusers."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F


class ConditionalVAE(ModelMixin, ConfigMixin):
    """A conditional VAE of fully connected layers with Bernoulli pixels (paper, appendix B.1).

    A one-hot class is appended to the encoder's and to the decoder's input: 784+10 -> 512 -> 256 -> 8 and back, for
    28x28 pixels and ten classes.

    Args:
        sample_size: Height and width in pixels.
        in_channels: Channels of an image.
        num_classes: Number of classes.
        hidden_sizes: Widths of the encoder's hidden layers; the decoder mirrors them.
        latent_size: Width of the latent code.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        hidden_sizes: Sequence[int] = (512, 256),
        latent_size: int = 8,
    ) -> None:
        super().__init__()
        pixels = in_channels * sample_size**2
        self.encoder = _layers([pixels + num_classes, *hidden_sizes])
        self.mean = nn.Linear(hidden_sizes[-1], latent_size)
        self.log_variance = nn.Linear(hidden_sizes[-1], latent_size)
        self.decoder = _layers([latent_size + num_classes, *reversed(hidden_sizes)])
        self.pixels = nn.Linear(hidden_sizes[0], pixels)

    def one_hot(self, class_labels: torch.Tensor) -> torch.Tensor:
        return F.one_hot(class_labels, self.config.num_classes).to(self.dtype)

    def encode(self, images: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance `[batch, latent_size]` of images `[batch, channels, height, width]` in [0, 1]."""
        hidden = self.encoder(torch.cat([images.flatten(1), self.one_hot(class_labels)], dim=1))
        return self.mean(hidden), self.log_variance(hidden)

    def decode(self, codes: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Logits of the pixels, `[batch, channels, height, width]`, of codes `[batch, latent_size]`."""
        hidden = self.decoder(torch.cat([codes, self.one_hot(class_labels)], dim=1))
        size = self.config.sample_size
        return self.pixels(hidden).view(len(codes), self.config.in_channels, size, size)

    def forward(
        self, images: torch.Tensor | None, class_labels: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, mean and log variance; `noise` `[batch, latent_size]`, standard normal, draws the code. Without
        images the code is the prior's, the noise itself."""
        if images is None:
            return self.decode(noise, class_labels), torch.zeros_like(noise), torch.zeros_like(noise)
        mean, log_variance = self.encode(images, class_labels)
        codes = mean + (0.5 * log_variance).exp() * noise
        return self.decode(codes, class_labels), mean, log_variance


def _layers(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)
