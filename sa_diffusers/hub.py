"""Publishing a folder on the Hub: what goes up, under which name, how texts are made harmless, and what is said when
it fails."""

import contextlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, ModelCard, get_token, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .configuration import BASE_DEFAULTS_NAME, CONFIG_NAME, ENDING_NAME, REPORT_FILES, REPORT_NAME
from .files import read_json, resealed, write_json
from .markup import single_line, visible
from .output_folder import LOCK, weights_in

CARD_NAME = "README.md"
# Whoever keeps this line has their changes overwritten, and is told so by it.
CARD_MARKER = "<!-- sa_diffusers writes this card anew. Delete this line to keep your own changes. -->"
HUB_TIMEOUT_SECONDS = 10
_TO_DO = {
    403: "Log in with `hf auth login`, with a token that may write to that repository",
    413: "A file is larger than the Hub takes: publish an adapter in its place (`sa-diffusers extract` makes one)",
}
_PUBLISHED_TEXT = (".json", ".md", ".html")
_ROOTS = {"content", "data", "home", "kaggle", "media", "mnt", "opt", "root", "scratch", "srv", "tmp", "Users", "var",
          "workspace"}  # fmt: skip
_ABSOLUTE_PATH = re.compile(r"(?:(?<=file://)/|(?<![\w./+~])/(?!/))([\w.@+~-]+)(?:/+[\w.@+~-]+)+")


def repository_name(folder: str | Path, repo_id: str | None = None) -> str:
    """The name that a folder gets on the Hub.

    Args:
        folder: The folder.
        repo_id: A name that was asked for, with or without the user's or the organisation's. Default: the folder's.

    Raises:
        ValueError: The Hub allows no such name.
    """
    name = repo_id or Path(folder).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f'"{name}" cannot be a name on the Hub ({one_line(error)}): give another with --hub_model_id, such as '
            "USER/NAME"
        ) from error
    return name


def push_folder(
    folder: str | Path,
    repo_id: str | None = None,
    private: bool = False,
    card: Callable[[str], str] | None = None,
    repeat: str | None = None,
    commit_message: str = "Upload erased pipeline",
    gate: Literal["auto", "manual"] | None = None,
) -> str:
    """Upload a folder to the Hub, without checkpoints, logs and hidden files; the token is that of `hf auth login`.

    Nothing in the folder changes. In what goes up, texts name folders of this machine by their last part.

    Args:
        folder: A finished folder.
        repo_id: Name on the Hub (default: the folder's name, under the user).
        private: Make a new repository private. One that is there already must be private, or nothing goes up.
        card: Full name on the Hub -> text of the model card. The folder's own README.md goes up in its place if it
            was not written by this package.
        repeat: How to repeat a failed upload, for the error's message. Default: a command.
        commit_message: Of the commit.
        gate: How whoever wants to download it is let in (at once, or by hand), where the repository asks nothing yet.

    Returns:
        The address of the repository.

    Raises:
        ValueError: The Hub allows no such name, the folder is not there, or it would become public against the wish.
        ConnectionError: The upload failed. The folder is unchanged; the message says how to repeat it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one that a run has written")
    name = repository_name(folder, repo_id)
    # Before anything is made on the Hub.
    published_files(folder)
    command = ["python", "examples/push_to_hub.py", str(folder), "--hub_model_id", name, *["--private"] * private]
    repeat = repeat or f"{folder} is unchanged; repeat it with `{shlex.join(command)}`"
    api = HfApi()
    with _one_line_errors(name, repeat):
        # None leaves it to an organisation's default, which may be private.
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        found = api.model_info(repository.repo_id) if private or gate else None
        is_public = private and found is not None and not found.private
    if is_public:
        raise ValueError(
            f'"{repository.repo_id}" is on the Hub already, and public: make it private in its settings, or choose '
            "another name with --hub_model_id. Nothing was uploaded"
        )
    with _one_line_errors(name, repeat), tempfile.TemporaryDirectory() as staging:
        if found and gate and not found.gated:
            # Before there is anything to download.
            api.update_repo_settings(repository.repo_id, gated=gate)
        _stage(folder, Path(staging), card and card(repository.repo_id))
        api.upload_folder(repo_id=repository.repo_id, folder_path=staging, commit_message=commit_message)
    return str(repository)


@contextlib.contextmanager
def _one_line_errors(name: str, repeat: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the kinds of network errors depend on huggingface_hub's HTTP library
        # Without the first error in the traceback: that one may quote the token in a header.
        told, status = one_line(error), _status(error)
        if status is not None and str(status) not in told:
            told += f" HTTP status {status}"
        to_do = _TO_DO.get(status, "Log in with `hf auth login` if you are not")
        raise ConnectionError(f'the upload to "{name}" failed ({told}). {to_do}; {repeat}') from None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error comes from, if it comes from one: that of a large file is another error's cause."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def one_line(error: Exception) -> str:
    """An error's message in one line, without the token, its control characters shown as such."""
    text = visible(" ".join(str(error).split())) or type(error).__name__
    # A token that this user may not read is in no message.
    with contextlib.suppress(OSError):
        token = get_token()
        if token:
            text = text.replace(token, "***")
    return re.sub(r"Bearer [^\s'\"]+", "Bearer ***", text)


