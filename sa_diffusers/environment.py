"""What the machine and the launcher offer a run, and what of it is refused."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from .configuration import SelectiveAmnesiaConfig
from .messages import shown, shown_error
from .processes import RANKS, say
from .quantization import check_quantization

_SUPPORTED_TYPES = (
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU, DistributedType.MULTI_MLU, DistributedType.MULTI_MUSA, DistributedType.MULTI_HPU,
)  # fmt: skip


def create_accelerator(config: SelectiveAmnesiaConfig, output_dir: str | Path | None = None) -> Accelerator:
    """An accelerator as the configuration asks for.

    Raises:
        ValueError: The hardware or a package that a flag needs is missing, or the environment asks for processes,
            sharding or accumulation otherwise than is in use.
    """
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        ProjectConfiguration,
    )

    has_cuda = torch.cuda.is_available()
    if config.precision == "fp16" and not has_cuda:
        if config.mixed_precision is None:
            raise ValueError('weights_dtype="float16" needs a CUDA device and there is none: use "bfloat16"')
        raise ValueError('mixed_precision="fp16" needs a CUDA device and there is none: use "bf16" or "no"')
    if config.base_quantization is not None:
        check_quantization(config.base_quantization, has_cuda)
    if config.allow_tf32:
        if not has_cuda:
            raise ValueError("allow_tf32 needs a CUDA device and there is none: leave the flag out")
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if config.use_8bit_adam:
        check_8bit_adam("cuda" if has_cuda else "cpu")
    tracker = None if output_dir is None else chosen_tracker(config.report_to)
    _check_environment(config)
    project = ProjectConfiguration(
        project_dir=str(output_dir) if output_dir else None,
        logging_dir=str(Path(output_dir) / config.logging_dir) if output_dir else None,
    )
    return launched(
        config.precision,
        log_with=tracker,
        project_config=project,
        # The trainer divides; the environment's ACCELERATE_GRADIENT_ACCUMULATION_STEPS would divide again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Buckets that are rebuilt after the first step would sum in another order than those of a resumed run.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def chosen_tracker(report_to: str | None) -> str | None:
    """The tracker to use: the one asked for, or TensorBoard where none is and it is installed.

    Raises:
        ValueError: Its package is not installed, or it needs a key and has none.
    """
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    if report_to == "none":
        return None
    if report_to is None and not is_tensorboard_available():
        if os.environ.get("RANK", "0") == "0":
            say("losses are not tracked: pip install tensorboard, or give --report_to none")
        return None
    tracker = report_to or "tensorboard"
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if not available[tracker]():
        raise ValueError(f'report_to="{tracker}" needs the package {tracker}: pip install {tracker}, or use "none"')
    if tracker == "wandb":
        _check_wandb_key()
    return tracker


def tracked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, truth values and texts; anything else as JSON writes it."""
    return {name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for name, value in settings.items()}  # fmt: skip


def launched(mixed_precision: str | None = None, **options: Any) -> Accelerator:
    """An accelerator that joins the processes that the launcher has started, all of them.

    Args:
        mixed_precision: `"no"`, `"fp16"`, `"bf16"`; None is as `accelerate config` says.
        **options: Further arguments of `Accelerator`.

    Raises:
        ValueError: The environment asks for processes or sharding otherwise than is in use.
    """
    _check_launcher()
    accelerator = Accelerator(
        # Without it two processes on a machine that has no accelerator do not find each other.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        **options,
    )
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE={processes} in the environment, but {accelerator.num_processes} in use: launch with torchrun "
            "or `accelerate launch --multi_gpu --num_processes N`, or unset WORLD_SIZE"
        )
    if accelerator.distributed_type not in _SUPPORTED_TYPES:
        raise ValueError(
            f"{accelerator.distributed_type.value} shards the model, which is not supported: launch with "
            "`accelerate launch --multi_gpu`, or on one device"
        )
    return accelerator


def _check_environment(config: SelectiveAmnesiaConfig) -> None:
    """Refuse what the environment asks for and nobody would get."""
    given = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if given and given not in ("1", str(config.gradient_accumulation_steps)):
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={given} in the environment differs from "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}: give --gradient_accumulation_steps "
            f"{given}, or unset the variable"
        )


def _check_launcher() -> None:
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
                           ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):  # fmt: skip
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"{name} is asked for ({variable}), and sharded parameters are not supported: launch without it, as "
                "with `accelerate launch --multi_gpu`, or unset the variable"
            )
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if (value := os.environ.get(name)) and not re.fullmatch(r"-?\d+", value):
            raise ValueError(
                f"{name}={shown(value)} is in the environment, which is no whole number: launch with torchrun or "
                f"`accelerate launch`, or unset {name}"
            )
    if os.environ.get("MASTER_ADDR") and not any(os.environ.get(name) for name in RANKS):
        raise ValueError(
            "MASTER_ADDR is in the environment, so several processes are wanted, but no RANK says which this one is: "
            "launch with torchrun or `accelerate launch --multi_gpu --num_processes N` (on a machine without a GPU "
            "too), or unset MASTER_ADDR"
        )
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not any(os.environ.get(name) for name in RANKS):
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is in the environment, but no RANK says which process this one is: "
            "launch with torchrun or `accelerate launch --multi_gpu --num_processes N`, or unset WORLD_SIZE"
        )


def _check_wandb_key() -> None:
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return
    try:
        has_key = wandb.login(prompt=False)
    except TypeError:  # an older wandb
        has_key = bool(wandb.api.api_key)
    if not has_key:
        raise ValueError(
            'report_to="wandb" needs a key: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline'
        )


def import_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or leave the flag out") from None
    return bitsandbytes


def check_8bit_adam(device: str) -> None:
    """Let bitsandbytes take a step: what it cannot do on a device, it says then.

    Raises:
        ValueError: It is not installed, or does not work here.
    """
    optimizers = import_bitsandbytes().optim
    # Of fewer numbers it keeps no state in 8 bits.
    parameter = torch.nn.Parameter(torch.zeros(8192, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizers.AdamW8bit([parameter], lr=1e-3).step()
    except Exception as error:  # of whatever kind its kernels' errors are
        raise ValueError(
            f"use_8bit_adam: bitsandbytes has no 8-bit Adam for this {device} device ({shown_error(error)}): install "
            "its newest version, or leave the flag out"
        ) from error


def precision_in_use(accelerator: Accelerator) -> str:
    """The precision that forward passes run in: what was asked for, what `accelerate config` says, or TF32."""
    tf32 = torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32
    return f"{accelerator.mixed_precision}+tf32" if tf32 else str(accelerator.mixed_precision)
