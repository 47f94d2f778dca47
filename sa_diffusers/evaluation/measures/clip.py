"""Scoring pictures with a CLIP model: how well they match their prompts, and which of several names fits them best."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoProcessor, CLIPModel

from ...configuration.evaluation import DEFAULT_CLIP
from ...families.digests import fingerprint_module
from ...identity import fingerprint
from ...names import bare_name
from ..classification import Classification, loaded, whole
from ..memory import in_batches
from ..registry import register_measure

if TYPE_CHECKING:
    from ..request import Request

CONCEPT_SHARE = "clip_called_concept"
SURROGATE_SHARE = "clip_called_surrogate"
ZERO_SHOT_TEMPLATE = "a photo of {}"


@register_measure("clip")
class Clip:
    """A CLIP model of transformers. It is a `Measure` and, by its image embeddings, a `FeatureNetwork`.

    Columns: `clip_score`, 100 times the cosine between picture and prompt (Hessel et al., 2021, without its factor of
    2.5 and not cut at zero); and, once `names` are given, `clip_called_concept` and `clip_called_surrogate`: 1 where a
    concept's name (a surrogate's) is the nearest of all names to the picture, else 0.

    Args:
        name_or_path: A folder or a name on the Hub.
        device: Where it runs.
        revision: Of the model on the Hub.

    Raises:
        ValueError: The model cannot be loaded.
    """

    def __init__(self, name_or_path: str, device: torch.device | str = "cpu", revision: str | None = None) -> None:
        what, advice = f'clip="{name_or_path}"', "give a folder or a Hub name of a CLIP model"
        model = loaded(what, name_or_path, lambda: whole(CLIPModel.from_pretrained(
            name_or_path, revision=revision, output_loading_info=True)), advice)  # fmt: skip
        self.model = model.to(device)
        self.processor = loaded(what, name_or_path, lambda: AutoProcessor.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=False), advice)  # fmt: skip
        lacking = [part for part in ("tokenizer", "image_processor") if getattr(self.processor, part, None) is None]
        if lacking:
            raise ValueError(f"{what} has no {lacking[0].replace('_', ' ')}: {advice}")
        self.name = str(name_or_path)
        self.device = device
        self.names: list[str] = []
        self._concepts: set[int] = set()
        self._surrogates: set[int] = set()
        self._name_embeds: torch.Tensor | None = None

    @classmethod
    def from_request(cls, request: "Request") -> "Clip | None":
        """As the evaluation's settings say; None where they want none."""
        return None if request.args.clip == "none" else cls(request.args.clip, request.device)

    def choose_among(self, concepts: Sequence[str], surrogates: Sequence[str], others: Sequence[str]) -> None:
        """The names of the zero-shot classification.

        Args:
            concepts: What was forgotten.
            surrogates: What it turned into.
            others: Further names.
        """
        self.names = list(dict.fromkeys([*concepts, *surrogates, *others]))
        self._concepts = {self.names.index(name) for name in concepts}
        self._surrogates = {self.names.index(name) for name in surrogates} - self._concepts
        self._name_embeds = self.embed_texts([ZERO_SHOT_TEMPLATE.format(name) for name in self.names])

    def provenance(self) -> dict[str, Any]:
        commit = getattr(self.model.config, "_commit_hash", None)
        return {
            "name": self.name,
            "kind": "CLIP",
            "revision": commit,
            "columns": ["clip_score", *([CONCEPT_SHARE, SURROGATE_SHARE] if self.names else [])],
            "labels": self.names,
            "template": ZERO_SHOT_TEMPLATE,
        }

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """`[len(texts), d]` of length 1; what is longer than the model's context is cut."""
        limit = self.model.config.text_config.max_position_embeddings

        def embed(batch: Sequence[str]) -> torch.Tensor:
            inputs = self.processor.tokenizer(
                list(batch), padding=True, truncation=True, max_length=limit, return_tensors="pt"
            ).to(self.device)
            pooled = self.model.text_model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).pooler_output
            return normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()

        return torch.cat(in_batches(texts, batch_size, embed))

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image], batch_size: int = 64) -> torch.Tensor:
        """`[len(pictures), d]` of length 1."""

        def embed(batch: Sequence[Image.Image]) -> torch.Tensor:
            opaque = [picture.convert("RGB") for picture in batch]
            pixels = self.processor.image_processor(opaque, return_tensors="pt")["pixel_values"].to(self.device)
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            return normalize(self.model.visual_projection(pooled).float(), dim=-1).cpu()

        return torch.cat(in_batches(pictures, batch_size, embed))

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float | None]]:
        seen = self.embed_pictures(pictures)
        unique = list(dict.fromkeys(prompts))
        texts = self.embed_texts(unique)[[unique.index(prompt) for prompt in prompts]]
        columns: dict[str, list[float | None]] = {"clip_score": (100 * (seen * texts).sum(-1)).tolist()}
        if self._name_embeds is not None:
            nearest = (seen @ self._name_embeds.T).argmax(-1).tolist()
            columns[CONCEPT_SHARE] = [float(index in self._concepts) for index in nearest]
            columns[SURROGATE_SHARE] = [float(index in self._surrogates) for index in nearest]
        return columns

    def feature_network(self) -> "ClipFeatures":
        """Its image embeddings, as a network of features."""
        return ClipFeatures(self)


class ClipFeatures:
    """A CLIP's image embeddings, by themselves."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.name = clip.name

    def __call__(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.clip.embed_pictures(pictures)


class ZeroShotClassifier:
    """A CLIP as a classifier among names: the probability of a name is its share of the softmax over all of them.

    It stands in for `ImageClassifier` where there is none that knows the concept.

    Args:
        clip: The model.
        names: What it chooses among.
        neighbours: Those of them that lie near the concept.
    """

    def __init__(self, clip: Clip, names: Sequence[str], neighbours: Sequence[str] = ()) -> None:
        self.clip = clip
        self.name = f"{clip.name} (zero-shot)"
        self.labels = self.prompted = list(dict.fromkeys(names))
        self.neighbours = list(neighbours)
        self._embeds = clip.embed_texts([ZERO_SHOT_TEMPLATE.format(name) for name in self.labels])
        self._scale = clip.model.logit_scale.detach().float().exp().cpu()

    def fingerprint(self) -> str:
        """A digest of what its answers depend on."""
        return fingerprint([fingerprint_module(self.clip.model), self.labels])

    def __call__(self, pictures: Sequence[Image.Image]) -> Classification:
        seen = self.clip.embed_pictures(pictures)
        return Classification((self._scale * seen @ self._embeds.T).softmax(-1), seen)

    def label_of(self, text: str) -> int | None:
        """The index of a name, in any case and with any article."""
        names = [bare_name(label) for label in self.labels]
        return names.index(bare_name(text)) if bare_name(text) in names else None

    def reference_moments(self, labels: Sequence[int]) -> None:
        """None: it has seen no real images."""
        return

    def feature_network(self) -> ClipFeatures:
        """The CLIP's image embeddings, as a network of features."""
        return self.clip.feature_network()


def local_clip(name: str | None) -> str | None:
    """The CLIP to score with: the one that was given, else the default one if it lies in the Hub's local cache.

    Args:
        name: A folder or a name on the Hub; `"none"` for none.
    """
    if name is not None:
        return None if name == "none" else name
    return DEFAULT_CLIP if isinstance(try_to_load_from_cache(DEFAULT_CLIP, "config.json"), str) else None
