"""Erased pipelines as a technique of the benchmark package eval-unlearn, found through its entry-point group."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..environment import launched
from ..families import SUPPORTED_PIPELINES, SamplingSettings, load_pipeline, objective_for
from ..families.adapters import find_adapter, hold_quantized, with_adapter
from ..output_folder import OutputFolder
from ..quantization import check_quantization
from .erased import erasure_settings

TECHNIQUE_NAME = "selective_amnesia"
_TYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class SelectiveAmnesiaTechnique:
    """The technique `selective_amnesia`: draws with an erased pipeline, by the settings that it was erased with.

    Args:
        model_id: Folder or Hub name of an erased pipeline.
        num_inference_steps: Steps of the sampler. Default: as in the erasure, else 50.
        guidance_scale: Classifier-free guidance. Default: as in the erasure, else 7.5.
        sampler: One of `sa_diffusers.configuration.SAMPLERS`. Default: as in the erasure, else ddim.
        batch_size: Images drawn at once.
        resolution: Height and width in pixels. Default: as in the erasure, else the model's own.
        prediction_type: `"epsilon"` or `"v_prediction"`. Default: as in the erasure, else as the pipeline's scheduler
            says.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`. Default: that of the erasure's own report, else of its settings,
            else as `accelerate config` says.
        revision: Of the erased pipeline on the Hub.
        variant: Of its weight files.
        erase_concept: What was erased, for the benchmark's own reports. It changes nothing.
        **unused: Further settings of the benchmark.

    Raises:
        ValueError: The pipeline cannot be loaded, is not as it was written, or takes no prompts, or the precision needs
            another device.
    """

    def __init__(
        self,
        model_id: str,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        batch_size: int = 8,
        resolution: int | None = None,
        prediction_type: str | None = None,
        mixed_precision: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        erase_concept: str | None = None,
        **unused: Any,
    ) -> None:
        erasure = erasure_settings(model_id, revision)
        OutputFolder(model_id).check_digests()
        dtype = {"weights_dtype": erasure.get("weights_dtype") or "float32"}
        held = None
        given = {"sampler": sampler, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
                 "resolution": resolution}  # fmt: skip
        known = {name: erasure[name] if value is None else value for name, value in given.items()
                 if value is not None or name in erasure}  # fmt: skip
        self._autocast = _autocast(mixed_precision or erasure.get("mixed_precision"))
        adapter = find_adapter(model_id, revision)
        place = (model_id, revision, variant)
        if adapter is not None:
            # It has no weights of its own but for a difference to the base model's.
            place = (erasure["pretrained_model_name_or_path"], erasure.get("revision"), erasure.get("variant"))
            held = erasure.get("base_quantization")
        if held is not None:
            check_quantization(held, torch.cuda.is_available())
        pipeline = load_pipeline(*place, kinds=SUPPORTED_PIPELINES, **dtype, base_quantization=held)
        objective = objective_for(pipeline, prediction_type or erasure.get("prediction_type"), **dtype)
        hold_quantized(objective, held)
        self.objective = (objective if adapter is None else with_adapter(objective, adapter)).to(launched().device)
        self.settings = SamplingSettings(**{**self.objective.defaults, **known}, batch_size=batch_size)
        if self.objective.labels is not None:
            raise ValueError(
                f"model_id={model_id} takes classes, not prompts: the benchmark needs a text-to-image model"
            )

    def generate(self, prompts: Sequence[str], seed: int | None = None, **unused: Any) -> list[Image.Image]:
        """Pictures of prompts; the i-th has seed `seed + i` (default: from 0)."""
        first = seed or 0
        with self._autocast():
            samples = self.objective.sample(list(prompts), list(range(first, first + len(prompts))), self.settings)
        return self.objective.decode(samples)


def _autocast(precision: str | None) -> Callable[[], AbstractContextManager]:
    """What to draw in. The benchmark's own accelerate may be in another precision, which is none of ours to change."""
    if precision is None:
        return launched().autocast
    if precision not in _TYPES:
        raise ValueError(f'mixed_precision="{precision}" is not one of {", ".join(_TYPES)}: give one of these')
    device = launched().device.type
    if precision == "fp16" and device != "cuda":
        raise ValueError('mixed_precision="fp16" needs a CUDA device and there is none: give "bf16" or "no"')
    return partial(torch.autocast, device, dtype=_TYPES[precision], enabled=precision != "no")
