"""The saved artefact: diagonal Fisher information, and what it was computed from."""

import hashlib
import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..configuration import FISHER_CONFIG_NAME
from ..files import DamagedArtefact, new_folder, read_json, read_sealed, replacing_folder, write_sealed
from ..hub import (
    CARD_MARKER,
    inherited_licence,
    push_folder,
    shown_name,
)
from ..markup import markdown_code, markdown_fence, markdown_text
from ..passes import Passes

FISHER_NAME = "fisher.safetensors"
FORMAT_VERSION = 2
_TAGS = ["selective-amnesia", "fisher-information"]
# Fields that must agree with a run; the others say where the information came from.
_BINDING = {
    "trained_module": "the weights that it was computed from",
    "base": "the model's other parts (text encoder, tokenizer, autoencoder, noise schedule)",
    "kind": "the kind of model",
    "fisher_kind": "the kind of Fisher information",
    "prediction_type": "the prediction type",
    "reduction": "the reduction of the loss",
    "num_train_timesteps": "the number of timesteps in the ELBO's sum",
    "snr_gamma": "the min-SNR weighting",
    "noise_offset": "the offset of the noise",
}


def digest_of_values(values: Mapping[str, torch.Tensor]) -> str:
    """A digest of named tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(values.items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(memoryview(value.detach().float().cpu().contiguous().flatten().numpy()))
    return digest.hexdigest()


class FisherInformation:
    """Diagonal Fisher information `F_i` of named parameters (paper, section 2.2).

    Attributes:
        values: Name and `F_i`, float32, non-negative, in the parameter's shape; where `config` says `fisher_form:
            rows_by_columns`, its sums over columns and over rows of the parameter as a matrix, `[rows + columns]`.
        config: What it was computed from: base model and revision, fingerprints of the trained module and of the whole
            model, selection, prediction type, reduction, timesteps, samples, seeds, precision.
        passes: What computing it took of the network, samples made for it alone included; None where that is not on
            record. Nothing depends on it, so it is no part of `config`.
    """

    def __init__(
        self, values: Mapping[str, torch.Tensor], config: Mapping[str, Any], passes: Passes | None = None
    ) -> None:
        self.values = dict(values)
        self.config = dict(config)
        self.passes = passes

    def __repr__(self) -> str:
        base, selection = self.config.get("base_model"), self.config.get("train_method")
        return f"FisherInformation({len(self.values)} parameters of {base}, {selection})"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `fisher.safetensors` and `fisher_config.json`, which holds the digest of the other."""
        with (replacing_folder if Path(folder).is_dir() else new_folder)(folder) as staging:
            save_file({name: value.cpu().contiguous() for name, value in self.values.items()}, staging / FISHER_NAME)
            spent = {"passes": self.passes.to_dict()} if self.passes else {}
            write_sealed(staging, FISHER_CONFIG_NAME, FORMAT_VERSION, {**self.config, **spent})

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload it to the Hub, with a card that says what it was computed from; see `sa_diffusers.hub.push_folder`.

        Args:
            repo_id: Name on the Hub, what `from_pretrained` and the flag `fisher` take afterwards.
            private: Make a new repository private.

        Returns:
            The address of the repository.

        Raises:
            ValueError: The Hub allows no such name.
            ConnectionError: The upload failed; the message says how to repeat it.
        """
        repeat = "call push_to_hub again, or keep it with save_pretrained and upload that folder with " \
                 "examples/push_to_hub.py"  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, private, self.model_card, repeat, "Upload Fisher information")

    def model_card(self, name: str) -> str:
        """The text of its model card.

        Args:
            name: What it is loaded by: its name on the Hub, or a folder.
        """
        config = self.config
        base = config.get("base_model")
        shown = markdown_text(shown_name(base)) if base else "a model that is not on record"
        if base and shown_name(base) == base and config.get("revision"):
            shown = f"[{shown}](https://huggingface.co/{quote(base)})"
        fields = {key: value for key, value in config.items() if isinstance(value, (str, int, float))}
        if base:
            fields["base_model"] = shown_name(base)
        rows = "\n".join(f"| {markdown_code(key)} | {markdown_code(value)} |" for key, value in fields.items())
        command = f"accelerate launch examples/train_sa.py --fisher {shlex.quote(name)} --concept CONCEPT"
        of = "The diagonal"
        if "fisher_form" in config:
            of = "The sums over rows and over columns of the diagonal"
            command += " --adapter lora --fisher_form rows_by_columns"
        code = "from sa_diffusers import FisherInformation\n\nfisher = FisherInformation.from_pretrained("
        data = ModelCardData(
            library_name="sa_diffusers", tags=_TAGS, **(inherited_licence(base) if base else {})
        )  # fmt: skip
        return str(
            ModelCard(f"""---
{data.to_yaml()}
---
{CARD_MARKER}

# Fisher information of {shown}

{of} of the Fisher information of {len(self.values)} parameter tensors
({sum(value.numel() for value in self.values.values()):,} numbers), for elastic weight consolidation in
[Selective Amnesia](https://arxiv.org/abs/2305.10120). It is bound to the weights that it was computed from: a run that
trains others, or another loss, refuses it.

| computed from | value |
| --- | --- |
{rows}

{markdown_fence("", f"{command} --surrogate SURROGATE")}

{markdown_fence("python", f"{code}{json.dumps(name, ensure_ascii=False)})")}

The numbers say how much each weight matters to what the model draws, and hold no image and no prompt.
""")
        )

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None, cache_dir: str | None = None
    ) -> "FisherInformation":
        """Load from a folder or from the Hub.

        Raises:
            DamagedArtefact: It is not whole, or not what was written.
            ValueError: There is no Fisher information there, or it is of another format.
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            try:
                folder = Path(
                    snapshot_download(
                        str(name_or_path),
                        revision=revision,
                        cache_dir=cache_dir,
                        allow_patterns=[FISHER_NAME, FISHER_CONFIG_NAME],
                    )
                )
            except Exception as error:
                raise ValueError(
                    f'Fisher information "{name_or_path}" is neither a folder nor could it be had from the Hub '
                    f"({error})"
                ) from error
        for file in (FISHER_NAME, FISHER_CONFIG_NAME):
            if not (folder / file).is_file():
                raise DamagedArtefact(f"{name_or_path} holds no Fisher information: it has no {file}")
        found = read_json(folder / FISHER_CONFIG_NAME).get("format_version")
        if isinstance(found, int) and found < FORMAT_VERSION:
            raise ValueError(
                f"{name_or_path} has format {found}, which does not say all that it depends on: leave the flag fisher "
                "out to have it computed again"
            )
        config = read_sealed(folder, FISHER_CONFIG_NAME, FORMAT_VERSION, "Fisher information")
        try:
            values = load_file(folder / FISHER_NAME)
        except (SafetensorError, OSError) as error:
            raise DamagedArtefact(f"{folder / FISHER_NAME} could not be read ({error}): compute it again") from error
        for name, value in values.items():
            if not torch.isfinite(value).all() or (value < 0).any():
                raise DamagedArtefact(f"{folder / FISHER_NAME}: {name} is negative or not finite: compute it again")
        config.pop("format_version", None)
        passes = Passes.read(config.pop("passes", None))
        return cls(values, config, passes)

    def check(self, expected: Mapping[str, Any], names: Mapping[str, Any] | list[str]) -> None:
        """Refuse information that does not fit a run.

        Args:
            expected: The run's values of the binding fields, as `fisher_identity` gives them.
            names: Names of the parameters to be trained; the information may cover more.

        Raises:
            ValueError: It belongs to another model, another loss, or does not cover the parameters; the message says
                what differs, and how.
        """
        # Before there were two kinds it was the gradient's.
        own = {"fisher_kind": "gradient", **self.config}
        differences = [
            f"{meaning} ({field}: {own.get(field)!r}, this run: {expected[field]!r})"
            for field, meaning in _BINDING.items()
            if field in expected and own.get(field) != expected[field]
        ]
        if differences:
            raise ValueError(
                "this Fisher information belongs to another run; it differs in " + "; ".join(differences) + ". Leave "
                "the flag fisher out to have it computed again"
            )
        if own.get("fisher_form", "diagonal") not in ("diagonal", expected.get("fisher_form")):
            raise ValueError(
                "this Fisher information is rows by columns alone, which an adapter's run with "
                "fisher_form=rows_by_columns takes: give that, or leave the flag fisher out to have it computed again"
            )
        for name, value in self.values.items():
            if not torch.isfinite(value).all() or (value < 0).any():
                raise ValueError(f"this Fisher information is negative or not finite in {name}: compute it again")
        missing = [name for name in names if name not in self.values]
        if missing:
            raise ValueError(
                f"this Fisher information was computed for the selection {self.config.get('train_method')!r} and lacks "
                f"{len(missing)} of the {len(list(names))} parameters to train, such as {missing[0]}. Compute it for "
                "this selection, or choose one that it covers"
            )
