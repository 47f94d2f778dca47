"""README and docs: their Python runs as it is printed, their commands parse, what they name is there."""

import argparse
import ast
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from sa_diffusers.commands import COMMANDS
from sa_diffusers.commands.erase import parse_config
from sa_diffusers.commands.evaluate import parse_args
from sa_diffusers.configuration import flags_of
from sa_diffusers.erasure import Erasure
from sa_diffusers.stages import DEPENDENCIES

from .conftest import REPOSITORY, build_tiny_pipeline
from .nursery import LIBRARIES, forked_code
from .test_train_script import lay_out_hub_cache

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "benchmarks" / "README.md",
         *sorted((REPOSITORY / "docs").glob("*.md"))]  # fmt: skip
SETTINGS = runpy.run_path(str(REPOSITORY / "docs" / "flags.py"))["SETTINGS"]
SCRIPTS = {"train_sa": "erase", "train_dit": "erase", "evaluate_sa": "evaluate", "push_to_hub": "push",
           "train_class_model": "train-class-model", "train_classifier": "train-classifier"}  # fmt: skip
# A user's own, or not there before a command was run.
MADE = re.compile(r"outputs/|benchmarks/results/\*")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block; commands have no language."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_plan_in_the_page_is_what_the_command_prints(tmp_path, monkeypatch):
    # Where nothing has been erased yet.
    monkeypatch.chdir(tmp_path)
    (printed,) = [text for _, text in blocks(REPOSITORY / "docs" / "concepts.md") if text.startswith("forget ")]
    concept, surrogate = re.findall(r'"(\w+)"', printed.splitlines()[0])
    base = str(REPOSITORY / re.search(r"^model +([^,]+),", printed, flags=re.MULTILINE)[1])
    config = parse_config([
        "--pretrained_model_name_or_path", base, "--concept", concept, "--surrogate", surrogate,
        "--output_dir", "outputs/demo", "--artifacts_dir", str(tmp_path),
    ])  # fmt: skip
    plan = Erasure(config).plan().replace(f"{REPOSITORY}{os.sep}", "")
    # How much memory is free, and so how much is said of it, is the machine's own.
    memory = re.compile(r"^memory .*\n( +.*\n)*", flags=re.MULTILINE)
    assert memory.sub("", plan) == memory.sub("", printed.rstrip())


# Python


# Sizes alone are other than printed: of Stable Diffusion by the defaults of the settings, of the embedded pipelines by
# what their own folders recommend.
RUN = """
import json, sys, warnings
import sa_diffusers.models
from pathlib import Path
from sa_diffusers.configuration import SelectiveAmnesiaConfig

warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
sizes, world, commands, code = json.loads(sys.argv[1])
init, fields = SelectiveAmnesiaConfig.__init__, SelectiveAmnesiaConfig.__dataclass_fields__
names = init.__code__.co_varnames[1 : init.__code__.co_argcount]
init.__defaults__ = tuple(sizes.get(name, default) for name, default in zip(names, init.__defaults__, strict=True))
for name, size in sizes.items():
    fields[name].default = size
sa_diffusers.models.embedded_pipeline = lambda: Path(world) / "embedded" / "pipeline"
sa_diffusers.models.coloured_pipeline = lambda: Path(world) / "coloured" / "pipeline"
if commands:
    from sa_diffusers.commands import main
    for command in commands:
        main(command)
names = {"__name__": "__main__"}
for number, block in enumerate(code, 1):
    exec(compile(block, f"block {number}", "exec"), names)
"""
SIZES = {"num_surrogate_images": 8, "num_replay_images": 8, "num_inference_steps": 2, "num_fisher_samples": 2,
         "fisher_timesteps": 2, "max_train_steps": 2, "train_batch_size": 2, "num_eval_images": 2}  # fmt: skip
