"""Class-conditional diffusion models on pixels."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..models.class_conditional_pipeline import ClassConditionalPipeline
from .base import Conditions, Denoiser, SamplingSettings, digest_of, match_channels
from .diffusion import DiffusionObjective
from .paths import PixelPath
from .registry import register


@register("ClassConditionalPipeline")
class ClassConditionalObjective(DiffusionObjective):
    """The objective of a `ClassConditionalPipeline` (paper, sections 2.1 and 4.1).

    The squared error is summed over channels and pixels, as in the original's class experiments, so that its EWC
    weights carry over. Conditions are names or numbers of classes; the empty prompt is the null class.

    Args:
        pipeline: The frozen pipeline. Its UNet becomes the trainable module.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as the pipeline's scheduler says.
        snr_gamma: Min-SNR weighting of the loss (Hang et al., 2023); None leaves the loss unweighted.
        noise_offset: Scale of a further noise that is constant over each channel's pixels.

    Raises:
        ValueError: As `DiffusionObjective`.
    """

    kind = "class-conditional-diffusion"
    script = "train_sa.py"
    reduction = "sum"
    path_class = PixelPath
    fixed_resolution = True
    own_pipeline = ClassConditionalPipeline

    def __init__(
        self,
        pipeline: ClassConditionalPipeline,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        self.pipeline = pipeline
        self.module = pipeline.unet
        self.labels = pipeline.labels
        self.channels = self.module.config.in_channels
        super().__init__(pipeline.scheduler, prediction_type, snr_gamma, noise_offset)

    @property
    def resolution(self) -> int:
        return self.module.config.sample_size

    def to(self, device: torch.device | str) -> "ClassConditionalObjective":
        self.module.to(device)
        return self

    def fingerprint(self) -> str:
        facts = [*self.schedule_facts(self.pipeline.scheduler), repr(self.labels), self.prediction_type]
        return digest_of([self.module], facts)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        indices = [self.pipeline.label_index(prompt) for prompt in prompts]
        return {"class_labels": torch.tensor(indices, device=self.device)}

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        return module(noisy, timesteps, None, **conditions, return_dict=False)[0]

    def rows_of_step(self, settings: SamplingSettings) -> int:
        return 1 if settings.guidance_scale == 1 else 2

    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        return match_channels(images, self.channels).float()

    def sample_batch(
        self, prompts: list[str], generators: list[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        sampler = ClassConditionalPipeline(
            self.module, self.make_sampler(settings.sampler, self.pipeline.scheduler), self.pipeline.config.id2label
        )
        sampler.set_progress_bar_config(disable=True)
        return sampler(
            prompts,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=generators,
            output_type="latent",
        ).images

    def decode(self, samples: torch.Tensor) -> list[Image.Image]:
        return self.pipeline.image_processor.postprocess(samples.float(), output_type="pil")

    def save(self, folder: Path) -> None:
        self.save_with_own_scheduler(self.pipeline, folder)
