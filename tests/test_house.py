"""The house: which way imports run, what a wheel holds, and what the README's map says of it."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from tests.conftest import ROOT
from train import check_data
from train.config.options import TrainConfig, ValConfig
from train.config.reading import parse
from train.config.task_options import PoseConfig, SegmentConfig
from train.data.data_yaml import read_data_yaml
from train.doctor import Options

README = (ROOT / "README.md").read_text()
SCRIPTS = {
    "train/detect.py": TrainConfig, "train/segment.py": SegmentConfig, "train/pose.py": PoseConfig,
    "train/validate.py": ValConfig,
}  # fmt: skip


def lint(folder: Path) -> subprocess.CompletedProcess:
    """`lint-imports`, as `make check` runs it, in a folder."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (
            "training/engine.py",
            "from train.reporting import lines",
            "train.training is not allowed to import train.rep",
        ),
        ("config/reading.py", "from train.model import weights", "train.config is not allowed to import train.model"),
        ("model/loss.py", "from train.processes import watch", "train.model is not allowed to import train.processes"),
        ("data/formats.py", "from train.data import scan", "No circle inside a wing BROKEN"),
        ("utils.py", "", "train.utils"),  # of no layer
    ],
)
def test_an_import_against_the_arrows_is_found(tmp_path: Path, file: str, line: str, broken: str):
    shutil.copytree(ROOT / "train", tmp_path / "train", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "train" / file, "a") as module:
        module.write(f"{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert broken in " ".join(done.stdout.split())


def test_help_imports_nothing_that_takes_long():
    """It answers in two seconds: torch takes one of them; torchvision, matplotlib and W&B would take two more."""
    code = (
        "import runpy, sys\nsys.argv = ['train/detect.py', '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit:\n"
        "    print(sorted({'torchvision', 'matplotlib', 'wandb', 'torch._dynamo', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "Train a YOLO detector" in done.stdout


def test_what_catches_ctrl_c_while_modules_are_imported_comes_before_them():
    code = (
        "import sys, train.processes.early; print({'torch', 'numpy', 'accelerate', 'ultralytics'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_the_arrows_run_one_way():
    done = lint(ROOT)
    assert "2 kept, 0 broken" in done.stdout
    assert done.returncode == 0


def test_a_wheel_holds_all_of_it(tmp_path: Path):
    copy = tmp_path / "source"  # building leaves files in the source
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "tests", "__pycache__", "build", "runs", "datasets")
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, copy],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "elsewhere"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", home, wheel], check=True, capture_output=True, timeout=120
    )
    modules = {file.relative_to(ROOT) for file in ROOT.glob("train/**/*.py")}
    assert {file.relative_to(home) for file in home.glob("train/**/*.py")} == modules
    code = "import train; print(train.__file__)"  # like -m, -c puts the working directory first
    said = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, timeout=60).stdout
    assert said.strip() == str(home / "train" / "__init__.py")
    done = subprocess.run(
        [sys.executable, "-m", "train.detect", "--help"], cwd=home, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "--close-mosaic" in done.stdout


def test_the_quick_recipe_stands_back_where_the_user_says_what_to_train():
    for arguments, quick in (("", True), ("--epochs 3", True), ("--data x.yaml", False), ("--resume runs/x", False)):
        done = subprocess.run(["make", "-n", "train", f"ARGS={arguments}"], cwd=ROOT, capture_output=True, text=True)
        assert ("--mosaic 0" in done.stdout) == quick, done.stderr


# The README -----------------------------------------------------------------------------------------------------------
def defined(file: Path) -> set[str]:
    """Names of functions, classes and constants in a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_file_and_name_on_the_map_exists():
    rows = re.findall(r"^\| ([^|]+) \| (`train/[^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
    assert len(rows) > 25
    for what, places, names in rows:
        files = [ROOT / place for place in re.findall(r"`(.+?)`", places)]
        assert all(file.is_file() for file in files), what
        there = set().union(*(defined(file) for file in files))
        assert set(re.findall(r"`(.+?)`", names)) <= there, what
    wings = {folder.name for folder in (ROOT / "train").iterdir() if (folder / "__init__.py").is_file()}
    assert {place.split("/")[1] for _, places, _ in rows for place in re.findall(r"`(.+?)`", places)} >= wings
    assert set(re.findall(r'\["(\w+): ', README)) == wings
    for file in re.findall(r"`((?:train|tests|accelerate_configs)/[\w./]*)`", README):
        assert (ROOT / file).exists(), file


def commands() -> list[list[str]]:
    """The commands in the README's blocks, as words, and the arguments of `make` as the script gets them."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            words = shlex.split(line.lstrip("!"), comments=True)
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
                variables = dict(word.split("=", 1) for word in words[2:])
                assert set(variables) <= {"TASK", "GPUS", "CPUS", "PRECISION", "DATA", "ARGS"}, line
                task = variables.get("TASK", "detect")
                script = {"train": f"train/{task}.py", "validate": "train/validate.py"}.get(words[1])
                words = ["python", script, *shlex.split(variables.get("ARGS", ""))] if script else []
            if any(word in SCRIPTS for word in words):
                found.append(words)
    return found


def test_every_option_in_a_command_parses(tmp_path: Path, monkeypatch):
    shutil.copytree(ROOT / "tests" / "fixtures" / "run", tmp_path / "runs" / "detect" / "exp")
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert len(found) > 12
    for words in found:
        at = next(i for i, word in enumerate(words) if word in SCRIPTS)
        options = ["runs/detect/exp" if word.startswith("/kaggle/input/") else word for word in words[at + 1 :]]
        parse(SCRIPTS[words[at]], "", options)
        if "launch" in words[:at]:
            launcher = words[words.index("launch") + 1 :]
            assert launch_command_parser().parse_args(launcher).training_script == words[at]
    data, sweep = re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "data.yaml").write_text(data)
    assert read_data_yaml(tmp_path / "data.yaml").splits.keys() == {"train", "val"}
    content = yaml.safe_load(sweep)
    options = content["command"][content["command"].index("train/detect.py") + 1 :]
    parse(TrainConfig, "", [option for option in options if option != "${args_no_boolean_flags}"])
    assert set(content["parameters"]) <= {field.name for field in fields(TrainConfig)}


def test_every_option_in_the_text_is_one():
    kinds = (*SCRIPTS.values(), Options, check_data.Options)
    known = {field.name for kind in kinds for field in fields(kind)} | {"cfg", "help"}
    for words in re.findall(r"`(--[a-z][^`]*)`", README):
        for flag in re.findall(r"--([\w-]+)", words):
            name = flag.replace("-", "_")
            assert name in known or name.removeprefix("no_") in known, flag