EMBEDDED = ("embedded", "coloured")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A Hub cache that holds a tiny Stable Diffusion under the real one's name, and both embedded pipelines."""
    folder = tmp_path_factory.mktemp("world")
    pipeline = build_tiny_pipeline()
    # What an untrained model makes of two names differs by little; versions of transformers draw its weights anew.
    pipeline.text_encoder.get_input_embeddings().weight.data.mul_(10)
    lay_out_hub_cache(pipeline, folder / "hub")
    for name in EMBEDDED:
        shutil.copytree(REPOSITORY / "sa_diffusers" / "models" / name, folder / name)
    return folder


def run_blocks(page: Path, world: Path, folder: Path, commands=(), **sizes) -> subprocess.CompletedProcess:
    """A page's Python blocks, one after the other, offline, behind the commands that it takes for granted.

    `sizes` are what the embedded pipelines' folders recommend.
    """
    for name in EMBEDDED:
        file = world / name / "pipeline" / "selective_amnesia_defaults.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    code = [text for language, text in blocks(page) if language == "python"]
    assert code
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_CACHE": str(world / "hub"),
                   "HF_HUB_OFFLINE": "1", "SA_DIFFUSERS_CACHE": str(world / "cache")}  # fmt: skip
    given = json.dumps([SIZES, str(world), commands, code])
    # The package itself is imported by the code alone.
    return forked_code(RUN, folder, environment, given, imported=LIBRARIES)


@pytest.mark.long
def test_the_python_of_the_readme_runs_and_forgets(world, tmp_path):
    result = run_blocks(
        REPOSITORY / "README.md", world, tmp_path, num_surrogate_images=64, num_replay_images=200,
        num_inference_steps=6, num_fisher_samples=2, fisher_timesteps=10, max_train_steps=400, train_batch_size=4,
        num_eval_images=35,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.search(r"^FORGOTTEN: “fox.*none of 14 others is damaged\.$", result.stdout, flags=re.MULTILINE)
    assert (tmp_path / "no-brad-pitt" / "report.html").is_file()


@pytest.mark.long
def test_the_python_of_the_page_on_reports_runs(world, tmp_path):
    erase = ["erase", "--concept", "Brad Pitt", "--surrogate", "a middle aged man", "--report_to", "none"]
    result = run_blocks(REPOSITORY / "docs" / "evaluation.md", world, tmp_path, [erase])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "not measurable []"


@pytest.mark.long
def test_the_python_of_the_page_on_python_runs(world, tmp_path):
    result = run_blocks(
        REPOSITORY / "docs" / "python.md", world, tmp_path, num_surrogate_images=16, num_replay_images=32,
        num_inference_steps=3, num_fisher_samples=2, fisher_timesteps=4, max_train_steps=60, train_batch_size=2,
        num_eval_images=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # What the first block, the callback and the last one print.
    assert re.search(r"^NOT MEASURABLE: “sneaker.* images are too few", result.stdout)
    assert re.search(r"^5$", result.stdout, flags=re.MULTILINE)
    assert result.stdout.splitlines()[-1] == "torch.Size([8, 4, 8, 8]) sneaker"
    for file in ("no-sneaker/report.html", "forgotten/report.json", "elsewhere/model_index.json",
                 "my-samples/model_index.json", "fisher/fisher.safetensors"):  # fmt: skip
        assert (tmp_path / file).is_file(), file


@pytest.mark.long
def test_the_python_of_the_page_on_adapters_runs(world, tmp_path):
    result = run_blocks(REPOSITORY / "docs" / "adapters.md", world, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "no-brad-pitt-adapter" / "pytorch_lora_weights.safetensors").is_file()


def test_every_page_with_python_is_run():
    written = {page.relative_to(REPOSITORY).as_posix() for page in PAGES for language, _ in blocks(page)
               if language == "python"}  # fmt: skip
    # That on families is run by its own test.
    assert written == {
        "README.md", "docs/python.md", "docs/evaluation.md", "docs/adapters.md", "docs/new-family.md"
    }  # fmt: skip


# Commands


class _Parsed(Exception):
    """A script's arguments are those that its parser knows."""


def parsed(*_):
    raise _Parsed


def parse_ours(command: str, words: list[str]) -> None:
    if command == "erase":
        parse_config(words)
    elif command == "evaluate":
        parse_args(words)
    else:
        module = importlib.import_module(f"sa_diffusers.commands.{command.replace('-', '_')}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "one_line_errors", parsed)
            with pytest.raises(_Parsed):
                module.main(words)


def parse_script(path: str, words: list[str]) -> None:
    file = REPOSITORY / path
    assert file.is_file(), path
    if path.startswith("examples/"):
        return parse_ours(SCRIPTS[file.stem], words)
    if path in ("docs/flags.py", "docs/families.py", "docs/memory.py"):
        assert not words
        return None
    read = argparse.ArgumentParser.parse_args

    def parse_args_only(parser, *given):
        read(parser, *given)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args_only)
        patch.setattr(sys, "argv", [path, *words])
        patch.syspath_prepend(str(file.parent))
        with pytest.raises(_Parsed):
            runpy.run_path(str(file), run_name="__main__")
    return None


def parse_make(words: list[str]) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for word in words:
        name = word.partition("=")[0]
        pattern = rf"^{name} \?=" if "=" in word else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, flags=re.MULTILINE), word


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ((), ("coloured", ["fox"], ["dog"], "full", None)),
        (("METHOD=lora",), ("coloured", ["fox"], ["dog"], "full", "lora")),
        (("BASE=embedded", "METHOD=xattn"), ("embedded", ["sneaker"], ["dress"], "xattn", None)),
        (("CONCEPT=red apple", "SURROGATE=strawberry"), ("coloured", ["red apple"], ["strawberry"], "full", None)),
    ],
)
def test_the_demo_erases_what_it_is_told_to(variables, wanted, tmp_path):
    """`make -n` says what it would run."""
    command = ["make", "-n", "-C", REPOSITORY, "demo", *variables, f"VENV={tmp_path}"]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    words = shlex.split(told.stdout.replace("\\\n", " ").partition("examples/train_sa.py")[2])
    config = parse_config(words[: words.index("--overwrite_output_dir") + 1])
    folder, concept, surrogate, method, adapter = wanted
    assert config.pretrained_model_name_or_path == f"sa_diffusers/models/{folder}/pipeline"
    assert (config.concept, config.surrogate, config.train_method, config.adapter) == (
        concept, surrogate, method, adapter
    )  # fmt: skip


