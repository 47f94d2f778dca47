"""Sampling a conditional VAE. A copy of this file travels with every saved pipeline as `pipeline.py`, so it imports
nothing but diffusers."""

import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class ConditionalVAEPipeline(DiffusionPipeline):
    """Draws images of a class from a conditional VAE: the decoder's means, not binarised.

    Args:
        vae: A `ConditionalVAE`.
        id2label: Index (as text) -> name of the class. Default: the names are the numbers.
    """

    model_cpu_offload_seq = "vae"

    def __init__(self, vae: ModelMixin, id2label: dict[str, str] | None = None) -> None:
        super().__init__()
        self.register_modules(vae=vae)
        classes = vae.config.num_classes
        names = id2label or {str(index): str(index) for index in range(classes)}
        if sorted(names, key=int) != [str(index) for index in range(classes)]:
            raise ValueError(f"id2label must name the classes 0 to {classes - 1}; it names {', '.join(names)}")
        self.register_to_config(id2label=names)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False)

    @property
    def labels(self) -> list[str]:
        """Names of the classes, by index."""
        return [self.config.id2label[str(index)] for index in range(len(self.config.id2label))]

    def label_index(self, label: int | str) -> int:
        """The index of a class given by index, by number as text, or by name.

        Raises:
            ValueError: There is no such class.
        """
        labels = self.labels
        if isinstance(label, torch.Tensor):
            label = int(label)
        if str(label) in labels:
            return labels.index(str(label))
        if str(label).isdecimal() and int(label) < len(labels):
            return int(label)
        raise ValueError(
            f'"{label}" is not a class of this model: give one of {", ".join(labels)}, or a number from 0 to '
            f"{len(labels) - 1}"
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each label.

        Args:
            class_labels: Classes, by index or by name.
            generator: One, or one for each image.
            output_type: `"pil"`, `"np"`, or `"pt"` (also `"latent"`) for tensors in [0, 1].
            return_dict: Whether to return an `ImagePipelineOutput`.

        Raises:
            ValueError: A label is not one of the model's.
        """
        wanted = [class_labels] if isinstance(class_labels, (int, str)) else list(class_labels)
        device = self._execution_device
        labels = torch.tensor([self.label_index(label) for label in wanted], device=device)
        shape = (len(wanted), self.vae.config.latent_size)
        codes = randn_tensor(shape, generator=generator, device=device, dtype=self.vae.dtype)
        images = self.vae.decode(codes, labels).sigmoid()
        if output_type != "latent":
            images = self.image_processor.postprocess(images.float(), output_type, [False] * len(wanted))
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save, with the code of pipeline and model beside the weights, so that no other package is needed to load."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        shutil.copyfile(__file__, folder / "pipeline.py")
        shutil.copyfile(inspect.getfile(type(self.vae)), folder / "vae" / "conditional_vae.py")
        index = folder / self.config_name
        values = json.loads(index.read_text(encoding="utf-8"))
        values["_class_name"] = ["pipeline", type(self).__name__]
        values["vae"] = ["conditional_vae", type(self.vae).__name__]
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
