"""Erased pipelines as a technique of the benchmark package eval-unlearn, found through its entry-point group."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from ..configuration import CONFIG_NAME
from ..files import read_json
from ..objectives import SamplingSettings, load_pipeline, objective_for

TECHNIQUE_NAME = "selective_amnesia"


class SelectiveAmnesiaTechnique:
    """The technique `selective_amnesia`: draws with an erased pipeline, by the settings that it was erased with.

    Args:
        model_id: Folder or Hub name of an erased pipeline.
        num_inference_steps: Steps of the sampler. Default: as in the erasure, else 50.
        guidance_scale: Classifier-free guidance. Default: as in the erasure, else 7.5.
        sampler: One of `sa_diffusers.configuration.SAMPLERS`. Default: as in the erasure, else ddim.
        batch_size: Images drawn at once.
        erase_concept: What was erased, for the benchmark's own reports. It changes nothing.
        **unused: Further settings of the benchmark.

    Raises:
        ValueError: The pipeline cannot be loaded, or takes no prompts.
    """

    def __init__(
        self,
        model_id: str,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        batch_size: int = 8,
        erase_concept: str | None = None,
        **unused: Any,
    ) -> None:
        path = Path(model_id) / CONFIG_NAME
        erasure = read_json(path) if path.is_file() else {}
        given = {"sampler": sampler, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        known = {name: erasure[name] if value is None else value for name, value in given.items()
                 if value is not None or name in erasure}  # fmt: skip
        self.settings = SamplingSettings(**known, batch_size=batch_size)
        self.objective = objective_for(load_pipeline(model_id)).to(Accelerator().device)
        if self.objective.labels is not None:
            raise ValueError(
                f"model_id={model_id} takes classes, not prompts: the benchmark needs a text-to-image model"
            )

    def generate(self, prompts: Sequence[str], seed: int | None = None, **unused: Any) -> list[Image.Image]:
        """Pictures of prompts; the i-th has seed `seed + i` (default: from 0)."""
        first = seed or 0
        samples = self.objective.sample(list(prompts), list(range(first, first + len(prompts))), self.settings)
        return self.objective.decode(samples)
