"""A two-layer convolutional classifier. A copy of this file travels with every saved model, so it imports nothing but
transformers."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class DigitClassifierConfig(PreTrainedConfig):
    """Shape of a `DigitClassifier`.

    Args:
        image_size: Height and width in pixels, at least 16.
        num_channels: Channels of an image.
        hidden_sizes: Channels of the two convolutions.
        dropout: Share of the last layer's inputs that training drops.
    """

    model_type = "digit-classifier"

    def __init__(
        self,
        image_size: int = 28,
        num_channels: int = 3,
        hidden_sizes: tuple[int, int] = (32, 64),
        dropout: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        self.dropout = dropout


class DigitClassifier(PreTrainedModel):
    """Two 5x5 convolutions, each with a ReLU and 2x2 max-pooling, and a linear layer: the paper's MNIST classifier in
    kind (appendix B.1). It has no normalisation layer, which would stretch a blank image's rounding into features.
    """

    config_class = DigitClassifierConfig
    main_input_name = "pixel_values"

    def __init__(self, config: DigitClassifierConfig) -> None:
        super().__init__(config)
        first, second = config.hidden_sizes
        self.first = nn.Conv2d(config.num_channels, first, 5)
        self.second = nn.Conv2d(first, second, 5)
        side = ((config.image_size - 4) // 2 - 4) // 2
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(second * side**2, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        """Logits `[batch, labels]` of images `[batch, channels, height, width]`, and the loss if labels are given."""
        hidden = F.max_pool2d(self.first(pixel_values).relu(), 2)
        hidden = F.max_pool2d(self.second(hidden).relu(), 2)
        logits = self.classifier(self.dropout(hidden.flatten(1)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation stands."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()


AutoConfig.register(DigitClassifierConfig.model_type, DigitClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(DigitClassifierConfig, DigitClassifier, exist_ok=True)
# Saved models then load elsewhere with trust_remote_code=True.
DigitClassifierConfig.register_for_auto_class()
DigitClassifier.register_for_auto_class("AutoModelForImageClassification")
