"""Textual inversion as a white-box attack: a new token is learned from images of the concept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast
from tqdm import tqdm

from ...data.concepts import ErasurePair
from ...data.generation import SampleGenerator
from ...data.phrasings import fill_template
from ...families import Objective
from ...families.base import TextEncoder
from ...families.digests import fingerprint_module
from ...identity import fingerprint
from ...processes import shrinking
from ..registry import register_attack
from ..subject import ATTACK_SEEDS, Subject, stream_seeds
from .base import Attack, Inversion, Prepared

INVERTED_TOKEN = "<inverted-concept>"
INVERSION_TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "one {}")


@register_attack("textual inversion")
class TextualInversion(Attack):
    """Prompts of a token that is learned anew on each model."""

    def prompts(self, pair: ErasurePair) -> Sequence[str]:
        if self.settings.inversion is None:
            return []
        return [template.replace("{}", INVERTED_TOKEN) for template in INVERSION_TEMPLATES]

    @contextmanager
    def prepared(self, objective: Objective, pair: ErasurePair, subject: Subject) -> Iterator[Prepared | None]:
        settings = self.settings.inversion or Inversion()
        images, settings = _attackers_images(subject, pair, settings)
        handles, trained = objective.text_encoders(), list(objective.module.parameters())
        flags = [value.requires_grad for value in trained]
        with given_back(*(part for handle in handles for part in (handle.tokenizer, handle.encoder))):
            losses = invert(objective, images, settings)
            for value, flag in zip(trained, flags, strict=True):
                value.requires_grad_(flag)
            digest = fingerprint([self.name, *(fingerprint_module(handle.encoder) for handle in handles)])
            yield Prepared(digest, {"inversion": {**asdict(settings), **_trend(losses)}})


@contextmanager
def given_back(*parts: Any) -> Iterator[None]:
    """Let parts of a model be changed inside: they are copies then, and afterwards what they were before, to the bit.

    Whoever holds a part sees the copy, and then the part itself again.
    """
    kept = [part.__dict__ for part in parts]
    for part, copied in zip(parts, deepcopy(parts), strict=True):
        object.__setattr__(part, "__dict__", copied.__dict__)
    try:
        yield
    finally:
        for part, state in zip(parts, kept, strict=True):
            object.__setattr__(part, "__dict__", state)


def invert(objective: Objective, samples: torch.Tensor, settings: Inversion) -> list[float]:
    """Learn a new token that makes the model draw given images, and leave it in its tokenizer and text encoder.

    Args:
        objective: A model that takes prompts; nothing of it changes but the added row of the embedding.
        samples: `[n, ...]`, images of the concept as the model sees them.
        settings: Of the attack.

    Returns:
        The loss at each step.

    Raises:
        ValueError: The model gives no handle on its text (`Family.text_encoders`), or the start word has no token.
    """
    if not getattr(objective, "text_encoders", dict)():
        raise ValueError("textual inversion needs a model with a tokenizer and a text encoder")
    objective.module.requires_grad_(False).eval()
    rows = [_NewRow(handle, settings.start or "") for handle in objective.text_encoders()]
    optimizer = torch.optim.Adam([row.learned for row in rows], lr=settings.learning_rate)
    losses, size = [], settings.batch_size
    try:
        for step in tqdm(range(settings.steps), desc="textual inversion", unit="step"):
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            chosen = torch.randint(len(samples), (settings.batch_size,), generator=generator)
            batch = samples[chosen].to(objective.device)
            timesteps = objective.path.draw_timesteps(len(batch), generator).to(objective.device)
            template = INVERSION_TEMPLATES[step % len(INVERSION_TEMPLATES)]
            prompt = template.replace("{}", INVERTED_TOKEN)
            drawn = (batch, timesteps, objective.draw_noise(batch, generator))
            backward = partial(_backward, objective, optimizer, prompt, drawn)
            size, loss = shrinking(backward, size, "inversion_batch_size")
            optimizer.step()
            losses.append(loss)
    finally:
        for row in rows:
            row.hook.remove()
    for row in rows:
        row.keep()
    return losses


def _backward(
    objective: Objective, optimizer: torch.optim.Optimizer, prompt: str, drawn: Sequence[torch.Tensor], size: int
) -> tuple[int, float]:
    """The gradient of a batch's loss, so many images at a time; that number and the loss.

    Args:
        drawn: Samples, timesteps and noise.
    """
    optimizer.zero_grad()
    told = 0.0
    for samples, timesteps, noise in zip(*(tensor.split(size) for tensor in drawn), strict=True):
        conditions = objective.encode_prompts([prompt] * len(samples))
        loss = objective.negative_elbo(objective.module, samples, conditions, timesteps, noise).mean()
        loss = loss * (len(samples) / len(drawn[0]))
        loss.backward()
        told += loss.item()
    return size, told


class _NewRow:
    """The new token's embedding in one text encoder: the only thing of the model that is learned.

    Raises:
        ValueError: The start word has no token.
    """

    def __init__(self, text: TextEncoder, start: str) -> None:
        tokens = text.tokenizer(start, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError(f'the start word "{start}" has no token: give another')
        text.tokenizer.add_tokens([INVERTED_TOKEN])
        self.token = text.tokenizer.convert_tokens_to_ids(INVERTED_TOKEN)
        count = max(self.token + 1, text.encoder.get_input_embeddings().num_embeddings)
        text.encoder.resize_token_embeddings(count, mean_resizing=False)
        text.encoder.requires_grad_(False).eval()
        self.table = text.encoder.get_input_embeddings()
        self.learned = torch.nn.Parameter(self.table.weight[tokens[-1]].detach().float().clone())
        self.hook = self.table.register_forward_hook(self._put_in)

    def _put_in(self, _: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((inputs[0] == self.token)[..., None], self.learned.to(output.dtype), output)

    @torch.no_grad()
    def keep(self) -> None:
        # Of several processes, which may round differently, all sample with what the first has learned.
        learned = broadcast(self.learned.detach().clone())
        self.table.weight[self.token] = learned.to(self.table.weight.dtype)


def _attackers_images(subject: Subject, pair: ErasurePair, inversion: Inversion) -> tuple[torch.Tensor, Inversion]:
    """Images of the concept that the base model samples, and the attack with its start word."""
    prompts = [fill_template("a photo of {}", pair.concept)] * inversion.images
    digest = subject.digests(subject.base).whole
    generator = SampleGenerator(subject.base, subject.artifacts_dir, subject.accelerator, digest)
    # The attacker's images share no seed with those that are scored.
    seeds = stream_seeds(ATTACK_SEEDS, subject.first_seed, inversion.images)
    drawn = generator.drawn("inversion", prompts, prompts, list(seeds), subject.settings, preview=False)
    if inversion.start is None:
        word = pair.surrogate.value.split()[-1] if pair.surrogate.kind == "prompt" else "photo"
        inversion = replace(inversion, start=word)
    return drawn.samples, inversion


def _trend(losses: Sequence[float]) -> dict[str, float]:
    tenth = max(1, len(losses) // 10)
    return {"first_loss": sum(losses[:tenth]) / tenth, "last_loss": sum(losses[-tenth:]) / tenth}
