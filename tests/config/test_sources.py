"""Which source may set which option; what people type first; every message in people's words."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from train.config.errors import InputError
from train.config.objects import Objects
from train.config.options import EvalConfig, TrainConfig, ValConfig
from train.config.reading import parse
from train.config.sources import FROM_CHECKPOINT, FROM_FILE
from train.config.words import printable
from train.model.build import build_model
from train.model.weights import as_checkpoint
from train.validate import validated_with

# Options that run code, or name a place that is written over or appended to, or one that such a place is read from;
# and one that is another thing in Ultralytics' files
DANGEROUS = {"trust_checkpoint", "log_file", "resume", "save_dir", "predictions", "wandb_entity", "profile"}


def test_every_option_is_on_a_list_or_dangerous():
    every = {field.name for kind in (TrainConfig, ValConfig) for field in dataclasses.fields(kind)}
    assert every - FROM_FILE == DANGEROUS
    assert not FROM_CHECKPOINT & DANGEROUS
    assert FROM_CHECKPOINT < FROM_FILE
    assert not FROM_CHECKPOINT & {"project", "name", "wandb_project", "workers"}


@pytest.mark.parametrize(("kind", "name"), [(TrainConfig, n) for n in sorted(DANGEROUS & set(vars(TrainConfig())))])
def test_a_file_may_not_set_what_counts_from_the_command_line_alone(tmp_path: Path, kind: type[EvalConfig], name: str):
    value = {"trust_checkpoint": True, "profile": 20}.get(name, "victim")
    file = tmp_path / "args.yaml"
    file.write_text(f"{name}: {json.dumps(value)}\nepochs: 7\nproject: there\n")
    config, warnings = parse(kind, "", ["--cfg", str(file)])
    assert config == TrainConfig(epochs=7, project="there")
    assert warnings == [
        f"warning: {file} sets --{name.replace('_', '-')}, which counts from the command line alone and is left out"
    ]


def test_a_run_does_not_vouch_for_itself(tmp_path: Path):
    theirs = asdict(TrainConfig(trust_checkpoint=True, log_file="victim", resume="elsewhere")) | {"versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    config, warnings = parse(TrainConfig, "", ["--resume", str(tmp_path)])
    assert (config.trust_checkpoint, config.log_file, config.resume) == (False, "", str(tmp_path))
    assert len(warnings) == 1
    assert parse(TrainConfig, "", ["--resume", str(tmp_path), "--trust-checkpoint"])[0].trust_checkpoint


def test_a_checkpoint_does_not_choose_where_results_go(tmp_path: Path):
    model, _ = build_model(TrainConfig(), str(TINY), Objects(names={0: "a"}))
    theirs = {
        "save_dir": "victim",
        "log_file": "victim",
        "predictions": "victim",
        "trust_checkpoint": True,
        "conf": 0.1,
    }
    torch.save(as_checkpoint(model, asdict(TrainConfig()) | theirs, 0, {}), tmp_path / "best.pt")
    config, _ = parse(ValConfig, "", ["--weights", str(tmp_path / "best.pt")], validated_with)
    assert (config.save_dir, config.log_file, config.predictions, config.trust_checkpoint) == ("", "", "", False)
    assert config.conf == 0.1


def test_a_checkpoint_whose_options_are_nonsense_is_told_by_name(tmp_path: Path):
    model, _ = build_model(TrainConfig(), str(TINY), Objects(names={0: "a"}))
    torch.save(as_checkpoint(model, {"imgsz": "big", "max_dets": 5}, 0, {}), tmp_path / "best.pt")
    with pytest.raises(InputError, match=r"best\.pt: imgsz is 'big'; it must be a whole number\.\n.*max_dets is 5"):
        parse(ValConfig, "", ["--weights", str(tmp_path / "best.pt")], validated_with)


def test_a_run_is_named_as_people_name_it(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run" / "weights").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(TrainConfig(epochs=3)) | {"versions": {}}))
    for named in ("~/run", "~/run/weights/last.pt", f"{tmp_path}/run/weights/best.pt", f"{tmp_path}/run"):
        for arguments in (["--resume", named], [f"--resume={named}"]):
            config, _ = parse(TrainConfig, "", arguments)
            assert (config.resume, config.epochs) == (str(tmp_path / "run"), 3)
    moved, _ = parse(TrainConfig, "", ["--resume", "~/run", "--data", "elsewhere.yaml"])
    assert moved.data == "elsewhere.yaml"
    assert parse(TrainConfig, "", ["--data=~/d.yaml"])[0].data == f"{tmp_path}/d.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "0"], "no --device here; instead: CUDA_VISIBLE_DEVICES=0,1 says which GPUs; make train GPUS=2"),
        (["--batchsize", "8"], "no --batchsize here; instead: --batch"),
        (["--batch-size=8"], "no --batch-size here; instead: --batch"),
        (["--img", "640"], "instead: --imgsz"),
        (["--hyp", "x.yaml"], "instead: --cfg"),
        (["--half"], "instead: --mixed-precision fp16"),
        (["--weights", "yolov8n.pt"], "no --weights here; instead: --model"),
        (["--exist-ok"], "every run makes a folder of its own: --name"),
        (["data=coco.yaml", "epochs=3"], "options are written --data coco.yaml --epochs 3"),
        (["model=x.pt", "device=0"], "options are written --model x.pt --device 0"),
        (["--epochs", "ten"], "--epochs is 'ten'; it must be a whole number"),
        (["--epochs"], "--epochs has no value; it must be a whole number"),
        (["--epochs", "1.5"], "--epochs is '1.5'; it must be a whole number"),
        (["--lr0", "0,01"], "--lr0 is '0,01'; it must be a number"),
        (["--optimizer", "Lion"], "--optimizer is 'Lion'; it must be one of auto, SGD, MuSGD"),
        (["--max-dets", "1", "10"], "--max-dets is '1 10'; it must be three whole numbers"),
        (["--mixed-precision", "int8"], "--mixed-precision is 'int8'; it must be one of auto, bf16, fp16, no"),
        (["--fraction", "0"], r"--fraction is 0.0; it must be above 0\."),
        (["--val-fraction", "0"], r"--val-fraction is 0.0; it must be above 0 and at most 1\."),
        (["--seed", "4294967296"], "--seed is 4294967296; it must be between 0 and 4294967295"),
        (["--seed", "-1"], "--seed is -1; it must be between 0 and 4294967295"),
        (["--lr0", "inf"], "--lr0 is inf; it must be 0 or more"),
        (["--batch", "1000000000"], "--batch is 1000000000; it must be between 1 and 100000"),
        (["--resume", "r", "--cfg", "c.yaml"], "leave out --cfg"),
        (["--resume", "gone/weights/last.pt"], r"--resume gone/config.json cannot be read: No such file"),
        (["--cfg", "/dev/zero"], "--cfg /dev/zero is not a file"),
        (["--cfg", "."], r"--cfg \. is not a file"),
        (["--cfg", ""], r"--cfg is empty; is a variable not set\?"),
        (["--resume", ""], r"--resume is empty; is a variable not set\?"),
        (["--resume="], r"--resume is empty; is a variable not set\?"),
        (["--name", ""], "--name is empty; it must name the run's folder"),
        (["--imgsz", "640", "480"], "'480' belongs to no option"),
        (["foo"], "'foo' belongs to no option"),
        (["--epochs", "3", "batch=8"], "batch=8: options are written --batch 8"),
        (["--mosiac", "1"], r"There is no --mosiac here; is --mosaic meant\?"),
        (["-v"], "There is no -v here; --help lists the options"),
        (["\u2014epochs", "3"], "\u2014epochs: options begin with two hyphens, --epochs"),
    ],
)
def test_what_people_type_first_is_answered_in_their_words(arguments: list[str], message: str):
    with pytest.raises(InputError, match=message) as error:
        parse(TrainConfig, "", arguments)[0].check()
    assert not any(word in str(error.value).lower() for word in ("pydantic", "tyro", "none", "parse", "traceback"))


def test_no_flag_is_named_that_a_script_has_not():
    with pytest.raises(InputError) as error:
        parse(ValConfig, "", ["--batch-size", "8"])
    assert "instead: --batch" not in str(error.value)
    assert "--val-batch" in str(error.value)


def test_a_file_of_options_is_held_to_types_in_words(tmp_path: Path):
    (tmp_path / "args.yaml").write_text("epochs: many\nmax_dets: [1, 2]\nrect: 7\noptimizer: Lion\nclasses: {a: b}\n")
    with pytest.raises(InputError) as error:
        parse(TrainConfig, "", ["--cfg", str(tmp_path / "args.yaml")])
    said = str(error.value)
    assert "epochs is 'many'; it must be a whole number." in said
    assert "max_dets is a list; it must be three whole numbers." in said
    assert "rect is 7; it must be true or false." in said
    assert "optimizer is 'Lion'; it must be one of auto, SGD" in said
    assert "classes is a dict; it must be whole numbers." in said


def test_a_file_of_options_is_read_with_bounds(tmp_path: Path):
    file = tmp_path / "args.yaml"
    for content, message in (
        (b"epochs: 3\nepochs: 4\n", "says `epochs` twice, in line 1 and in line 2"),
        (b"epochs: 3 \xff\n", r"it is not UTF-8 \(byte 10\). Save it as UTF-8"),
        ("epochs: 3\n".encode("utf-16"), "it is UTF-16"),
        (b"a: [", "is not YAML that can be read"),
        (b"- epochs\n", "holds no options; it must be a mapping"),
        (b"", "holds no options"),
        (b"#" * 10_000_001, "is larger than 10 MB"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            parse(TrainConfig, "", ["--cfg", str(file)])
    file.write_bytes(b'"\\e[31mred": 1\n')
    assert parse(TrainConfig, "", ["--cfg", str(file)])[1]  # printed by run(), which makes it printable


def test_printable_text_stays_on_its_line():
    assert printable("a\x1b[41mX\x07\nb\u2028c") == r"a\x1b[41mX\x07\nb\u2028c"
    assert printable("caf\udce9.jpg") == r"caf\udce9.jpg"
    assert printable("火车 🍎 é") == "火车 🍎 é"
    assert printable("a\nb\tc", newlines=True) == "a\nb\\tc"
