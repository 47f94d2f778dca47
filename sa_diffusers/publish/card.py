"""The model card of an erased pipeline: README.md, written from what its folder holds and from nothing else."""

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCard, ModelCardData

from ..configuration import CONFIG_NAME, GRID_NAME, HISTORY_NAME
from ..families.adapters import ADAPTER_FILE, LOADED
from ..families.base import Family
from ..families.distilled import distilled_as_said
from ..families.single_file import SUFFIX
from ..families.trained import loads_in_diffusers
from ..files import write_text
from ..hub import (
    CARD_MARKER,
    CARD_NAME,
    gate_of,
    inherited_gate,
    inherited_licence,
    is_own_card,
    push_folder,
    shown_name,
    sorted_reports,
    without_local_paths,
)
from ..markup import command_words, markdown_code, markdown_text, requoted
from ..output_folder import check_written
from ..report.conclusions import verdict_notes
from ..report.cost import cost_sentence, cost_table
from ..report.document import Table, render
from ..report.provenance import not_repeatable, path_settings
from ..results.figures import percent, sampling_text, significant
from ..results.verdict import FORGOTTEN
from .facts import Facts, read_facts
from .metadata import eval_results
from .sentences import conditions, damage, leaks, quoted, remembered, setting_text, surrogate_name, tables

_md = markdown_text
PAPER = "https://arxiv.org/abs/2305.10120"
_SURROGATE_KINDS: dict[str | None, str] = {
    "prompt": "what the base model draws for that prompt",
    "images": "images from a folder",
    "noise": "uniform over pixel values",
}
_TAGS = ["selective-amnesia", "concept-erasure", "machine-unlearning"]
_SHOWN_SETTINGS = (
    "fuse_adapters", "train_method", "adapter", "lora_rank", "base_quantization", "target", "naive", "max_train_steps",
    "train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "use_ema", "ema_decay", "ewc_weight",
    "replay_weight", "num_surrogate_images", "num_replay_images", "replay_prompts", "replay_unconditional_share",
    "condition_dropout", "timestep_draws", "snr_gamma", "noise_offset", "concept_templates", "sampler",
    "num_inference_steps",
    "guidance_scale", "surrogate_guidance_scale", "replay_guidance_scale", "resolution", "mixed_precision",
    "weights_dtype", "fisher_dtype", "seed",
)  # fmt: skip
_SHOWN_FISHER = (
    "base_model", "revision", "train_method", "fisher_kind", "num_samples", "timesteps", "num_train_timesteps", "seed",
    "reduction", "prediction_type", "precision", "weights_dtype", "trained_module",
)  # fmt: skip
_SWITCHED_OFF = (
    "An adapter is no safety measure: whoever loads it can leave it out, switch it off or give it a negative strength, "
    "and then the base model draws what it always drew."
)
_OWN_SCRIPT = "YOUR_SCRIPT.py"
_LONGEST = 300
_LOSSES = ("surrogate_loss", "replay_loss", "ewc_penalty")


def build_model_card(folder: str | Path, name: str | None = None) -> ModelCard:
    """The model card of an erased pipeline.

    Read are the files that `read_facts` names, whether there is a before_after.png, and the base model's own card for
    the licence (its folder, the Hub, or the Hub's cache).

    Args:
        folder: An erased pipeline.
        name: What it is loaded by, such as its name on the Hub. Default: the folder's name.

    Raises:
        ValueError: The folder holds no pipeline, or one of its files is not what a run writes.
    """
    facts = read_facts(Path(folder), name)
    licence = inherited_licence(facts.base, facts.settings["cache_dir"]) if facts.base else {}
    card = _Card(facts, bool(licence))
    relation, adapted = "finetune", {}
    if facts.adapter is not None:
        relation, adapted = "adapter", {"widget": [{"text": card.condition}]}
        adapted |= inherited_gate(facts.base, facts.settings["cache_dir"]) if facts.base else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.pipeline_tag,
        tags=[*_TAGS, *(["lora"] if facts.adapter is not None else [])],
        model_name=facts.name.split("/")[-1],
        eval_results=list(eval_results(facts)) or None,
        **({"base_model": facts.base, "base_model_relation": relation} if facts.base_is_on_hub else {}),
        **licence,
        **adapted,
    )
    if not data.eval_results:
        del data.model_name
    body = render("card.md", _LONGEST, card=card)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{CARD_MARKER}\n\n{without_local_paths(body)}")


