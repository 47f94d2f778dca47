"""A family of models that the package does not know: text to pixels, without an autoencoder. This one file adds it."""

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor

from sa_diffusers.families import DiffusionObjective, PixelPath, TextEncoder, register
from sa_diffusers.families.base import digest_of


class PixelTextPipeline(DiffusionPipeline):
    def __init__(self, unet, text_encoder, tokenizer, scheduler):
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def embed(self, prompts):
        words = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(words.input_ids.to(self.unet.device)).last_hidden_state

    @torch.no_grad()
    def __call__(self, prompts, num_inference_steps=50, guidance_scale=7.5, generator=None, output_type="pil"):
        hidden, empty = self.embed(prompts), self.embed([""] * len(prompts))
        size = self.unet.config.sample_size
        pixels = torch.stack([torch.randn(3, size, size, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for step in self.scheduler.timesteps:
            without, under = (self.unet(pixels, step, words).sample for words in (empty, hidden))
            pixels = self.scheduler.step(without + guidance_scale * (under - without), step, pixels).prev_sample
        images = pixels if output_type == "latent" else self.image_processor.postprocess(pixels)
        return ImagePipelineOutput(images=images)


@register("PixelTextPipeline")
class PixelTextObjective(DiffusionObjective):
    kind = "pixel-text"
    reduction = "mean"
    path_class = PixelPath
    fixed_resolution = True
    own_pipeline = PixelTextPipeline
    selections = {"xattn": r"attn2\.to_[kv]"}

    def __init__(self, pipeline, *settings):
        super().__init__(pipeline.scheduler, *settings)
        self.pipeline = pipeline
        self.module = pipeline.unet
        pipeline.text_encoder.requires_grad_(False)

    @property
    def resolution(self):
        return self.module.config.sample_size

    def to(self, device):
        self.pipeline.to(device)
        return self

    def fingerprint(self):
        return digest_of([self.module, self.pipeline.text_encoder], [self.prediction_type])

    def encode_prompts(self, prompts):
        return {"encoder_hidden_states": self.pipeline.embed(prompts)}

    def text_encoders(self):
        return [TextEncoder(self.pipeline.tokenizer, self.pipeline.text_encoder)]

    def encode_images(self, images, seed):
        return images.float()

    def sample_batch(self, prompts, generators, settings):
        scheduler = self.make_sampler(settings.sampler, self.pipeline.scheduler)
        sampler = PixelTextPipeline(self.module, self.pipeline.text_encoder, self.pipeline.tokenizer, scheduler)
        return sampler(prompts, settings.num_inference_steps, settings.guidance_scale, generators, "latent").images

    def decode(self, samples):
        return self.pipeline.image_processor.postprocess(samples.float())

    def save(self, folder):
        self.save_with_own_scheduler(self.pipeline, folder)


def build(text_encoder, tokenizer):
    """A tiny model of the family, randomly initialised."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    return PixelTextPipeline(unet, text_encoder, tokenizer, DDIMScheduler(clip_sample=False))