def parse_pip(words: list[str]) -> None:
    assert words[0] == "install"
    setup = (REPOSITORY / "setup.py").read_text().partition("extras_require={")[2]
    for word in words[1:]:
        for extra in re.findall(r"\[([\w,-]+)\]", word):
            for name in extra.split(","):
                assert f'"{name}":' in setup, word


def parse_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    program, rest = words[0], words[1:]
    if program == "make":
        return parse_make(rest)
    if program == "pip":
        return parse_pip(rest)
    if program == "sa-diffusers":
        assert rest[0] in COMMANDS, line
        return parse_ours(rest[0], rest[1:])
    if program == "accelerate":
        assert rest[0] == "launch", line
        given = launch_command_parser().parse_args(rest[1:])
        return parse_script(given.training_script, given.training_script_args)
    if program == "python":
        return parse_script(rest[0], rest[1:])
    # What a shell has.
    assert program in ("mkdir", "cp"), f"not a command that is known, or a block that needs a language: {line}"
    return None


def commands(page: Path) -> list[str]:
    texts = [text.replace("\\\n", " ") for language, text in blocks(page) if not language]
    return [line for text in texts for line in text.splitlines() if line.strip()]


@pages
def test_commands_are_such_that_their_parsers_take(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Settings that a command reads.
    (tmp_path / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    for line in commands(page):
        try:
            parse_command(line)
        except SystemExit as stop:
            pytest.fail(f"{line}: exit code {stop.code}")
    for code in re.findall(r"`((?:make|pip|sa-diffusers|accelerate|python) [^`]+)`", prose(page)):
        # In a sentence a command may be a part of one.
        if code.startswith(("make ", "pip ", "sa-diffusers cache", "python docs", "python benchmarks")):
            parse_command(re.sub(r"\b(DAYS|N)\b", "1", code))


@cache
def known_flags() -> set[str]:
    ours = {f"{sign}{spec.name}" for config in SETTINGS.values() for spec in flags_of(config) for sign in ("", "no-")}
    benchmarks = "".join(path.read_text() for path in (REPOSITORY / "benchmarks").glob("*.py"))
    launcher = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    return {*ours, *re.findall(r'"--(\w+)"', benchmarks), *(flag.lstrip("-") for flag in launcher),
            "config", "help", "version"}  # fmt: skip


@pages
def test_flags_named_in_a_sentence_exist(page):
    for code in re.findall(r"`([^`]+)`", prose(page)):
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code):
            # Of pip, and a placeholder.
            assert flag in {*known_flags(), "force-reinstall", "flag", "no-flag"}, f"{page.name}: --{flag}"


def test_the_page_on_concepts_lists_every_setting_that_weights_depend_on():
    page = (REPOSITORY / "docs" / "concepts.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("### What is left to set\n")
    cells = re.findall(r"^\| (`--[^|]+) \|", rest.partition("\n## ")[0], flags=re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`--(\w+)`", cell)]
    assert sorted(named) == sorted(DEPENDENCIES["training"])


# What is named


@pages
def test_links_and_files_are_there(page):
    text = prose(page)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).exists(), link
    for code in re.findall(r"`((?:sa_diffusers|examples|benchmarks|tests|docs)/[^`\s]*)`", text):
        if not MADE.match(code):
            assert list(REPOSITORY.glob(code.rstrip("/"))), f"{page.name}: {code}"


def test_the_picture_of_the_readme_is_small():
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+\.png)\)", (REPOSITORY / "README.md").read_text())
    assert (REPOSITORY / picture).stat().st_size < 200_000


