"""Scoring pictures with an image classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..data.prompts import bare_name
from ..models import digit_classifier  # noqa: F401  (it registers itself with transformers)
from .statistics import moments


@dataclass
class Classification:
    """What a classifier says of pictures.

    Attributes:
        probabilities: `[n, labels]`.
        features: `[n, d]`, what its last linear layer sees.
    """

    probabilities: torch.Tensor
    features: torch.Tensor


class ImageClassifier:
    """Any transformers image classifier.

    Args:
        name_or_path: A folder or a name on the Hub.
        device: Where it runs.
        reference_features: File that `save_reference_features` wrote for this classifier, for Fréchet distances to
            real images.

    Raises:
        ValueError: The classifier cannot be loaded, or the reference was not made with one of this shape.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        device: torch.device | str = "cpu",
        reference_features: str | Path | None = None,
    ) -> None:
        try:
            self.model = AutoModelForImageClassification.from_pretrained(name_or_path).eval().to(device)
            self.processor = AutoImageProcessor.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f'classifier="{name_or_path}" could not be loaded ({error}): give a folder or a Hub name of a '
                "transformers image classifier"
            ) from error
        self.name = str(name_or_path)
        count = self.model.config.num_labels
        self.labels = [str(self.model.config.id2label[index]) for index in range(count)]
        heads = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        self._head = heads[-1]
        self.reference = None
        if reference_features is not None:
            if not Path(reference_features).is_file():
                raise ValueError(f"reference_features={reference_features} is not a file")
            self.reference = load_file(reference_features)
            expected = (count, self._head.in_features)
            if tuple(self.reference["mean"].shape) != expected:
                raise ValueError(
                    f"reference_features={reference_features} has means of shape "
                    f"{tuple(self.reference['mean'].shape)}, but {name_or_path} needs {expected} (labels, features): "
                    "it belongs to another classifier"
                )

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], batch_size: int = 100) -> Classification:
        seen: list[torch.Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).float().cpu()))
        probabilities = []
        try:
            for start in range(0, len(pictures), batch_size):
                batch = [picture.convert("RGB") for picture in pictures[start : start + batch_size]]
                inputs = self.processor(batch, return_tensors="pt").to(self.model.device)
                probabilities.append(self.model(**inputs).logits.float().softmax(-1).cpu())
        finally:
            hook.remove()
        return Classification(torch.cat(probabilities), torch.cat(seen))

    def feature_network(self) -> "ClassifierFeatures":
        """What its last linear layer sees, as a network of features."""
        return ClassifierFeatures(self)

    def label_of(self, text: str) -> int | None:
        """The index of the label that a concept or surrogate is: the same text, else in any case and with any
        article."""
        if text in self.labels:
            return self.labels.index(text)
        names = [bare_name(label) for label in self.labels]
        return names.index(bare_name(text)) if bare_name(text) in names else None

    def check_classes(self, classes: Sequence[str], concepts: Sequence[str]) -> None:
        """Refuse to score a model of classes that this classifier does not know.

        Args:
            classes: The model's.
            concepts: Those to be forgotten.

        Raises:
            ValueError: A label is not one of the classes, or a concept is not one of the labels.
        """
        foreign = sorted(set(self.labels) - set(classes))
        if foreign:
            raise ValueError(
                f'classifier="{self.name}" names {", ".join(foreign)}, which are not classes of this model; they are '
                f"{', '.join(classes)}"
            )
        for concept in concepts:
            if concept not in self.labels:
                raise ValueError(
                    f'classifier="{self.name}" does not know "{concept}", which is to be forgotten; it knows '
                    f"{', '.join(self.labels)}"
                )

    def reference_moments(self, labels: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and covariance of the real images of some labels, equally weighted; None without a reference."""
        if self.reference is None:
            return None
        means = self.reference["mean"][list(labels)].double()
        covariances = self.reference["covariance"][list(labels)].double()
        mean = means.mean(0)
        spread = means - mean
        return mean, covariances.mean(0) + spread.T @ spread / len(means)

    def save_reference_features(self, pictures: Sequence[Sequence[Image.Image]], path: str | Path) -> None:
        """Write mean and covariance of the features of real images, label by label.

        Args:
            pictures: For each label its real images.
            path: A safetensors file.
        """
        pairs = [moments(self(images).features) for images in pictures]
        save_file(
            {
                "mean": torch.stack([mean for mean, _ in pairs]).float(),
                "covariance": torch.stack([covariance for _, covariance in pairs]).float(),
            },
            path,
        )


class ClassifierFeatures:
    """A classifier's penultimate features, by themselves."""

    def __init__(self, classifier: ImageClassifier) -> None:
        self.classifier = classifier
        self.name = classifier.name

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.classifier(pictures).features
