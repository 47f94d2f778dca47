"""A model of your own: make a diffusion transformer (DiT) forget a class, by writing one family.

accelerate launch examples/train_dit.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \\
    --concept "golden retriever" --surrogate uniform_noise

Everything else (samples, Fisher information, training, evaluation, flags) is what `train_sa.py` uses. A class is given
by its number or by any of its names.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiTPipeline
from PIL import Image

from sa_diffusers.commands.erase import main
from sa_diffusers.families import Conditions, DiffusionObjective, SamplingSettings, register
from sa_diffusers.families.base import Denoiser, digest_of


@register("DiTPipeline")
class DiTObjective(DiffusionObjective):
    """The objective of a `DiTPipeline`: noise prediction on latents, under a class.

    A DiT predicts a variance beside the noise; that half of its output takes no part in the loss, as in the paper's
    objective. The empty prompt is the null class.
    """

    kind = "diffusion-transformer"
    reduction = "mean"
    fixed_resolution = True
    script = "train_dit.py"

    def __init__(
        self,
        pipeline: DiTPipeline,
        prediction_type: str | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
    ) -> None:
        super().__init__(pipeline.scheduler, prediction_type, snr_gamma, noise_offset)
        self.pipeline = pipeline
        self.module = pipeline.transformer
        self.null = self.module.config.num_embeds_ada_norm
        # The pipeline knows classes by name; two of ImageNet's share "crane", of which one is left without a name.
        synonyms: list[list[str]] = [[] for _ in range(self.null)]
        for name, index in sorted(pipeline.labels.items()):
            synonyms[index].append(name)
        self.labels = [", ".join(names) or f"class {index}" for index, names in enumerate(synonyms)]
        # It would forget the names when it is saved.
        pipeline.register_to_config(id2label={str(index): name for index, name in enumerate(self.labels)})
        for block in self.module.transformer_blocks:
            # It would drop labels at random in training; --condition_dropout does, reproducibly.
            block.norm1.emb.class_embedder.dropout_prob = 0
        pipeline.vae.requires_grad_(False)

    @property
    def resolution(self) -> int:
        return self.module.config.sample_size * 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device | str) -> "DiTObjective":
        self.pipeline.to(device)
        return self

    def fingerprint(self) -> str:
        schedule = repr(sorted(self.noise_schedule.config.items(), key=str))
        return digest_of([self.module, self.pipeline.vae], [schedule])

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        indices = [self.null if prompt == "" else self.labels.index(prompt) for prompt in prompts]
        return {"class_labels": torch.tensor(indices, device=self.device)}

    def denoise(
        self, module: Denoiser, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        output = module(noisy, timestep=timesteps, **conditions, return_dict=False)[0]
        return output[:, : noisy.shape[1]]

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor, seed: int) -> torch.Tensor:
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
        return (posterior.sample(torch.Generator().manual_seed(seed)) * vae.config.scaling_factor).float()

    def rows_of_step(self, settings: SamplingSettings) -> int:
        return 2

    def sample_batch(
        self, prompts: list[str], generators: list[torch.Generator], settings: SamplingSettings
    ) -> torch.Tensor:
        config = self.module.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        scheduler = self.make_sampler(settings.sampler, self.pipeline.scheduler)
        scheduler.set_timesteps(settings.num_inference_steps)
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        latents = latents * scheduler.init_noise_sigma
        # Samplers that draw noise at every step draw it from the images' own seeds.
        options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        labels = self.encode_prompts([*prompts, *[""] * len(prompts)])["class_labels"]
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(latents, timestep)
            both = timestep.expand(2 * len(latents)).to(self.device)
            prediction = self.denoise(self.module, model_input.repeat(2, 1, 1, 1), both, {"class_labels": labels})
            conditional, unconditional = prediction.chunk(2)
            guided = unconditional + settings.guidance_scale * (conditional - unconditional)
            latents = scheduler.step(guided, timestep, latents, **options).prev_sample
        return latents

    @torch.no_grad()
    def decode(self, samples: torch.Tensor) -> list[Image.Image]:
        vae = self.pipeline.vae
        images = [vae.decode((part / vae.config.scaling_factor).to(vae.dtype)).sample for part in samples.split(8)]
        pixels = ((torch.cat(images).float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        return [Image.fromarray(image.cpu().numpy()) for image in pixels]

    def save(self, folder: Path) -> None:
        self.pipeline.save_pretrained(folder)


if __name__ == "__main__":
    main()