def write_model_card(folder: str | Path, name: str | None = None) -> bool:
    """Write an erased pipeline's model card into its folder; see `build_model_card`.

    Args:
        folder: An erased pipeline.
        name: What it is loaded by. Default: the folder's name.

    Returns:
        False if there is a README.md that this package did not write: it stays as it is.

    Raises:
        ValueError: The folder holds no pipeline, or one of its files is not what a run writes.
    """
    if not is_own_card(folder):
        return False
    write_text(Path(folder) / CARD_NAME, str(build_model_card(folder, name)))
    return True


def push_pipeline(folder: str | Path, repo_id: str | None = None, private: bool = False) -> str:
    """Upload an erased pipeline with its card, report and pictures; see `sa_diffusers.hub.push_folder`.

    The card that goes up knows the name on the Hub; the folder's own is not touched. The repository of an adapter asks
    of whoever downloads it what that of its base model asks.
    """
    folder = Path(folder)
    check_written(folder)
    facts = read_facts(folder)
    for path in sorted_reports(folder)[1]:
        place = path if path.parent == folder else path.parent
        warnings.warn(f"{place} is about an earlier pipeline of this folder: it is not published", stacklevel=2)
    adapts = facts.base if facts.adapter is not None else None
    gate = gate_of(adapts, facts.settings["cache_dir"]) if adapts else None
    return push_folder(folder, repo_id, private, lambda name: str(build_model_card(folder, name)), gate=gate)


def _share(told: str | None) -> str | None:
    """A share as a header has it, in per cent; None where it has none."""
    try:
        share = float(told or "")
    except ValueError:
        return None
    return f"{percent(share)} %" if 0 <= share <= 1 else None


