"""What all models of rectified flow share: their path, and sampling by the noise of their own scheduler."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from ..messages import shown
from .base import Conditions
from .paths import FlowPath
from .samplers import check_flow_scheduler, is_of_flow, sampler_class, scheduler_of, shift_name
from .scheduled import ScheduledObjective
from .text_to_image import TextToImageObjective

_JOINT = r"^transformer_blocks\.\d+\.attn\."
# Of transformers with a stream of text and one of images, and single blocks behind them or none; all but the first are
# what peers train. A family adds the image's stream (`noxattn`) and what embeds the text (`text_embedding`).
JOINT_SELECTIONS = {
    "xattn": _JOINT + r"(add_[qkv]_proj|to_add_out|norm_added_[qk])\.",
    "text_qk": _JOINT + r"add_[qk]_proj\.",
    "joint_kv": _JOINT + r"(to_[kv]|add_[kv]_proj)\.",
    "image_kv": r"^(single_)?transformer_blocks\.\d+\.attn\.to_[kv]\.",
    "attention": r"\.attn2?\.(to|add)_",
}


class FlowObjective(ScheduledObjective):
    """The (reweighted) ELBO of a model of rectified flow; `FlowPath` says which it is.

    Args:
        scheduler: The model's own; its table of noise is that of the training.
        prediction_type: None, as the next two: they have no meaning here.

    Attributes:
        density: Of timesteps, as of `FlowPath`.
        weighting: Of their terms, as of `FlowPath`.
        samplers: Those that its pipeline can be sampled by; most pipelines name the steps themselves, which few take.

    Raises:
        ValueError: A setting has no meaning, or as of `FlowPath`.
    """

    density = "uniform"
    weighting: str | None = None
    samplers: Sequence[str] = ("flow_euler",)
    defaults = {"sampler": "flow_euler"}

    def __init__(
        self,
        scheduler: SchedulerMixin,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        settings = {"prediction_type": prediction_type, "snr_gamma": snr_gamma, "noise_offset": noise_offset}
        for name, value in settings.items():
            if value:
                raise ValueError(f"{name}={value} has no meaning for a model of rectified flow: leave it out")
        self.path = FlowPath(scheduler, self.density, self.weighting)

    @classmethod
    def check_parts(cls, place: str, parts: Mapping[str, list], read: Callable[[str], Mapping[str, Any]]) -> None:
        if "scheduler" in parts:
            check_flow_scheduler(str(parts["scheduler"][1]), read("scheduler"))

    def make_sampler(self, name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
        kind, options = sampler_class(name)
        able = ", ".join(self.samplers)
        if not is_of_flow(kind, options):
            raise ValueError(f'sampler="{name}" is not for models of rectified flow, as this one is: use one of {able}')
        if name not in self.samplers:
            raise ValueError(f'sampler="{name}" takes no steps from this model\'s pipeline: use one of {able}')
        shift = scheduler.config[shift_name(type(scheduler))]
        return scheduler_of(kind, scheduler, **options, **{shift_name(kind): shift})

    def set_steps(self, sampler: SchedulerMixin, steps: int) -> None:
        # A shift that goes by the resolution changes where the steps are, not how many.
        shifted = {"mu": 1.0} if sampler.config.get("use_dynamic_shifting") else {}
        with np.errstate(invalid="ignore"):
            sampler.set_timesteps(steps, **shifted)
        if not sampler.sigmas.isfinite().all():
            raise ValueError("its shift_terminal asks for a step between the first and the last")


class TransformerObjective(TextToImageObjective, FlowObjective):
    """What the text-to-image transformers of rectified flow share: patches of two by two latents.

    Attributes:
        packed: How many latents' channels stand in one of the transformer's places.
    """

    denoiser = "transformer"
    packed = 1
    # Attention, as in diffusers' scripts.
    adapted = r"\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\.weight$"

    @classmethod
    def check_parts(cls, place: str, parts: Mapping[str, list], read: Callable[[str], Mapping[str, Any]]) -> None:
        super().check_parts(place, parts, read)
        vae, taken = read("vae"), read("transformer").get("in_channels")
        made = cls.packed * vae.get("latent_channels", vae.get("z_dim", 16))
        if taken != made:
            raise ValueError(
                f"{place}: its transformer takes {shown(taken)} channels, its autoencoder makes {shown(made)}: "
                "models that fill in, edit or follow outlines are not supported, give the text-to-image model that it "
                "came from"
            )

    @property
    def resolution(self) -> int:
        side = getattr(self.pipeline, "default_sample_size", None) or self.module.config.sample_size
        return side * self.pipeline.vae_scale_factor

    @property
    def multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 16) -> Conditions:
        # T5 overflows in fp16; and what is trained under is to be what is sampled under.
        # There is none on `meta`, where shapes are found out.
        kind = self.device.type if self.device.type != "meta" else "cpu"
        with torch.autocast(kind, enabled=False):
            return super().encode_prompts(prompts, batch_size)
