"""From the configuration to the parts of a training, and to what its weights depend on."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from prodigyopt import Prodigy
from torch import nn

from ..configuration import SelectiveAmnesiaConfig
from ..environment import import_bitsandbytes, precision_in_use
from ..families.adapters import AdapterLayers, adapter_layers, check_kohya, check_takes_adapters
from ..families.base import Objective, SamplingSettings
from ..identity import Identity

# What the trained weights depend on, beside their samples, the Fisher information and the base model.
TRAINING_SETTINGS = (
    "ewc", "forget_target", "drift_tolerance", "num_probe_images", "train_method", "ewc_weight",
    "replay_weight", "replay_surrogates", "seed", "max_train_steps", "target",
    "condition_dropout", "naive", "timestep_draws", "snr_gamma", "noise_offset", "lr_scheduler", "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm",
    "use_ema", "ema_decay", "ema_warmup", "save_components", "fisher_dtype",
)  # fmt: skip
ADAPTER_SETTINGS = ("adapter", "lora_rank", "fisher_form")
_DROPPED = 0.2
_PARTS_OF_A_RUN = 10
_PART_OF_A_SHORT_RUN = 25


def global_batch(config: SelectiveAmnesiaConfig, processes: int) -> int:
    """Surrogate samples, and replay samples, of one optimiser step over all processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * processes


def settings_facts(config: SelectiveAmnesiaConfig, processes: int) -> dict[str, Any]:
    """What the trained weights depend on, as far as it is a setting of the training."""
    batch = global_batch(config, processes)
    # What decides on the check before the training stops; folders move.
    scored = config.classifier and os.path.basename(os.path.normpath(config.classifier)) if config.stops else None
    # Without an adapter its settings mean nothing, and weights of earlier versions knew none.
    adapter = {name: getattr(config, name) for name in ADAPTER_SETTINGS} if config.adapter else {}
    if config.base_quantization is not None:
        adapter["base_quantization"] = config.base_quantization
    return {
        **{name: getattr(config, name) for name in TRAINING_SETTINGS},
        **adapter,
        "classifier": scored,
        "global_batch": batch,
        "learning_rate": config.learning_rate and config.learning_rate * (batch if config.scale_lr else 1),
    }


def dropped_conditions(config: SelectiveAmnesiaConfig, objective: Objective) -> float:
    """The share of conditions that are dropped; by default guidance's own empty prompt is taught along."""
    if config.condition_dropout is not None:
        return config.condition_dropout
    return _DROPPED if objective.unconditional else 0.0


def part_of_a_run(config: SelectiveAmnesiaConfig) -> int:
    """Steps that a kill may cost at the most, where a checkpoint is cheap or some minutes have passed: a tenth of the
    training, of which a run that stops by itself knows only that it will be short."""
    part = max(1, config.max_train_steps // _PARTS_OF_A_RUN)
    return min(part, _PART_OF_A_SHORT_RUN) if config.stops else part


def fixed_replay_weight(config: SelectiveAmnesiaConfig) -> float:
    """The weight of the replay loss where nothing balances it."""
    return 1.0 if config.replay_weight is None else config.replay_weight


def training_identity(config: SelectiveAmnesiaConfig, accelerator: Accelerator, given: Mapping[str, Any]) -> Identity:
    """What trained weights depend on.

    Args:
        config: The settings.
        accelerator: Processes and precision in use.
        given: Digests of the base model, the samples and the Fisher information.
    """
    facts = {**settings_facts(config, accelerator.num_processes), **given, "precision": precision_in_use(accelerator)}
    return Identity("training", facts)


def adapted_layers(config: SelectiveAmnesiaConfig, objective: Objective) -> AdapterLayers | None:
    """The layers of a model that an adapter is trained on; None where its own weights are.

    Raises:
        ValueError: The model takes no adapter, no selected layer does, or the wished format cannot hold it.
    """
    if config.adapter is None:
        return None
    check_takes_adapters(objective)
    layers = adapter_layers(objective.module, objective.select(config.train_method))
    highest = max(map(min, layers.sizes.values()))
    if config.lora_rank > highest:
        raise ValueError(
            f"lora_rank={config.lora_rank}: no update of the {len(layers.sizes)} selected layers has a higher rank "
            f"than {highest}, the most that one of them has of both rows and columns: give at most that"
        )
    if config.lora_format == "kohya":
        check_kohya(objective, layers.sizes, config.lora_rank)
    return layers


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
    """AdamW, or its 8-bit form, at a learning rate that is given; else Prodigy, which finds one (Mishchenko and
    Defazio, 2024)."""
    if config.learning_rate is None:
        return Prodigy(
            list(parameters), betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )  # fmt: skip
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


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that the next step has, Prodigy's own estimate included."""
    group = optimizer.param_groups[0]
    return group["lr"] * group.get("d", 1.0)


def restart_optimizer(optimizer: torch.optim.Optimizer, rate: float | None) -> None:
    """Let an optimiser forget its steps; Prodigy begins at the learning rate that it has found."""
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.state.clear()
    for group in inner.param_groups:
        if rate is not None and "d" in group:
            group.update(d=rate, d0=rate, d_max=rate, d_numerator=0.0, k=0)


def set_pace(optimizer: torch.optim.Optimizer, pace: float) -> None:
    """Let the next step be so many times as long as Prodigy's own estimate."""
    for group in optimizer.param_groups:
        group["lr"] = pace


def make_average(config: SelectiveAmnesiaConfig, parameters: Iterable[nn.Parameter]) -> EMAModel | None:
    """The average of the weights, if there is to be one."""
    if not config.use_ema:
        return None
    if config.ema_warmup:
        return EMAModel(list(parameters), decay=config.ema_decay)
    # One decay from the first step on: the average that the base model's weights are is continued.
    return EMAModel(list(parameters), decay=config.ema_decay, min_decay=config.ema_decay, update_after_step=-1)
