"""The rules of the house: one-way imports, a README whose commands exist, nothing pickled."""

import ast
import json
import re
import subprocess
import sys

import pytest

import sa_diffusers

from .conftest import REPOSITORY

PACKAGE = REPOSITORY / "sa_diffusers"
# Each room may import those before it.
ORDER = [
    "version",
    "moved",
    "files",
    "identity",
    "seeds",
    "passes",
    "quantization",
    "footprint",
    "processes",
    "messages",
    "texts",
    "markup",
    "names",
    "weights",
    "parameter_selection",
    "samplers",
    "models",
    "families",
    "configuration",
    "environment",
    "training.checkpoints",
    "output_folder",
    "hub",
    "results",
    "report",
    "publish",
    "data",
    "fisher",
    "training",
    "cache",
    "evaluation",
    "merging",
    "base_training",
    "stages",
    "erasure",
    "unlearn",
    "trainer",
    "commands",
    "command_line",
    "__main__",
    "model_card",
    "objectives",
    "checkpoints",
    "ewc",
]


def room(module: str) -> str:
    """A room, or a part of one that stands apart because others read it too."""
    part = ".".join(module.split(".")[:2])
    return part if part in ORDER else module.split(".")[0]


def imports(path):
    """The rooms that a file imports, relative and absolute."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level == depth and node.module:
                yield room(node.module)
            elif node.level == depth:
                yield from (room(alias.name) for alias in node.names)
            elif node.level == 0 and (node.module or "").startswith("sa_diffusers."):
                yield room(node.module.removeprefix("sa_diffusers."))


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        own = room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        if own == "__init__":
            continue
        for other in imports(path):
            if other != own:
                assert ORDER.index(other) < ORDER.index(own), f"{path} imports {other}"


def test_evaluation_never_sees_the_trainer():
    for path in (PACKAGE / "evaluation").rglob("*.py"):
        assert not {"training", "fisher", "erasure"} & set(imports(path))


def test_fisher_and_trainer_ask_for_no_kind_of_model():
    for path in (*(PACKAGE / "fisher").glob("*.py"), *(PACKAGE / "training").glob("*.py")):
        assert not re.search(r"StableDiffusion|LatentDiffusion|isinstance\(.*[Oo]bjective", path.read_text())


def test_nothing_is_pickled_or_read_unsafely():
    for path in (*PACKAGE.rglob("*.py"), *(REPOSITORY / "examples").glob("*.py")):
        for line in path.read_text().splitlines():
            assert not re.search(r"import pickle|torch\.save\(|weights_only=False", line), f"{path}: {line}"
            if "torch.load(" in line:
                assert "weights_only=True" in line, f"{path}: {line}"


def test_public_names_are_importable_and_documented():
    for name in sa_diffusers.__all__:
        value = getattr(sa_diffusers, name)
        if not isinstance(value, str):
            assert value.__doc__, name


def test_the_script_is_thin():
    assert len((REPOSITORY / "examples" / "train_sa.py").read_text().splitlines()) < 200


def test_flags_in_the_readme_exist():
    from sa_diffusers.commands.erase import build_parser

    known = build_parser().format_help()
    text = (REPOSITORY / "README.md").read_text()
    for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
        if "train_sa.py" in block:
            for flag in re.findall(r"(?<!\S)--(\w+)", block.split("train_sa.py", 1)[1]):
                assert f"--{flag}" in known, flag


def test_make_targets_in_the_readme_exist():
    text = (REPOSITORY / "README.md").read_text()
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


SCRIPTS = [path for folder in ("examples", "benchmarks") for path in sorted((REPOSITORY / folder).glob("*.py"))]


# One process imports what the scripts share once; each script still runs as `python script.py --help` would run it.
ASK_FOR_HELP = """
import contextlib, io, json, os, runpy, sys, traceback

answers = {}
for script in sys.argv[1:]:
    sys.argv, sys.path[0] = [script, "--help"], os.path.dirname(script)
    code, output = 0, io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            code = traceback.format_exc()
    answers[script] = [code, output.getvalue()]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def helps():
    command = [sys.executable, "-c", ASK_FOR_HELP, *map(str, SCRIPTS)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_shown(helps, script):
    code, output = helps[str(script)]
    assert code == 0, code
    assert "usage" in output
