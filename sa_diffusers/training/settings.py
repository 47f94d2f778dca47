"""From the configuration to the parts of a training, and to what its weights depend on."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from ..configuration import SelectiveAmnesiaConfig
from ..environment import import_bitsandbytes, precision_in_use
from ..families.base import SamplingSettings
from ..identity import Identity

# What the trained weights depend on, beside their samples, the Fisher information and the base model.
TRAINING_SETTINGS = (
    "train_method", "ewc_weight", "replay_weight", "replay_surrogates", "seed", "max_train_steps", "target",
    "condition_dropout", "naive", "snr_gamma", "noise_offset", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles",
    "lr_power", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
    "use_ema", "ema_decay", "ema_warmup",
)  # fmt: skip


def global_batch(config: SelectiveAmnesiaConfig, processes: int) -> int:
    """Surrogate samples, and replay samples, of one optimiser step over all processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * processes


def settings_facts(config: SelectiveAmnesiaConfig, processes: int) -> dict[str, Any]:
    """What the trained weights depend on, as far as it is a setting of the training."""
    batch = global_batch(config, processes)
    return {
        **{name: getattr(config, name) for name in TRAINING_SETTINGS},
        "global_batch": batch,
        "learning_rate": config.learning_rate * (batch if config.scale_lr else 1),
    }


def training_identity(config: SelectiveAmnesiaConfig, accelerator: Accelerator, given: Mapping[str, Any]) -> Identity:
    """What trained weights depend on.

    Args:
        config: The settings.
        accelerator: Processes and precision in use.
        given: Digests of the base model, the samples and the Fisher information.
    """
    facts = {**settings_facts(config, accelerator.num_processes), **given, "precision": precision_in_use(accelerator)}
    return Identity("training", facts)


def sampling_settings(config: SelectiveAmnesiaConfig, guidance_scale: float | None = None) -> SamplingSettings:
    """The configuration's sampler; `guidance_scale` overrides its guidance."""
    return SamplingSettings(
        sampler=config.sampler,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        batch_size=config.sample_batch_size,
        resolution=config.resolution,
    )


def make_optimizer(
    config: SelectiveAmnesiaConfig, parameters: Iterable[nn.Parameter], processes: int
) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit form."""
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW
    if config.use_8bit_adam:
        kind = import_bitsandbytes().optim.AdamW8bit
    return kind(
        list(parameters),
        lr=settings_facts(config, processes)["learning_rate"],
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def make_average(config: SelectiveAmnesiaConfig, parameters: Iterable[nn.Parameter]) -> EMAModel | None:
    """The average of the weights, if there is to be one."""
    if not config.use_ema:
        return None
    if config.ema_warmup:
        return EMAModel(list(parameters), decay=config.ema_decay)
    # One decay from the first step on: the average that the base model's weights are is continued.
    return EMAModel(list(parameters), decay=config.ema_decay, min_decay=config.ema_decay, update_after_step=-1)
