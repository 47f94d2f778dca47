"""Images of the validation prompts, sampled while the training goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers.utils import make_image_grid
from PIL import Image

from ..configuration import SelectiveAmnesiaConfig
from ..data.generation import sampled
from ..data.sensitive import blurred
from ..families.base import Objective
from ..processes import stop_requested, wait_until
from ..seeds import first_seed
from .progress import tracker_errors
from .settings import sampling_settings


@dataclass
class Validation:
    """When validation images are sampled, and where they go.

    Attributes:
        objective: The model in training.
        config: Prompts, steps, number of images, sampler.
        accelerator: Precision and trackers; the main process samples.
        folder: Where the images go; None writes none.
        blur: Whether they are blurred.
    """

    objective: Objective
    config: SelectiveAmnesiaConfig
    accelerator: Accelerator
    folder: Path | None
    blur: bool = False

    def due(self, step: int) -> bool:
        """Whether it is time, after so many steps."""
        config = self.config
        return bool(config.validation_prompts) and (
            step % config.validation_steps == 0 or step == config.max_train_steps
        )

    def file(self, step: int) -> Path | None:
        return self.folder and self.folder / f"step-{step:06d}.png"

    @torch.no_grad()
    def run(self, step: int) -> None:
        """Sample, show to the trackers, write."""
        config, path = self.config, self.file(step)
        if not self.accelerator.is_main_process:
            if path:
                # Who is to stop goes on to the next step, where all agree on it.
                wait_until(lambda: path.is_file() or stop_requested() is not None)
            return
        prompts = [prompt for prompt in config.validation_prompts for _ in range(config.num_validation_images)]
        # The same noise for each prompt, so that only the prompt differs.
        first = first_seed("validation", config.seed)
        seeds = [first + number for _ in config.validation_prompts for number in range(config.num_validation_images)]
        with self.accelerator.autocast():
            samples = sampled(self.objective, prompts, seeds, sampling_settings(config))
            pictures = self.objective.decode(samples)
        if self.blur:
            pictures = [blurred(picture) for picture in pictures]
        for tracker in self.accelerator.trackers:
            with tracker_errors():
                self._show(tracker, pictures, prompts, step)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp.png")
            make_image_grid(pictures, len(config.validation_prompts), config.num_validation_images).save(temporary)
            temporary.replace(path)

    def _show(
        self, tracker: GeneralTracker, pictures: Sequence[Image.Image], prompts: Sequence[str], step: int
    ) -> None:
        if tracker.name == "tensorboard":
            import numpy as np

            images = np.stack([np.asarray(picture) for picture in pictures])
            tracker.writer.add_images("validation", images, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            told = [wandb.Image(picture, caption=prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
            tracker.log({"validation": told}, step=step)
