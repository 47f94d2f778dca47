"""Models that come with the package."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CONFIGURATIONS = Path(__file__).parent / "configurations"
_COLOURED = Path(__file__).parent / "coloured"
_EMBEDDED = Path(__file__).parent / "embedded"


def coloured_pipeline() -> Path:
    """Folder of the coloured text-to-image pipeline: 40 concepts in three styles, 64x64 pixels, trained on icons."""
    return _COLOURED / "pipeline"


def embedded_pipeline() -> Path:
    """Folder of the embedded text-to-image pipeline: ten garments, 32x32 pixels, trained on Fashion-MNIST."""
    return _EMBEDDED / "pipeline"


def embedded_classifier() -> Path:
    """Folder of the image classifier that scores the embedded pipeline's samples."""
    return _EMBEDDED / "classifier"


def class_configurations() -> list[str]:
    """Names of the built-in configurations of class-conditional models."""
    return sorted(path.stem for path in _CONFIGURATIONS.glob("*.json"))


def build_class_pipeline(configuration: str | Path, labels: Sequence[str]) -> Any:
    """A randomly initialised class-conditional model, as a pipeline.

    Args:
        configuration: A built-in name (`mnist_vae`, the paper's conditional VAE; `cifar10` and `stl10`, its diffusion
            models in diffusers' UNet2DConditionModel, whose plain middle block has no attention; `small_32`,
            `small_32_rgb`, `small_64`), or a JSON file of the same form.
        labels: Names of the classes.

    Raises:
        ValueError: There is no such configuration, or its kind is unknown.
    """
    values = _read_configuration(configuration)
    id2label = {str(index): name for index, name in enumerate(labels)}
    if values.get("kind") == "vae":
        from .conditional_vae import ConditionalVAE
        from .conditional_vae_pipeline import ConditionalVAEPipeline

        return ConditionalVAEPipeline(ConditionalVAE(num_classes=len(labels), **values["model"]), id2label)
    if values.get("kind") == "diffusion":
        from diffusers import DDPMScheduler, UNet2DConditionModel

        from .class_conditional_pipeline import ClassConditionalPipeline

        unet = UNet2DConditionModel(num_class_embeds=len(labels) + 1, **values["model"])
        return ClassConditionalPipeline(unet, DDPMScheduler(**values["scheduler"]), id2label)
    raise ValueError(f'{configuration}: kind={values.get("kind")!r} is not one of "vae", "diffusion"')


def class_defaults(configuration: str | Path, part: str = "erasure") -> dict[str, Any]:
    """The settings that suit the models of a configuration; `build_class_pipeline` has its form.

    Args:
        configuration: A built-in name or a JSON file. A file without such settings has those of `mnist_vae` or
            `small_32`, as its kind is.
        part: `"erasure"`, or `"training"` for those of the base model's training.
    """
    values = _read_configuration(configuration)
    if part not in values:
        values = _read_configuration("mnist_vae" if values.get("kind") == "vae" else "small_32")
    return values[part]


def _read_configuration(configuration: str | Path) -> dict[str, Any]:
    path = Path(configuration)
    if str(configuration) in class_configurations():
        path = _CONFIGURATIONS / f"{configuration}.json"
    if not path.is_file():
        raise ValueError(
            f'model="{configuration}" is neither one of {", ".join(class_configurations())}, nor a JSON file'
        )
    return json.loads(path.read_text(encoding="utf-8"))
