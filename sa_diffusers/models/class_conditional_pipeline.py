"""Sampling a class-conditional diffusion model. A copy of this file travels with every saved pipeline as `pipeline.py`,
so it imports nothing but diffusers."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images of a class from a diffusion model on pixels, with classifier-free guidance.

    Args:
        unet: Takes `class_labels`; its last class embedding, `num_class_embeds - 1`, is the learned null class.
        scheduler: Any scheduler of diffusers.
        id2label: Index (as text) -> name of the class. Default: the names are the numbers.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self, unet: UNet2DConditionModel, scheduler: SchedulerMixin, id2label: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        classes = (unet.config.num_class_embeds or 0) - 1
        names = id2label or {str(index): str(index) for index in range(classes)}
        if sorted(names, key=int) != [str(index) for index in range(classes)]:
            raise ValueError(
                f"the UNet has {classes + 1} class embeddings, the last of them the null class, so id2label must name "
                f"the classes 0 to {classes - 1}; it names {', '.join(names)}"
            )
        self.register_to_config(id2label=names)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def labels(self) -> list[str]:
        """Names of the classes, by index."""
        return [self.config.id2label[str(index)] for index in range(len(self.config.id2label))]

    def label_index(self, label: int | str | None) -> int:
        """The index of a class given by index, by number as text, or by name; None and "" are the null class.

        Raises:
            ValueError: There is no such class.
        """
        labels = self.labels
        if isinstance(label, torch.Tensor):
            label = int(label)
        if label is None or label == "":
            return len(labels)
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
        class_labels: int | str | None | Sequence[int | str | None],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_weight: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each label.

        Args:
            class_labels: Classes, by index or by name; None is the null class.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: Guidance as in diffusers, `null + guidance_scale * (conditional - null)`; 1 is none.
            guidance_weight: Guidance as in the paper, `(1 + guidance_weight) * conditional - guidance_weight * null`;
                given, it takes the place of `guidance_scale`, which is `1 + guidance_weight`.
            generator: One, or one for each image.
            latents: The initial noise, `[images, channels, height, width]`. Default: drawn.
            output_type: `"pil"`, `"np"`, `"pt"`, or `"latent"` for tensors in [-1, 1].
            return_dict: Whether to return an `ImagePipelineOutput`.

        Raises:
            ValueError: A label is not one of the model's.
        """
        single = class_labels is None or isinstance(class_labels, (int, str))
        wanted = [class_labels] if single else list(class_labels)  # type: ignore[arg-type]
        if guidance_weight is not None:
            guidance_scale = 1 + guidance_weight
        device, dtype = self._execution_device, self.unet.dtype
        labels = torch.tensor([self.label_index(label) for label in wanted], device=device)
        null = torch.full_like(labels, self.label_index(None))
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        shape = (len(wanted), channels, size, size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        options = self.prepare_extra_step_kwargs(generator)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(latents, timestep)
            if guidance_scale == 1:
                prediction = self.unet(model_input, timestep, None, class_labels=labels).sample
            else:
                both = self.unet(
                    torch.cat([model_input, model_input]), timestep, None, class_labels=torch.cat([null, labels])
                ).sample
                empty, conditional = both.chunk(2)
                prediction = empty + guidance_scale * (conditional - empty)
            latents = self.scheduler.step(prediction, timestep, latents, **options).prev_sample
        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(latents.float(), output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_extra_step_kwargs(self, generator: Any) -> dict[str, Any]:
        import inspect

        accepted = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in accepted else {}

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save, with this file beside the weights, so that no other package is needed to load."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory) / "pipeline.py")
        index = Path(save_directory) / self.config_name
        values = json.loads(index.read_text(encoding="utf-8"))
        values["_class_name"] = ["pipeline", type(self).__name__]
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
