"""Going on with a run: which one, whether that can be, and where."""

import json
import os
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from train.config.errors import InputError
from train.config.options import TrainConfig
from train.config.reading import check_unchanged
from train.config.sources import MAY_CHANGE, differences
from train.config.words import as_flag
from train.model.weights import load_detector
from train.processes import status
from train.processes.files import hold, new_folder, whole_file
from train.training.saves import BESTS, checksum, clear_drafts, hash_of, settle, states
from train.training.state import FORMAT

NEEDED: dict[str, Any] = {  # of a state, which may be a stranger's
    "epoch": int, "batches": int, "length": int, "best_epoch": int, "updates": int, "rows": list, "best": str,
    "picked": str, "wandb_id": str, "best_fitness": float, "best_ap": float, "last_ap": float, "elapsed": float,
    "pending": dict, "options": dict, "images": dict, "architecture": dict, "names": dict, "model": dict, "ema": dict,
    "optimizer": dict, "whole": dict | None, "since": dict | None, "scaler": dict | None,
}  # fmt: skip


def find_run(config: TrainConfig) -> str:
    """What `--resume auto` means: the newest unfinished run of this project and name that has the same options and that
    nobody is at; else a finished one; else none, which is empty. Call it on the main process.
    """
    project = Path(config.project)
    places = [path for path in project.glob(f"{_escaped(config.name)}*") if path.name[len(config.name) :].isdecimal()]
    finished = ""
    for place in sorted([project / config.name, *places], key=_begun, reverse=True):
        try:
            theirs = json.loads((place / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        told = status.read(place)
        may = MAY_CHANGE - {"data", "annotations"}
        if not isinstance(theirs, dict) or type(theirs.get("epochs")) is not int:
            continue
        if differences(asdict(config), theirs, may) or _busy(place):
            continue
        if told.get("state") == "finished" and theirs["epochs"] >= config.epochs:
            finished = finished or str(place)
        elif (states(place / "weights") or (place / "weights" / "state.pt").is_file()) and hold(place):
            return str(place)
    return finished


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _begun(place: Path) -> float:
    try:
        return float(status.read(place).get("started") or os.stat(place).st_mtime)
    except (OSError, TypeError, ValueError):
        return 0.0


def _busy(place: Path) -> bool:
    """Whether a process is at the run. One of another machine, whose end nobody could see, is given time to speak."""
    told = first = status.read(place)
    if first.get("host") != platform.node() and status.alive(first):
        print(f"waiting for a sign of life of {place} on {first.get('host')}", flush=True)
        while status.alive(told) and told.get("updated") == first.get("updated"):
            time.sleep(1)
            told = status.read(place)
    return status.alive(told)


def in_place(config: TrainConfig) -> bool:
    """Whether a run goes on in its own folder, and not in a new one that --project or --name ask for."""
    return (Path(config.project) / config.name).resolve() == Path(config.resume).resolve()


def read_run(config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """The newest whole state of the run that `--resume` names, and what there is to say of it. It is held from here on.

    Raises:
        InputError: the run cannot be gone on with.
    """
    run, weights = Path(config.resume), Path(config.resume) / "weights"
    if not states(weights) and not (weights / "state.pt").is_file():
        raise InputError(f"--resume {run}: there is no {weights}/state_….pt; nothing was saved there yet.")
    if in_place(config):
        _check_place(run)
    saved, said = _newest_whole(run, config)
    check_unchanged(asdict(config), saved["options"])
    own, theirs = asdict(config), saved["options"]
    if config.epochs != theirs["epochs"]:
        saved["length"] = 0  # --epochs takes the place of what --time has planned
    done, within = saved["epoch"] + 1, saved["batches"] > 0
    if (epochs := length(config, saved)) < done + within:
        what = f"{done + within} epochs of {run} are {'begun' if within else 'done'}"
        raise InputError(f"--epochs is {epochs}, but {what}; --epochs {done + 10}, say.")
    changed = [n for n in differences(own, theirs) if n not in ("resume", "project", "name", "trust_checkpoint")]
    if changed:
        said.append("changed    " + ", ".join(f"{as_flag(n)} {theirs.get(n)!r} -> {own[n]!r}" for n in changed))
    if saved["best"] and saved["best"] not in (hash_of(weights / name) for name in BESTS):
        raise InputError(f"--resume {run}: the best.pt that belongs to it is not in {weights} any more. Put it back.")
    return saved, said


def _newest_whole(run: Path, config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """The newest state that is whole, and a sentence for each that is not."""
    weights = run / "weights"
    faults: list[str] = []
    found = states(weights)
    if not found:
        return _of_format_1(run, config), []
    for path in found:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved.get("format", 0) > FORMAT:
                raise InputError(f"--resume {run}: {path} was saved by a newer version of these scripts; update them.")
            told = saved.pop("checksum")
            fault = "" if told == checksum(saved) else "its checksum is wrong"
            if not all(isinstance(saved[name], kind) for name, kind in NEEDED.items()):
                fault = "it holds other things than a state"
        except InputError:
            raise
        except Exception as error:  # a damaged file fails in as many ways as there are bytes
            fault = type(error).__name__
        if not fault:
            return saved, [f"warning: {damaged}; the state before it is used" for damaged in faults]
        faults.append(f"{path} is damaged ({fault})")
    raise InputError(
        f"--resume {run}: {', '.join(faults)}, and there is no other. Start a new run from the weights: "
        f"--model {weights / 'last.pt'}"
    )


def _of_format_1(run: Path, config: TrainConfig) -> dict[str, Any]:
    """The state of a run that kept the ends of epochs alone, in one file; what is new is as at an epoch's end."""
    weights = run / "weights"
    model, _ = load_detector(str(weights / "last.pt"), config.trust_checkpoint)
    try:
        saved = torch.load(weights / "state.pt", map_location="cpu", weights_only=True)
        nothing = {"names": [], "losses": torch.zeros(1, 0, 1), "images": [], "norms": torch.zeros(0), "seconds": 0.0}
        new = {"batches": 0, "length": 0, "picked": "", "whole": None, "since": None, "elapsed": 0.0, "images": {}}
        saved |= new | {"pending": nothing, "best": hash_of(weights / "best.pt"), "options": asdict(config)}
        saved |= {"architecture": dict(model.yaml), "names": model.names}
        if not all(isinstance(saved[name], kind) for name, kind in NEEDED.items()):
            raise TypeError
        return {name: saved[name] for name in NEEDED}
    except Exception as error:
        raise InputError(
            f"--resume {run}: {weights / 'state.pt'} is damaged ({type(error).__name__}). Start a new run from the "
            f"weights: --model {weights / 'last.pt'}"
        ) from None


def _check_place(run: Path) -> None:
    """Raise InputError where the run may not be gone on with in its own folder; else hold it."""
    weights, told = run / "weights", status.read(run)
    for path in (run, *run.iterdir(), *weights.glob("*"), *(run / "logs").glob("*")):
        if path != run and path.is_symlink():  # it would be written through to wherever it leads
            raise InputError(
                f"--resume {run}: {path} is a link to {os.readlink(path)}, and would be written to. Put the file "
                "itself there, or remove it."
            )
    if not all(os.access(folder, os.W_OK | os.X_OK) for folder in (run, weights) if folder.exists()):
        raise InputError(
            f"--resume {run}: the folder cannot be written to. Go on in a new one: --resume {run} --project runs/detect"
        )
    if status.alive(told) or not hold(run):
        who = f", as process {told['pid']} on {told['host']}" if {"pid", "host"} <= told.keys() else ""
        raise InputError(f"--resume {run}: the run is still running{who}. Let it end, or end it.")


def length(config: TrainConfig, saved: dict[str, Any]) -> int:
    """Epochs of a run that is gone on with."""
    return saved["length"] or config.epochs


def nothing_left(config: TrainConfig, saved: dict[str, Any]) -> bool:
    """Whether a run that is gone on with is finished: its epochs or its patience are over, and it is measured."""
    over = saved["epoch"] + 1 >= length(config, saved) or saved["epoch"] - saved["best_epoch"] >= config.patience
    return over and status.read(Path(config.resume)).get("state") == "finished"


def open_folder(config: TrainConfig, saved: dict[str, Any] | None) -> Path:
    """The run's folder with what it is gone on from, its weights/ included. Call it on the main process.

    Raises:
        InputError: the folder cannot be made.
    """
    stays = saved is not None and in_place(config)
    folder = new_folder(Path(config.project), config.name, config.resume if stays else "")
    hold(folder)
    weights = folder / "weights"
    weights.mkdir(exist_ok=True)
    clear_drafts(folder)
    if saved is None:
        return folder
    if not stays:
        for file in (Path(config.resume) / "weights").glob("*.pt"):
            if file.name in (*BESTS, f"state_{saved['updates']}.pt"):
                with whole_file(weights / file.name) as draft:
                    shutil.copyfile(file, draft)
    for newer in states(weights):  # damaged, or of a time that will come again
        if int(newer.stem.removeprefix("state_")) > saved["updates"]:
            newer.unlink()
    settle(weights, saved["best"])
    return folder


def indivisible(config: TrainConfig, ranks: int) -> str:
    """What to say where the global batch cannot be dealt to so many processes."""
    wrong = f"--batch is {config.batch}; it must be divisible by the {ranks} processes"
    if not config.resume:
        return f"{wrong}, as {max(round(config.batch / ranks), 1) * ranks} is."
    fitting = ", ".join(str(n) for n in range(1, config.batch + 1) if config.batch % n == 0)
    return f"{wrong}. The run's batch stays as it is: go on with {fitting} processes."
