"""How many images fit into free memory."""

import os
from dataclasses import replace

import torch

from ..objectives import Objective, SamplingSettings

MAX_BATCH_SIZE = 64
_SHARE = 0.7
# Activations of a denoiser on a CPU, guidance included, for each pixel of an image: measured on Stable Diffusion's UNet
# they are below this.
_CPU_BYTES_PER_PIXEL = 16_000


def batch_size_for(objective: Objective, settings: SamplingSettings, prompt: str) -> SamplingSettings:
    """The settings with the largest batch that fits, a power of two up to 64.

    On a GPU two images are drawn to see what each takes; on a CPU it is reckoned from their size.

    Args:
        objective: The model, where it will draw.
        settings: How images are drawn; their batch size is replaced.
        prompt: Any prompt (or class) of the model.
    """
    device = objective.device
    side = settings.resolution or objective.resolution
    if device.type != "cuda":
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return replace(settings, batch_size=_power_of_two(_SHARE * free / (_CPU_BYTES_PER_PIXEL * side * side)))
    peaks = []
    for count in (1, 2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        probe = replace(settings, num_inference_steps=2, batch_size=count)
        objective.decode(objective.sample([prompt] * count, list(range(count)), probe))
        peaks.append(torch.cuda.max_memory_allocated(device))
    each = max(peaks[1] - peaks[0], 1)
    free, _ = torch.cuda.mem_get_info(device)
    return replace(settings, batch_size=_power_of_two(_SHARE * free / each))


def _power_of_two(limit: float) -> int:
    size = 1
    while 2 * size <= min(limit, MAX_BATCH_SIZE):
        size *= 2
    return size