def _stage(folder: Path, staging: Path, card: str | None) -> None:
    """Lay out what goes up: links to files, and texts that name no folder of this machine."""
    for path in published_files(folder):
        inside = path.relative_to(folder)
        target = staging / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        text = _shown_text(path) if _is_report(inside) else None
        if inside.as_posix() == BASE_DEFAULTS_NAME:
            # What lies beside the base model on this machine does not go up.
            own = {name: value for name, value in _named_values(path).items() if not str(value).startswith("../")}
            write_json(target, own)
        elif text is not None and (shortened := without_local_paths(text)) != (written := _read_text(path)):
            target.write_text(resealed(written, shortened), encoding="utf-8")
        else:
            target.symlink_to(path.resolve())
    if card is not None and is_own_card(folder):
        (staging / CARD_NAME).unlink(missing_ok=True)
        (staging / CARD_NAME).write_text(card, encoding="utf-8")


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _shown_text(path: Path) -> str:
    """A text of this package, values of its JSON that are paths cut already."""
    text = _read_text(path)
    if path.suffix != ".json":
        return text
    try:
        values = json.loads(text)
    except ValueError:
        return text
    shorter = without_local_values(values)
    return text if shorter == values else json.dumps(shorter, indent=2, ensure_ascii=False) + "\n"


def published_files(folder: Path) -> list[Path]:
    """The files of a folder that go up: none of checkpoints, logs, stale reports, nothing hidden.

    Raises:
        ValueError: One of them is a link that leads out of the folder.
    """
    settings = _named_values(folder / CONFIG_NAME)
    logs = os.path.normpath(str(settings.get("logging_dir") or "logs"))
    left_out = {"logs", *([logs] if logs != "." else [])}
    for path in sorted_reports(folder)[1]:
        own = path.parent == folder
        left_out |= {*REPORT_FILES, ENDING_NAME} if own else {str(path.parent.relative_to(folder))}

    def stays_behind(inside: Path) -> bool:
        return (
            any(part.startswith(".") for part in inside.parts)
            or inside.parts[0].startswith("checkpoint-")
            or any(inside.is_relative_to(name) for name in left_out)
            or inside.name.startswith("events.out.tfevents")
        )

    root, published = folder.resolve(), []
    for path in sorted(folder.rglob("*")):
        if stays_behind(path.relative_to(folder)) or not path.exists():
            continue
        target = path.resolve()
        if not target.is_relative_to(root):
            raise ValueError(
                f"{single_line(path)} is a link to {single_line(target)}, outside of the folder: put a copy in its "
                "place, or remove it. Nothing was uploaded"
            )
        if path.is_file() and not stays_behind(target.relative_to(root)):
            published.append(path)
    return published