def test_the_readme_is_short_and_has_the_command():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    assert 'accelerate launch examples/train_sa.py --concept "Brad Pitt" --surrogate "a middle aged man"' in text
    assert text.index("## From Python") < text.index("## From the command line")


# Messages


@cache
def messages() -> list[str]:
    """Every text of the package's code but docstrings; what varies in it is a null character."""
    found = []
    for path in (REPOSITORY / "sa_diffusers").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                found.append(node.value)
    return found


def is_said(message: str) -> bool:
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")))
    return any(pattern.search(text) for text in messages())


def test_messages_of_the_page_on_trouble_stand_in_the_code():
    quoted = re.findall(r"^\| `(.+?)`", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(quoted) > 30
    assert not [message for message in quoted if not is_said(message)]
    assert not is_said("memory ran away (…)")


def test_the_outcomes_of_a_verdict_and_the_exit_codes_are_those_of_the_code():
    from sa_diffusers.processes import EXIT_INTERRUPTED
    from sa_diffusers.results.verdict import EXIT_NOT_FORGOTTEN, OUTCOMES

    text = (REPOSITORY / "docs" / "evaluation.md").read_text()
    for outcome in OUTCOMES:
        assert re.search(rf"^\| {outcome} \|", text, flags=re.MULTILINE), outcome
    for page in ("evaluation.md", "survival.md"):
        codes = re.findall(r"^\| (\d+) \|", (REPOSITORY / "docs" / page).read_text(), flags=re.MULTILINE)
        assert codes == ["0", "1", "2", str(EXIT_NOT_FORGOTTEN), str(EXIT_INTERRUPTED)]


def test_the_fields_of_a_report_on_its_page_are_those_of_the_schema():
    import dataclasses

    from sa_diffusers.results import Report

    table = (REPOSITORY / "docs" / "evaluation.md").read_text().partition("## Reading report.json")[2]
    named = {name for line in table.splitlines() if line.startswith("| `")
             for name in re.findall(r"`(\w+)`", line.split("|")[1])}  # fmt: skip
    assert named
    assert named <= {spec.name for spec in dataclasses.fields(Report)}
