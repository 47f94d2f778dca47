"""Reading files of settings."""

import json
from pathlib import Path
from typing import Any

from ..messages import did_you_mean, near_paths, shown, shown_error
from ..texts import read_text

_EXPERIMENTS = Path(__file__).parent.parent / "configurations"


def experiments() -> dict[str, Path]:
    """The files of settings that come with the package, the paper's experiments, by name."""
    return {path.stem: path for path in sorted(_EXPERIMENTS.glob("*.yaml"))}


def read_mapping(path: str | Path) -> tuple[dict[str, Any], str]:
    """What a YAML (`.yaml`, `.yml`) or JSON file holds, and how messages name the file.

    Args:
        path: The file, or the name of one that comes with the package.

    Raises:
        ValueError: There is no such file, it is of another kind, or not a mapping.
    """
    place = f"configuration file {shown(str(path), 200)}"
    try:
        path = Path(path).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
        known = experiments() if not is_file else {}
    except (OSError, ValueError, RuntimeError):
        raise ValueError(f"{place} does not exist") from None
    if str(path) in known:
        path, is_file, is_folder = known[str(path)], True, False
    if is_folder:
        raise ValueError(f"{place} is a folder: give a file")
    if not is_file:
        if path.suffix == ".yaml" and path.stem in known:
            raise ValueError(f"{place} does not exist: it comes with the package, give its name, {path.stem}")
        raise ValueError(f"{place} does not exist{near_paths(path) or did_you_mean(str(path), known)}")
    if path.suffix in (".yaml", ".yml"):
        values = _read_yaml(read_text(path, place), place)
    elif path.suffix == ".json":
        values = _read_json(read_text(path, place), place)
    else:
        raise ValueError(f"{place} must end in .yaml, .yml or .json")
    if not isinstance(values, dict):
        raise ValueError(f"{place} must hold settings as `name: value`")
    return values, place


def _read_yaml(text: str, place: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a name that stands twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f'"{shown(name)}" stands twice')
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{place} is not valid YAML ({shown(error.problem or 'damaged')}{line})") from error
    except Exception as error:  # dates that are none, numbers too long, lists too deep: each fails in a way of its own
        raise ValueError(f"{place} is not valid YAML ({shown_error(error)})") from error


def _read_json(text: str, place: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'"{shown(name)}" stands twice')
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({shown_error(error)})") from error
