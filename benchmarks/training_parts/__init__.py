"""What the training scripts of the shipped text-to-image pipelines share: `train_embedded.py`, `train_coloured.py`."""

import gzip
import importlib.util
import random
import textwrap
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VOCABULARY_SIZE = 4096
MAX_TOKENS = 32


def one_cycle(parameters, learning_rate: float, steps: int, weight_decay: float = 0.01):
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    return optimizer, schedule


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Give each latent channel mean 0 and variance 1, by folding the change into the 1x1 convolutions around it.

    Diffusion treats all channels alike; a scaling factor alone would leave weak channels under the noise.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    after, before = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    after.bias[:channels] -= mean
    after.weight[:channels] /= deviation[:, None, None, None]
    after.bias[:channels] /= deviation
    after.bias[channels:] -= 2 * deviation.log()
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight *= deviation[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(500)])


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's own byte-pair vocabulary, cut to its most frequent merges and those that the captions need."""
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    with gzip.open(package / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    alphabet = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # GPT-2's byte alphabet: printable bytes stand for themselves, the others for code points from 256 on.
    symbols = [chr(byte) for byte in alphabet] + [chr(256 + n) for n in range(256 - len(alphabet))]
    symbols += [symbol + "</w>" for symbol in symbols]

    def tokenizer(kept: list[tuple[str, str]]) -> CLIPTokenizer:
        tokens = [*symbols, *("".join(pair) for pair in kept), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        return CLIPTokenizer(vocab=vocabulary, merges=kept, model_max_length=MAX_TOKENS)

    whole = tokenizer(merges)
    by_result = {"".join(pair): pair for pair in reversed(merges)}
    needed: set[tuple[str, str]] = set()
    pending = [token for caption in captions for token in whole.tokenize(caption)]
    while pending:
        pair = by_result.get(pending.pop())
        if pair is not None and pair not in needed:
            needed.add(pair)
            pending.extend(pair)
    room = VOCABULARY_SIZE - len(symbols) - 2 - len(needed)
    frequent = [pair for pair in merges if pair not in needed][:room]
    kept = needed.union(frequent)
    return tokenizer([pair for pair in merges if pair in kept])


class CaptionSampler:
    """Token ids of random captions; in some of them foreign tokens stand around a name.

    They teach the text encoder to find the name in phrasings it has never seen. Subclasses draw the captions.

    Args:
        tokenizer: What reads them.
        seed: Of all draws.
        names: Phrases whose tokens are never used as foreign ones.
    """

    def __init__(self, tokenizer: CLIPTokenizer, seed: int, names: list[str]):
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        reserved = {token for name in names for token in self.read(name)} | {self.bos, self.eos}
        self.foreign = [token for token in range(len(tokenizer)) if token not in reserved]

    def read(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def strange(self, most: int) -> list[int]:
        """Up to so many foreign tokens."""
        return self.random.choices(self.foreign, k=self.random.randint(0, most))

    def padded(self, ids: list[int]) -> list[int]:
        ids = [self.bos, *ids[: MAX_TOKENS - 2], self.eos]
        return ids + [self.eos] * (MAX_TOKENS - len(ids))


def small_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def small_unet(latent_channels: int, width: float = 1.0) -> UNet2DConditionModel:
    """For latents of 8x8; its channels times `width`."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=1,
        block_out_channels=(int(64 * width), int(96 * width)),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def noise_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def save_text_to_image(folder: Path, vae, text_encoder, tokenizer, unet, scheduler) -> None:
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)


def pictures_of(images: torch.Tensor) -> list[Image.Image]:
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in pixels.numpy()]


def markdown_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def wrap(card: str) -> str:
    """Wrap a card's prose; metadata, headings and tables stay as they are."""
    paragraphs = card.split("\n\n")
    return "\n\n".join(
        part if part.startswith(("---", "#", "|")) else textwrap.fill(part, 120) + "\n" * part.endswith("\n")
        for part in paragraphs
    )