def sorted_reports(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The reports in an erased pipeline's folder, its erasure's own and those of evaluations: those of the pipeline as
    it is now, and those of an earlier one or of other weights, which are no evidence of this one."""
    folder = Path(folder)
    own = _named_values(folder / REPORT_NAME)
    paths = [folder / REPORT_NAME] * bool(own) + sorted(folder.glob(f"evaluation*/**/{REPORT_NAME}"))
    reports = {path: _named_values(path) for path in paths}
    weights = weights_in(folder) if any("weights" in report for report in reports.values()) else {}

    def is_current(report: dict[str, Any]) -> bool:
        if isinstance(report.get("weights"), dict):
            return all(weights.get(name) == digest for name, digest in report["weights"].items())
        # Reports of earlier versions tell the trained part alone.
        return report.get("erased_module") in (None, own.get("erased_module")) or not own.get("erased_module")

    current = [path for path, report in reports.items() if is_current(report)]
    return current, [path for path in paths if path not in current]


def evaluation_files(folder: Path) -> list[str]:
    """What evaluations have written into folders inside of an erased pipeline's, whichever pipeline they are of.

    A link to a folder with a report stands for that report. Files that somebody else has put beside one are left out.
    """
    found = []
    for path in sorted(folder.glob(f"evaluation*/**/{REPORT_NAME}")):
        top = folder / path.relative_to(folder).parts[0]
        if _is_of_an_evaluation(path):
            written = [top] if top.is_symlink() else [path.parent / name for name in (*REPORT_FILES, LOCK)]
            found += [file.relative_to(folder).as_posix() for file in written if file.exists()]
    return list(dict.fromkeys(found))


def _is_of_an_evaluation(path: Path) -> bool:
    """Whether a `report.json` is one of this package's, of any version."""
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and not {"rows", "schema_version"}.isdisjoint(values)


def _named_values(path: Path) -> dict[str, Any]:
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds other values than a run writes: restore it or remove it")
    return values


def _is_report(inside: Path) -> bool:
    """Whether a file of an output folder is a text of this package: none of a component's, none of the user's."""
    own_place = len(inside.parts) == 1 or inside.parts[0].startswith("evaluation")
    return own_place and inside.suffix in _PUBLISHED_TEXT and inside.name not in (CARD_NAME, "model_index.json")


def without_local_values(values: Any) -> Any:
    """Values of a JSON file in which those that are a path of a machine are cut to its last part, whatever is in it."""
    if isinstance(values, dict):
        return {name: without_local_values(value) for name, value in values.items()}
    if isinstance(values, list):
        return [without_local_values(value) for value in values]
    if not isinstance(values, str):
        return values
    path = values.removeprefix("file://")
    first = path.lstrip("/").partition("/")[0]
    is_path = path.startswith("/") and "\n" not in path and (first in _ROOTS or os.path.lexists(f"/{first}"))
    return Path(path).name if is_path and path.strip("/") else values


def without_local_paths(text: str) -> str:
    """A text in which absolute paths of a machine are cut to their last part: `/home/alice/models/base` is `base`."""

    def cut(match: re.Match) -> str:
        is_path = match[1] in _ROOTS or os.path.exists(f"/{match[1]}")
        return Path(match[0]).name if is_path else match[0]

    return _ABSOLUTE_PATH.sub(cut, text)


def drop_local_names(folder: str | Path) -> None:
    """Take out of a saved pipeline's configurations from which folder on this machine each part was loaded.

    diffusers and transformers note it under `_name_or_path`, and never read it back. A name on the Hub stays.
    """
    folder = Path(folder)
    for path in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        if path.name not in ("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json"):
            continue
        values = read_json(path)
        local = [name for name in ("_name_or_path", "name_or_path") if _is_local(values.get(name))]
        if local:
            write_json(path, {name: value for name, value in values.items() if name not in local})


def _is_local(name: object) -> bool:
    return isinstance(name, str) and name != "" and (os.path.isabs(name) or os.path.exists(name))


def shown_name(name: str) -> str:
    """How a model is called in a text: its name on the Hub, or the last part of its folder's."""
    if _is_local(name) or name.startswith(("~", ".")) or name.count("/") > 1:
        return Path(name).name
    return name


def adapter_header(
    concepts: Sequence[str], surrogates: Sequence[str], base: str, revision: str | None, pipeline: str,
    variant: str | None = None, fused: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """What the header of an adapter's file says beside its own configuration; it names no folder of this machine.

    Args:
        concepts: What was erased.
        surrogates: What stands in their place.
        base: The base model.
        revision: Of the base model on the Hub.
        pipeline: Class of its pipeline.
        variant: Of the base model's weight files, where they were loaded as that.
        fused: Adapters that were in the base model's weights, in words.
    """
    from .version import __version__

    return {
        "concept": list(concepts),
        "surrogate": [shown_name(surrogate) for surrogate in surrogates],
        "base_model": shown_name(base),
        **({"base_model_revision": revision} if revision else {}),
        **({"base_variant": variant} if variant else {}),
        "pipeline_class": pipeline,
        **({"fused_adapters": list(fused)} if fused else {}),
        "sa_diffusers_version": __version__,
    }


def is_own_card(folder: str | Path) -> bool:
    """Whether the folder's model card may be written: there is none, or this package wrote it."""
    path = Path(folder) / CARD_NAME
    return not path.is_file() or CARD_MARKER in path.read_text(encoding="utf-8", errors="replace")


def _card_of(base: str, cache_dir: str | None) -> dict[str, Any]:
    """What the card of a model says of it in its head; empty if it cannot be had."""
    try:
        path = Path(base) / CARD_NAME
        if not Path(base).is_dir():
            path = Path(hf_hub_download(base, CARD_NAME, cache_dir=cache_dir, etag_timeout=HUB_TIMEOUT_SECONDS))
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever is wrong with another's card, this one is written without
        return {}


def inherited_gate(base: str, cache_dir: str | None = None) -> dict[str, Any]:
    """What a base model's own card asks of whoever downloads it (`extra_gated_prompt` and its like).

    Args:
        base: As of `inherited_licence`.
        cache_dir: Of the Hub's cache.
    """
    return {name: value for name, value in _card_of(base, cache_dir).items() if name.startswith("extra_gated_")}


def gate_of(base: str, cache_dir: str | None = None) -> Literal["auto", "manual"] | None:
    """How a base model's owner lets in whoever downloads it; None where it asks nothing, as far as the Hub or, where
    that does not say, the model's own card knows.

    Args:
        base: As of `inherited_licence`.
        cache_dir: Of the Hub's cache.
    """
    if not Path(base).is_dir():
        with contextlib.suppress(Exception):  # the kinds depend on huggingface_hub's HTTP library
            return HfApi().model_info(base, timeout=HUB_TIMEOUT_SECONDS).gated or None
    return "auto" if inherited_gate(base, cache_dir) else None


def inherited_licence(base: str, cache_dir: str | None = None) -> dict[str, str]:
    """The licence fields of a base model's own card: `license`, and `license_name` and `license_link` if it has them.

    Args:
        base: A folder or a name on the Hub, whose local cache is read where the Hub does not answer.
        cache_dir: Of the Hub's cache.

    Returns:
        Empty if the card cannot be had or names no licence.
    """
    local, data = Path(base).is_dir(), _card_of(base, cache_dir)
    if not isinstance(data.get("license"), str):
        return {}
    fields = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    fields = {name: value for name, value in fields.items() if isinstance(value, str)}
    link = fields.get("license_link", "")
    if link and "://" not in link:
        fields["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
        if local:
            del fields["license_link"]
    return fields
