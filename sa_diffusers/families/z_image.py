"""Z-Image: one stream of text and image with one set of weights, whose time runs the other way."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import ZImagePipeline

from .base import Conditions, Denoiser, SamplingSettings
from .flow import TransformerObjective
from .registry import register

# A prompt and what the chat template puts around it are read as so many tokens.
_READ = 512
# Tokens that the template puts before a prompt: start, role, new line.
_BEFORE = 3


@register(
    "ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "ZImageControlNetPipeline",
    "ZImageControlNetInpaintPipeline",
)  # fmt: skip
class ZImageObjective(TransformerObjective):
    """The objective of a `ZImagePipeline`.

    Samples are latents `[batch, 16, height / 8, width / 8]`, the most likely of an image. Conditions are the hidden
    states of Qwen3, `[batch, 512, 2560]`, and which of them are there, `[batch, 512]`.

    The transformer takes lists of latents with an axis of frames and of texts as long as they are, the time from noise
    (0) to sample (1), and gives the velocity with its sign turned: all of it stays in `denoise`. Its pipeline adds
    `guidance_scale` times what guidance changes; the settings' guidance is the usual one, larger by 1.

    Timesteps are uniform, through the scheduler's static shift, and weighted alike, as in diffusers' script. Text and
    image share the weights of all layers but the first few, so that what layers do to the text alone cannot be
    selected: `"xattn"` trains what sees the text alone (the embedding of captions and `context_refiner`), `"noxattn"`
    what sees the image alone (the patches and `noise_refiner`).

    Args:
        pipeline: The frozen pipeline. Its transformer becomes the trainable module.
        settings: None of those of `Family.from_pipeline` has a meaning here.

    Raises:
        ValueError: As `FlowObjective`.
    """

    kind = "z-image"
    title = "Z-Image"
    sampled_by = ZImagePipeline
    read_tokens = {"tokenizer": _READ - _BEFORE}
    lengths = ("mask",)
    takes_mode = True
    undistilled = "Tongyi-MAI/Z-Image"
    defaults = {"sampler": "flow_euler", "num_inference_steps": 50, "guidance_scale": 6.0}
    selections = {
        "xattn": r"^(cap_embedder|cap_pad_token|context_refiner)\b",
        "noxattn": r"^(all_x_embedder|x_pad_token|noise_refiner)\b",
        "image_kv": r"^(noise_refiner|layers)\.\d+\.attention\.to_[kv]\.",
        "attention": r"\.attention\.to_",
        "text_embedding": r"^cap_embedder\.",
    }

    @classmethod
    def why_distilled(cls, read: Callable[[str | None], Mapping[str, Any]]) -> tuple[str, str] | None:
        if read("scheduler").get("shift") == 3:
            return "its scheduler's shift is 3, as that of Z-Image-Turbo; the base's is 6", "Z-Image-Turbo"
        return None

    @property
    def resolution(self) -> int:
        # Nothing in its configurations says it.
        return 1024

    def encode(self, prompts: list[str]) -> Conditions:
        # The pipeline writes the template into the list that it is given.
        texts, _ = self.pipeline.encode_prompt([*prompts], self.device, do_classifier_free_guidance=False)
        hidden = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, _READ - len(text))) for text in texts])
        places = torch.arange(_READ, device=hidden.device)
        lengths = torch.tensor([len(text) for text in texts], device=hidden.device)
        return {"encoder_hidden_states": hidden, "mask": places < lengths[:, None]}

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        times = self.path.times.to(noisy.device)[timesteps]
        frames = list(noisy.contiguous().unsqueeze(2).unbind())
        turned = module(frames, (1000 - times) / 1000, _texts(conditions), return_dict=False)[0]
        return -torch.stack(turned).squeeze(2)

    def call(self, prompts: list[str], settings: SamplingSettings) -> dict[str, Any]:
        said = {"prompt_embeds": _texts(self.encode_prompts(prompts)), "guidance_scale": settings.guidance_scale - 1}
        if settings.guidance_scale > 1:
            said["negative_prompt_embeds"] = _texts(self.encode_prompts([""] * len(prompts)))
        return said


def _texts(conditions: Conditions) -> list[torch.Tensor]:
    """Hidden states of each text, as many as it has."""
    rows = zip(conditions["encoder_hidden_states"], conditions["mask"].bool(), strict=True)
    return [hidden[there] for hidden, there in rows]
