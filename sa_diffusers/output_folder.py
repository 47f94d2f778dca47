"""The folder of an erased pipeline: whose it is, what is finished in it, and who may write into it."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .configuration import CONFIG_NAME, SelectiveAmnesiaConfig
from .families.adapters import ADAPTER_FILE, KOHYA_FILE
from .families.trained import of_a_pipeline
from .files import (
    digest_of,
    digests_of,
    finish_interrupted,
    is_interrupted,
    read_json,
    read_record,
    replacing_folder,
    write_record,
)
from .identity import Identity, plain
from .passes import Passes
from .processes import Lock, leads, wait_until, warn_once
from .training.checkpoints import CONSTANT_SCHEDULES, checkpoints, sweep_checkpoints
from .weights import WEIGHT_SUFFIXES

# Beside the pipeline, not part of it: hidden, and not published.
STATE_FOLDER = ".selective_amnesia"
VALIDATION_NAME = "validation"
_RUN_NAME, _REPORTED_NAME = "run.json", "reported.json"
FINISHED = f"{STATE_FOLDER}/finished.json"
# As it, of what no training wrote: what was merged, extracted or copied.
WRITTEN = f"{STATE_FOLDER}/written.json"
LOCK = f"{STATE_FOLDER}/lock"
# What says that a report is of the weights beside it; it goes with them.
REPORTED = f"{STATE_FOLDER}/{_REPORTED_NAME}"
FORMAT_VERSION = 1
# What a training of weights does not record, as those of earlier versions did not: it is none of an adapter.
_WITHOUT_ADAPTER = {"adapter": None}


class OutputFolder:
    """An output folder.

    Args:
        path: The folder; it need not be there.
        overwrite: Whether another erasure in it may be replaced.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.overwrite = overwrite
        self.state = self.path / STATE_FOLDER
        self.lock = Lock(
            self.path / LOCK, f"output_dir={self.path} is in use by another run: wait for it, or choose another"
        )

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder that holds something other than this erasure, as far as settings tell.

        Args:
            settings: All that the trained weights depend on, by name.

        Raises:
            ValueError: The folder is a file, holds foreign files, another erasure and `overwrite` is off, or is in use.
        """
        if self.path.is_file():
            raise ValueError(f"output_dir={self.path} is a file: choose a folder")
        if not self.path.is_dir():
            return
        self.lock.check()
        settings = {**_WITHOUT_ADAPTER, **settings}
        if not any(entry.name != STATE_FOLDER for entry in self.path.iterdir()) and not self._run_file.is_file():
            return
        if not self._run_file.is_file() and not (self.path / CONFIG_NAME).is_file():
            raise ValueError(
                f"output_dir={self.path} already holds something else (no {CONFIG_NAME} in it): choose an empty folder "
                "with --output_dir"
            )
        recorded = self._recorded()
        if recorded is not None:
            self._refuse(self._differences(settings, recorded["settings"]))
        elif self._facts() is None and (self.path / CONFIG_NAME).is_file():
            earlier = read_json(self.path / CONFIG_NAME)
            base = earlier.get("pretrained_model_name_or_path")
            if isinstance(base, str) and Path(base).exists():
                # As in the settings given: a folder counts by its name.
                earlier["pretrained_model_name_or_path"] = Path(base).resolve().name
            known = {name: value for name, value in settings.items() if name in earlier}
            differing = Identity("erasure", known).differences({name: earlier[name] for name in known})
            missing = f"it was merged, extracted or copied, or written by an earlier version (no {FINISHED})"
            self._refuse(differing or [f"{missing}, so that what it depends on is not known"])

    def check_identity(self, identity: Identity) -> None:
        """As `check`, by everything that the trained weights depend on."""
        facts = self._facts()
        if facts is not None:
            self._refuse(self._differences(identity.facts, facts))

    def _differences(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
        left_out = set()
        if not self._finished_file.is_file() and ours.get("lr_scheduler") in CONSTANT_SCHEDULES:
            # A run that was stopped may go on to another step.
            left_out = {"max_train_steps"}
        known = {name: value for name, value in {**_WITHOUT_ADAPTER, **ours}.items() if name not in left_out}
        return Identity("erasure", known).differences({name: theirs.get(name) for name in known})

    def _refuse(self, differing: list[str]) -> None:
        if differing and not self.overwrite:
            # Other hardware must not keep a run from going on.
            batch = (
                "global_batch is train_batch_size times gradient_accumulation_steps times processes: with as many as "
                "before the run goes on. Else choose"
            )
            advice = batch if any(words.startswith("global_batch=") for words in differing) else "Choose"
            if any(words.startswith("base=") for words in differing):
                advice = "base is the model that it starts from, which is another one or has changed. Choose"
            raise ValueError(
                f"output_dir={self.path} holds another erasure: {', '.join(differing)}. {advice} another folder with "
                "--output_dir, or replace it with --overwrite_output_dir"
            )

    @property
    def _run_file(self) -> Path:
        return self.state / _RUN_NAME

    @property
    def _finished_file(self) -> Path:
        return self.path / FINISHED

    def _recorded(self) -> dict[str, Any] | None:
        return read_record(self._run_file, FORMAT_VERSION)

    def _facts(self) -> dict[str, Any] | None:
        """What the last run depends on; where its own record is damaged, what the weights depend on."""
        recorded = self._recorded() or read_record(self._finished_file, FORMAT_VERSION)
        return recorded and recorded["facts"]

    def is_of(self, identity: Identity) -> bool:
        """Whether the last run that took the folder is this one, killed or not."""
        facts = self._facts()
        if facts is None:
            # A damaged record: each checkpoint says itself whose it is.
            return self._run_file.is_file()
        return not self._differences(identity.facts, facts)

    def begin(self, identity: Identity, settings: Mapping[str, Any], anew: bool = False) -> None:
        """Take the folder for a run: what an interrupted one left is finished or removed, checkpoints of another go.

        The weights of an earlier erasure, its settings, report and card stay until the new weights are there.

        Args:
            identity: All that the trained weights depend on.
            settings: As for `check`.
            anew: Whether this run's own checkpoints go too.
        """
        recorded = self._recorded()
        if anew or not self.is_of(identity):
            for folder in checkpoints(self.path):
                shutil.rmtree(folder)
            shutil.rmtree(self.validation_folder(identity, anew), ignore_errors=True)
        if recorded is None or recorded["facts"] != plain(identity.facts):
            replaces = self.holds_weights() and not self.names_finished(identity)
            values = {"facts": dict(identity.facts), "settings": dict(settings), "replaces": replaces}
            write_record(self._run_file, FORMAT_VERSION, values)
        finish_interrupted(self.path)
        finish_interrupted(self.state)
        sweep_checkpoints(self.path)
        if self.names_finished(identity):
            shutil.rmtree(self.state / VALIDATION_NAME, ignore_errors=True)

    def is_finished(self, identity: Identity, tell: Callable[[str], None] = print) -> bool:
        """Whether the weights of this very run are in the folder, every file as it was written."""
        values = read_record(self._finished_file, FORMAT_VERSION)
        if values is None or values["facts"] != plain(identity.facts):
            return False
        # A second form of the adapter is made of the first, without training.
        damaged = self._damaged({name: digest for name, digest in values["files"].items() if name != KOHYA_FILE})
        if damaged:
            tell(f"warning: {self.path / damaged[0]} is not what was written: it is made again")
        return not damaged

    def holds(self, name: str) -> bool:
        """Whether a file of the finished model is there as it was written."""
        values = read_record(self._finished_file, FORMAT_VERSION)
        digest = values and values["files"].get(name)
        return digest is not None and not self._damaged({name: digest})

    def _damaged(self, digests: Mapping[str, str]) -> list[str]:
        return [name for name, digest in digests.items()
                if not (self.path / name).is_file() or digest_of(self.path / name) != digest]  # fmt: skip

    def stopped(self, identity: Identity) -> Identity | None:
        """The identity of finished weights that are of this run, but for the step where a callback stopped it."""
        values = read_record(self._finished_file, FORMAT_VERSION)
        if values is None or "stopped_after_step" not in values["facts"]:
            return None
        facts = {name: value for name, value in values["facts"].items() if name != "stopped_after_step"}
        return Identity(identity.kind, values["facts"]) if facts == plain(identity.facts) else None

    def names_finished(self, identity: Identity) -> bool:
        """As `is_finished`, without a look at the weights."""
        values = read_record(self._finished_file, FORMAT_VERSION)
        return values is not None and values["facts"] == plain(identity.facts)

    def made(self, identity: Identity) -> dict[str, Passes | None]:
        """Stage -> what its part of the finished weights took of the network, as far as that is on record."""
        values = read_record(self._finished_file, FORMAT_VERSION)
        if values is None or values["facts"] != plain(identity.facts):
            return {}
        return {title: Passes.read(passes) for title, passes in values.get("made", {}).items()}

    def save_report(self, save: Callable[[Path], None], identity: Identity) -> None:
        """Write a report, all of it in one step, with what it depends on and its digests.

        Args:
            save: Writes its files into a folder.
            identity: What it depends on.
        """
        with replacing_folder(self.path) as staging:
            save(staging)
            files = digests_of(staging)
            (staging / STATE_FOLDER).mkdir()
            write_record(staging / REPORTED, FORMAT_VERSION, {"identity": identity.digest, "files": files})

    def holds_report(self, identity: Identity, tell: Callable[[str], None] = print) -> bool:
        """Whether a report with these dependencies is in the folder, every file as it was written."""
        values = read_record(self.path / REPORTED, FORMAT_VERSION)
        if values is None or values["identity"] != identity.digest:
            return False
        damaged = self._damaged(values["files"])
        if damaged:
            tell(f"warning: {self.path / damaged[0]} is not what was written: the report is made again")
        return not damaged

    def check_digests(self) -> None:
        """Refuse what is not as it was written. Nothing is written into the folder, not even a lock.

        A folder that has no record of digests, as those of earlier versions, is warned of.

        Raises:
            ValueError: A file of the pipeline, or the record, is missing or changed.
        """
        record = next((name for name in (FINISHED, WRITTEN) if (self.path / name).is_file()), None)
        if record is None:
            if self.holds_weights() and leads():
                warn_once(
                    f"{self.path} has no {FINISHED}, like what came from elsewhere and folders of earlier versions: "
                    "whether its files are what a run wrote cannot be told"
                )
            return
        values = read_record(self.path / record, FORMAT_VERSION)
        # Settings may say by hand where it goes.
        damaged = [record] if values is None else self._damaged(
            {name: digest for name, digest in values["files"].items() if name != CONFIG_NAME}
        )  # fmt: skip
        if damaged:
            place = "" if record == FINISHED else " in an empty folder"
            raise ValueError(
                f"{self.path / damaged[0]} is not what the run wrote: the same command as before makes it again{place}"
                f". To take the folder as it is, delete {self.state}"
            )

    def save_settings(self, config: SelectiveAmnesiaConfig) -> None:
        """Write settings that may change on finished weights, such as those of the evaluation, where they changed."""
        if read_record(self._finished_file, FORMAT_VERSION) is None:
            return
        with self.adding(CONFIG_NAME) as staging:
            config.save(staging / CONFIG_NAME)

    @contextlib.contextmanager
    def adding(self, name: str) -> Iterator[Path]:
        """Put a file beside finished weights, or in an earlier one's place, and on record, in one step.

        Args:
            name: Of the file, which the caller writes into the folder that is given.
        """
        values = read_record(self._finished_file, FORMAT_VERSION)
        assert values is not None
        with replacing_folder(self.path) as staging:
            yield staging
            files = {**values["files"], name: digest_of(staging / name)}
            (staging / STATE_FOLDER).mkdir()
            write_record(staging / FINISHED, FORMAT_VERSION, {**values, "files": files})

    def holds_weights(self) -> bool:
        """Whether there are weights of an erasure, whichever."""
        return (self.path / CONFIG_NAME).is_file()

    def validation_folder(self, identity: Identity, anew: bool = False) -> Path:
        """Where images of the training go: they join the earlier erasure's neither before nor without the weights.

        Args:
            identity: All that the trained weights depend on.
            anew: Whether weights of this identity count as an earlier erasure's too.
        """
        # Weights in a folder that this run took are its own, unless it has come to replace others.
        came_to_replace = (self._recorded() or {"replaces": True})["replaces"]
        own = self.names_finished(identity) or (self.is_of(identity) and not came_to_replace)
        apart = self.holds_weights() and (anew or not own)
        return (self.state if apart else self.path) / VALIDATION_NAME


def check_written(name: str | Path) -> None:
    """Finish what a run that died was putting in place; refuse what is not as a run wrote it, or is being written.

    Of several processes one finishes it, and the others wait.

    Args:
        name: An erased model's folder; what is none is left alone.
    """
    if Path(name).is_dir():
        folder = OutputFolder(name)
        if leads():
            # What a run that lives is putting in place is its own to finish.
            folder.lock.check()
            finish_interrupted(name)
        else:
            wait_until(lambda: not is_interrupted(name))
        folder.check_digests()


def holds_run(folder: Path) -> bool:
    """Whether a run took a folder for its output, rather than that something was merged, extracted or copied there."""
    return any(entry != folder / WRITTEN for entry in (folder / STATE_FOLDER).glob("*"))


def model_files(folder: Path) -> list[str]:
    """Entries of a folder that an erased model in it consists of: parts of a pipeline, or an adapter."""
    return [*(name for name in (ADAPTER_FILE, KOHYA_FILE) if (folder / name).is_file()), *of_a_pipeline(folder)]


def weights_in(folder: str | Path) -> dict[str, str]:
    """The digests of an erased model's weight files by their paths inside of its folder: those on record, and of others
    what they are now. Empty for a name on the Hub."""
    folder = Path(folder)
    values = read_record(folder / FINISHED, FORMAT_VERSION)
    recorded = {} if values is None else values["files"]
    # A second form of an adapter comes and goes without the first.
    parts = [folder / name for name in model_files(folder) if name != KOHYA_FILE]
    files = [file for part in parts for file in ([part] if part.is_file() else sorted(part.rglob("*")))
             if file.suffix in WEIGHT_SUFFIXES]  # fmt: skip
    names = [file.relative_to(folder).as_posix() for file in files]
    return {name: recorded.get(name) or digest_of(folder / name) for name in names}


def write_finished(staging: Path, identity: Identity, made: Mapping[str, Passes | None] | None = None) -> None:
    """Record in a folder that is about to become an output folder what its weights depend on, and all digests.

    Args:
        staging: The folder.
        identity: What the weights depend on.
        made: Stage -> what its part of them took of the network.
    """
    files = {name: digest for name, digest in digests_of(staging).items()
             if Path(name).parts[0] != VALIDATION_NAME and not Path(name).parts[-1].startswith(".")}  # fmt: skip
    (staging / STATE_FOLDER).mkdir()
    told = {title: passes and passes.to_dict() for title, passes in (made or {}).items()}
    values = {"facts": dict(identity.facts), "files": files, "made": told}
    write_record(staging / FINISHED, FORMAT_VERSION, values)


def write_digests(staging: Path) -> None:
    """Record in a folder that no training writes the digests of all that its model consists of.

    Args:
        staging: The folder, about to take its place.
    """
    parts = model_files(staging)
    files = {name: digest for name, digest in digests_of(staging).items() if Path(name).parts[0] in parts}
    (staging / STATE_FOLDER).mkdir()
    write_record(staging / WRITTEN, FORMAT_VERSION, {"files": files})
