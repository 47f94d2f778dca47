"""How many images fit into free memory, and what to do where they did not."""

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..families import Objective, SamplingSettings

MAX_BATCH_SIZE = 64
_SHARE = 0.7
# Activations of a denoiser on a CPU, guidance included, for each pixel of an image: measured on Stable Diffusion's UNet
# they are below this.
_CPU_BYTES_PER_PIXEL = 16_000
Result = TypeVar("Result")


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
        free = psutil.virtual_memory().available
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


def in_batches(items: Sequence[Any] | torch.Tensor, batch_size: int, function: Callable[[Any], Result]) -> list[Result]:
    """Call a function on one batch after the other; where memory runs out, the batch is halved and it goes on.

    Args:
        items: What can be sliced.
        batch_size: Items of a batch, at least 1.
        function: Of a batch. It is called again with half of a batch that did not fit, so it must keep nothing.

    Returns:
        Its results, in order: one for each batch that fitted.

    Raises:
        RuntimeError: A single item does not fit.
    """
    results: list[Result] = []
    start, size, warned = 0, batch_size, False
    while start < len(items):
        try:
            results.append(function(items[start : start + size]))
        except RuntimeError as error:
            size = min(size, len(items) - start)
            if size == 1 or not should_reduce_batch_size(error):
                raise
            size //= 2
        else:
            start += size
            continue
        # Outside of the handler, where the error no longer holds what the batch had taken.
        gc.collect()
        clear_device_cache()
        if not warned:
            warnings.warn(f"{2 * size} images do not fit into memory at once: going on with {size}", stacklevel=2)
            warned = True
    return results