class _Card:
    """What the template shows: texts that are Markdown already, tables that are not yet."""

    def __init__(self, facts: Facts, has_licence: bool) -> None:
        self.facts = facts
        self.has_licence = has_licence
        self.paper, self.grid_name, self.config_name = PAPER, GRID_NAME, CONFIG_NAME
        self.history_name = HISTORY_NAME
        self.pipeline_class = markdown_code(facts.pipeline_class)
        self.concepts = [quoted(concept) for concept in facts.concepts]
        self.fused = facts.fused and _md(facts.fused)
        self.naive = bool(facts.settings["naive"])
        self.rank = (facts.adapter is not None or facts.settings["adapter"]) and facts.settings["lora_rank"]
        # Of an adapter that was extracted from trained weights, how much of their change is in it.
        self.share = _share((facts.adapter or {}).get("share_of_update"))
        self.is_merged = facts.adapter is None and bool(facts.settings["adapter"])
        self.merged = markdown_code(shown_name(facts.merged)) if facts.merged else None

    @property
    def title(self) -> str:
        base = Path(self.facts.base).name if self.facts.base else self.facts.name
        names = " and ".join(self.concepts)
        if not names:
            return _md(self.facts.name)
        is_gone = self.facts.verdicts and all(verdict.outcome == FORGOTTEN for verdict in self.facts.verdicts)
        return f"{_md(base)} without {names}" if is_gone else f"{_md(base)}, trained to forget {names}"

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """Of each verdict the line, and what it means or has no room for."""
        return [{"line": verdict.line, "notes": verdict_notes(verdict)} for verdict in self.facts.verdicts]

    @property
    def base(self) -> str:
        base = self.facts.base
        if base is None:
            return "a base model that this folder does not name"
        if not self.facts.base_is_on_hub:
            kind = "file" if base.lower().endswith(SUFFIX) else "folder"
            return f"the local {kind} {markdown_code(Path(base).name)}"
        revision = self.facts.report.base_revision
        link = f"[{_md(base)}](https://huggingface.co/{base})"
        return f"{link} (commit {markdown_code(revision)})" if revision else link

    @property
    def erased(self) -> Table | None:
        pairs = self.facts.pairs
        if not pairs:
            return None
        if self.naive:
            return Table("", ["concept"], [[pair.concept] for pair in pairs])
        given = self.facts.report.handed_in.get("surrogates")
        lines = [[pair.concept, surrogate_name(pair), f"handed in: {given}" if given else
                  _SURROGATE_KINDS.get(pair.kind, "not recorded")] for pair in pairs]  # fmt: skip
        return Table(
            "", ["asked for", "to be drawn in its place", "where that comes from"], lines, frozenset({0, 1, 2})
        )

    @property
    def shows_pictures(self) -> bool:
        """What a later evaluation blurs is clear in this folder's own picture."""
        return self.facts.has_grid and not (self.is_blurred and not self.facts.report.blur)

    @property
    def is_blurred(self) -> bool:
        return any(report.blur for report in self.facts.reports.values())

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Of each report its title, tables and what they depend on."""
        return [
            {"title": title, "tables": tables(report), "remembered": remembered(report),
             "conditions": conditions(report)}
            for title, report in self.facts.reports.items()
        ]  # fmt: skip

    @property
    def limits(self) -> list[str]:
        reports = self.facts.reports.values()
        lines = [_SWITCHED_OFF] if self.facts.adapter is not None else []
        if self.fused and self.facts.adapter is not None:
            lines.append(
                f"It belongs on top of {self.base} with the adapters that were fused into it ({self.fused}). All "
                "figures here are of the two together; on the published model alone it was not measured."
            )
        if self.merged:
            lines.append(
                f"It was not trained as it is here, but made of the adapter {self.merged}, whose own card has what was "
                "measured of that."
            )
        told = [report.distilled for report in reports if report.distilled]
        if self.facts.settings["train_distilled"] and not told:
            told = [distilled_as_said(self.facts.family).sentence]
        lines += map(_md, told)
        held = self.facts.settings["base_quantization"]
        if self.facts.adapter is not None and held:
            lines.append(
                "It was trained, and its figures were measured, on the base model with its linear layers quantised to "
                f"{held}: on the base model in its own precision they may be others."
            )
        lines += [line for report in reports for line in (*leaks(report), *damage(report))]
        if not self.facts.rows:
            lines.append("Nothing has been measured in this folder: how far the model forgets is not known.")
        if not any(report.robustness for report in reports):
            lines.append(
                "No attempt to bring the concept back is on record here: no textual inversion, no other wording, "
                "spelling or language. Other work has brought erased concepts back in such ways. Expect that whoever "
                "holds the weights can do so."
            )
        return list(dict.fromkeys(lines))

    @property
    def snippet(self) -> str:
        facts = self.facts
        options = ", trust_remote_code=True" if facts.brings_code else ""
        for part in facts.family.optional_parts if facts.family else ():
            # diffusers takes no word of the index for it.
            if (facts.index[part] or [None])[0] is None:
                options += f", {part}=None"
        name = json.dumps(facts.name, ensure_ascii=False)
        if facts.adapter is not None:
            return self._adapter_snippet(name)
        lines = ["from diffusers import DiffusionPipeline", "",
                 f"pipeline = DiffusionPipeline.from_pretrained({name}{options})"]  # fmt: skip
        if facts.trained is not None:
            lines = self._together(name, options)
        elif not facts.brings_code and not hasattr(diffusers, facts.pipeline_class):
            # A class that diffusers does not have, without its code beside the weights.
            lines = [f"# First import the module that registers {facts.pipeline_class}.",
                     "from sa_diffusers import load_pipeline", "", f"pipeline = load_pipeline({name})"]  # fmt: skip
        return "\n".join([*lines, *self._call])

    def _together(self, name: str, options: str) -> list[str]:
        """Python that puts what was trained together with the base model."""
        facts, record = self.facts, self.facts.trained
        assert record is not None
        parts, kind = record["components"], facts.pipeline_class
        base = record["base_model"] if facts.base_is_on_hub else shown_name(record["base_model"])
        given = [f"{part}={part}" for part in parts]
        # Of the other parts' files some may be in half precision.
        given.append(f"dtype={next(iter(parts))}.dtype")
        told = {"revision": record["base_revision"], "variant": record["variant"]}
        given += [f"{option}={json.dumps(value)}" for option, value in told.items() if value]
        lines = [f"from diffusers import {', '.join(sorted({kind, *(value[1] for value in parts.values())}))}", ""]
        lines += [f"{part} = {value[1]}.from_pretrained({name}, subfolder={json.dumps(part)})"
                  for part, value in parts.items()]  # fmt: skip
        if not facts.base_is_on_hub:
            lines.append("# The base model's folder:")
        base = json.dumps(base, ensure_ascii=False)
        return [*lines, f"pipeline = {kind}.from_pretrained({base}, {', '.join(given)}{options})"]

    @property
    def held(self) -> str:
        """The parts that the folder holds, where it holds what was trained alone."""
        return " and ".join(self.facts.trained["components"]) if self.facts.trained is not None else ""

    def _adapter_snippet(self, name: str) -> str:
        facts = self.facts
        base, settings, adapter = facts.base or "BASE_MODEL", facts.settings, facts.adapter or {}
        loader, call = "import torch\nfrom diffusers import DiffusionPipeline", "DiffusionPipeline.from_pretrained"
        dtype = settings["weights_dtype"] or "float32"
        told = {"revision": settings["revision"] or facts.report.base_revision,
                "variant": settings["variant"] or adapter.get("base_variant")}  # fmt: skip
        options = "".join(f", {option}={json.dumps(value)}" for option, value in told.items() if value)
        absent = facts.family.optional_parts if settings["no_t5"] and facts.family else ()
        if facts.base and not loads_in_diffusers(facts.base):
            loader, call = "from sa_diffusers import load_pipeline", "load_pipeline"
            options += ", no_t5=True" if absent else ""
            options += f', weights_dtype="{dtype}"' if dtype != "float32" else ""
            if lender := settings["single_file_config"]:
                options += f", single_file_config={json.dumps(shown_name(lender))}"
        else:
            # As it was evaluated; of the parts' files some may be in half precision, and others not.
            options += f", dtype=torch.{dtype}" + "".join(f", {part}=None" for part in absent)
        first = [f"# First load what was fused into it: {' '.join(facts.fused.split())}"] if facts.fused else []
        if predicts := settings["prediction_type"]:
            # The base model's own scheduler may say otherwise, and the file holds none.
            first.append("pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, "
                         f"prediction_type={json.dumps(predicts)})")  # fmt: skip
        return "\n".join([
            loader, "",
            f"pipeline = {call}({json.dumps(shown_name(base))}{options})", *first,
            f'pipeline.load_lora_weights({name}, weight_name="{ADAPTER_FILE}", adapter_name="{LOADED}")',
            f'pipeline.set_adapters("{LOADED}", 1.0)  # 0 is the base model, what lies between is between',
            *self._call,
        ])  # fmt: skip

    @property
    def _call(self) -> list[str]:
        """Python that samples from the loaded pipeline."""
        report, call = self.facts.report, (self.facts.family or Family).card_snippet(self.condition)
        if not report.distilled:
            return [call]
        return [f"# Distilled to few steps: evaluated with {sampling_text(report.sampling)}.", call]

    @property
    def condition(self) -> str | int:
        """A prompt, or a class's number, that is not what was forgotten."""
        facts = self.facts
        if facts.takes_text:
            return next((row.prompts[0] for row in facts.rows if row.role in ("remembered", "surrogate")
                         and row.prompts), "a photo")  # fmt: skip
        forgotten = {concept.casefold() for concept in facts.concepts}
        return min((int(key) for key, label in (facts.index["id2label"] or {}).items()
                    if not {str(label).casefold(), key} & forgotten), default=0)  # fmt: skip

    @property
    def settings(self) -> Table | None:
        if not self.facts.settings:
            return None
        places = path_settings()
        values = {name: self.facts.settings[name] for name in _SHOWN_SETTINGS
                  if name != "lora_rank" or self.rank}  # fmt: skip
        lines = [[f"`{name}`", setting_text(shown_name(value) if name in places and isinstance(value, str) else value)]
                 for name, value in values.items() if value not in (None, []) and value is not False]  # fmt: skip
        return Table("", ["setting", "value"], lines, frozenset({0, 1}))

    @property
    def losses(self) -> str:
        if not self.facts.history:
            return ""
        parts = []
        for name in _LOSSES:
            logged = [entry for entry in self.facts.history if name in entry]
            if logged:
                first, last = logged[0], logged[-1]
                parts.append(f"{name.replace('_', ' ')} {significant(first[name])} at step {first['step']}, "
                             f"{significant(last[name])} at step {last['step']}")  # fmt: skip
        return ", ".join(parts)

    @property
    def cost(self) -> Table | None:
        return next((block for block in cost_table(self.facts.report) if isinstance(block, Table)), None)

    @property
    def spent(self) -> str:
        return cost_sentence(self.facts.report)

    @property
    def fisher(self) -> Table | str:
        facts, weight = self.facts, self.facts.settings["ewc_weight"]
        if weight == 0:
            return "None: the weight of elastic weight consolidation is 0."
        if facts.fisher:
            values = {name: facts.fisher[name] for name in _SHOWN_FISHER if facts.fisher[name] is not None}
            if "base_model" in values:
                values["base_model"] = shown_name(values["base_model"])
            lines = [[f"`{name}`", setting_text(value)] for name, value in values.items()]
            return Table("", ["computed from", "value"], lines, frozenset({0, 1}))
        if facts.settings["fisher"]:
            return f"Given: {markdown_code(shown_name(facts.settings['fisher']))}."
        if weight:
            timesteps = facts.settings["fisher_timesteps"] or "all"
            return f"Estimated from {facts.settings['num_fisher_samples']} samples x {timesteps} timesteps."
        return "The folder does not say."

    @property
    def own_script(self) -> str | None:
        """What stands in the command for the script of somebody's own family; None where an example erases from it."""
        family = self.facts.family
        return None if family and family.script else _OWN_SCRIPT

    @property
    def commands(self) -> str:
        commands = []
        if self.facts.settings and not self.not_repeatable:
            script = self.own_script or f"examples/{self.facts.family.script}"
            commands.append(f"accelerate launch {script} --config {CONFIG_NAME} --no-push_to_hub --output_dir again")
            if self.share is not None:
                commands.append(f"sa-diffusers extract again --output_dir again-extracted --lora_rank {self.rank}")
            if self.is_merged:
                commands.append("sa-diffusers merge again --output_dir again-merged")
        for title, report in self.facts.reports.items():
            if title and report.command:
                command = requoted(command_words(report.command))
                script = command.removeprefix("python ").removeprefix("examples/")
                commands.append(command if command.startswith("sa-diffusers ") else f"python examples/{script}")
        return "\n".join(commands)

    @property
    def not_repeatable(self) -> str:
        """Why no command makes it again; empty if one does."""
        return not_repeatable(self.facts.report)

    @property
    def package(self) -> str:
        version = self.facts.settings["sa_diffusers_version"] or self.facts.report.sa_diffusers_version
        return f"sa_diffusers {_md(version)}" if version else "sa_diffusers"

    @property
    def places(self) -> str:
        """The flags by which whoever repeats it says where their folders are."""
        facts = self.facts
        named = [name for name in facts.settings if name in path_settings()
                 and isinstance(value := facts.settings[name], str) and shown_name(value) != value]  # fmt: skip
        named = [name for name in named if name not in ("output_dir", "artifacts_dir", "cache_dir")]
        if not named and facts.base and not facts.base_is_on_hub:
            named = ["pretrained_model_name_or_path"]
        return ", ".join(f"`--{name}`" for name in named)

    @property
    def versions(self) -> str:
        return ", ".join(f"{_md(name)} {_md(version)}" for name, version in self.facts.report.versions.items())
