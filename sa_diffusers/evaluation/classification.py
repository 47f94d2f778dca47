"""Scoring pictures with an image classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..families.digests import fingerprint_module
from ..hub import one_line
from ..identity import fingerprint
from ..models import digit_classifier  # noqa: F401  (it registers itself with transformers)
from ..names import bare_name
from ..results.statistics import moments
from .memory import in_batches

_LFS = b"version https://git-lfs"
_TOLD = 300
# In a classifier's configuration: labels that are no thing to ask for.
UNASKED = "labels_without_prompts"
Loaded = TypeVar("Loaded")


def loaded(what: str, name: str | Path, load: Callable[[], Loaded], advice: str) -> Loaded:
    """What `load` gives; whatever is wrong with a model from elsewhere is told in one sentence.

    Args:
        what: What the model is for, with its name, at the start of the sentence.
        name: A folder or a name on the Hub.
        load: Loads it.
        advice: What to do.

    Raises:
        ValueError: It could not be loaded; a file of the folder that is damaged is named.
    """
    try:
        return load()
    except MemoryError:
        raise
    except Exception as error:  # damaged files make every library under transformers raise errors of its own
        reason = broken_weights(name) or one_line(error)
        if len(reason) > _TOLD:
            reason = reason[: _TOLD - 1] + "…"
        raise ValueError(f"{what} could not be loaded ({reason}): {advice}") from error


def broken_weights(folder: str | Path) -> str | None:
    """Which file of weights in a folder is no such file, and why; None if there is none or it is no folder."""
    for path in sorted(Path(folder).glob("*")) if Path(folder).is_dir() else ():
        if path.suffix not in (".safetensors", ".bin") or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                return f"{path} is a pointer of git-lfs and not the file itself: run `git lfs pull` in its folder"
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except Exception as error:  # safetensors' own kind is no subclass of anything
                return f"{path} is cut or damaged, {error}: copy it anew"
    return None


def whole(loaded_with_info: tuple[nn.Module, dict]) -> nn.Module:
    """A model of transformers, loaded with `output_loading_info`, in evaluation mode.

    Raises:
        ValueError: Its files lack some of its weights, which are random then.
    """
    model, info = loaded_with_info
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"its files lack {len(missing)} of the weights that it needs, such as {missing[0]}")
    return model.eval()


@dataclass
class Classification:
    """What a classifier says of pictures.

    Attributes:
        probabilities: `[n, labels]`.
        features: `[n, d]`, what its last linear layer sees.

    Raises:
        ValueError: A number is not finite.
    """

    probabilities: torch.Tensor
    features: torch.Tensor

    def __post_init__(self) -> None:
        # Such pictures would all be taken for the first label.
        if not (self.probabilities.isfinite().all() and self.features.isfinite().all()):
            raise ValueError(
                "what is to say what images show gives numbers that are not finite: its weights are damaged; copy the "
                "classifier (or the CLIP) anew, or give another"
            )


class ImageClassifier:
    """Any transformers image classifier.

    A label that is no thing to ask for, "neither" say, has no row in a report and is remembered by no prompt, if the
    classifier's `config.json` names it: `"labels_without_prompts": ["neither"]`.

    Args:
        name_or_path: A folder or a name on the Hub.
        device: Where it runs.
        reference_features: File that `save_reference_features` wrote for this classifier, for Fréchet distances to
            real images.

    Raises:
        ValueError: The classifier cannot be loaded, or the reference was not made with one of this shape.

    Attributes:
        labels: All of them.
        prompted: Those that a prompt can ask for.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        device: torch.device | str = "cpu",
        reference_features: str | Path | None = None,
    ) -> None:
        what = f'classifier="{name_or_path}"'
        advice = "give a folder or a Hub name of a transformers image classifier, with its preprocessor_config.json"
        model = loaded(what, name_or_path, lambda: whole(AutoModelForImageClassification.from_pretrained(
            name_or_path, output_loading_info=True, trust_remote_code=False)), advice)  # fmt: skip
        self.model = model.to(device)
        self.processor = loaded(
            what,
            name_or_path,
            lambda: AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=False),
            advice,
        )
        self.name = str(name_or_path)
        # Which of its labels lie near a concept, a classifier does not say.
        self.neighbours: list[str] = []
        count = self.model.config.num_labels
        self.labels = [str(self.model.config.id2label[index]) for index in range(count)]
        unasked = getattr(self.model.config, UNASKED, None) or []
        if not isinstance(unasked, list) or not all(label in self.labels for label in unasked):
            raise ValueError(f"{what}: {UNASKED} in its config.json must be a list of its labels: correct it there")
        self.prompted = [label for label in self.labels if label not in unasked]
        heads = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        if not heads:
            raise ValueError(f"{what} has no linear layer to take features from: {advice}")
        self._head = heads[-1]
        self.reference = None
        if reference_features is not None:
            self.reference = _read_reference(Path(reference_features), (count, self._head.in_features), self.name)

    def fingerprint(self) -> str:
        """A digest of what its answers depend on."""
        return fingerprint([fingerprint_module(self.model), self.labels])

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], batch_size: int = 100) -> Classification:
        seen: list[torch.Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1).float().cpu()))

        def score(batch: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
            seen.clear()
            inputs = self.processor([picture.convert("RGB") for picture in batch], return_tensors="pt")
            logits = self.model(**inputs.to(self.model.device)).logits
            return logits.float().softmax(-1).cpu(), seen[-1]

        try:
            scored = in_batches(pictures, batch_size, score)
        finally:
            hook.remove()
        return Classification(*(torch.cat(parts) for parts in zip(*scored, strict=True)))

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
        foreign = sorted(set(self.prompted) - set(classes))
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


def _read_reference(path: Path, expected: tuple[int, int], classifier: str) -> dict[str, torch.Tensor]:
    """What `save_reference_features` wrote, of so many labels and features.

    Raises:
        ValueError: It is no such file, is damaged, or belongs to another classifier.
    """
    if not path.is_file():
        raise ValueError(f"reference_features={path} is not a file")
    advice = "give one that save_reference_features wrote, or leave it out"
    try:
        reference = load_file(path)
    except Exception as error:  # safetensors' own kind is no subclass of anything
        raise ValueError(f"reference_features={path} could not be read ({one_line(error)}): {advice}") from error
    shapes = {"mean": expected, "covariance": (*expected, expected[1])}
    missing = [name for name in shapes if name not in reference]
    if missing:
        raise ValueError(f"reference_features={path} holds no {' and no '.join(missing)}: {advice}")
    for name, shape in shapes.items():
        found = tuple(reference[name].shape)
        if found != shape:
            raise ValueError(
                f"reference_features={path} has {name}s of shape {found}, but {classifier} needs {shape} (labels, "
                "features): it belongs to another classifier"
            )
        if not reference[name].isfinite().all():
            raise ValueError(f"reference_features={path} is damaged, it holds a {name} that is not finite: {advice}")
    return reference


class ClassifierFeatures:
    """A classifier's penultimate features, by themselves."""

    def __init__(self, classifier: ImageClassifier) -> None:
        self.classifier = classifier
        self.name = classifier.name

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.classifier(pictures).features
