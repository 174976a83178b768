"""How fast a training is on this device, beside Ultralytics' own, and what single switches are worth.

Prints a line `T12 what: number unit` for each. Everything is drawn here; nothing is asserted.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import DETECT
from tests.labels import to_validate_on
from tests.test_cuda import Parts, parts
from train.data.files import find_data
from train.data.loaders import as_images, val_loader
from train.data.sets import ValSet
from train.evaluation import evaluate as evaluation
from train.evaluation.cocofiles import read_truth
from train.model.inference import inference_copy


def draw(folder: Path, images: int, size: int) -> Path:
    """Images of filled boxes on noise, as JPEGs, and their labels."""
    chance = np.random.default_rng(0)
    for split, number in (("train", images), ("val", images // 2)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(number):
            image = chance.integers(0, 255, (size // 8, size // 8, 3), dtype=np.uint8)
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
            lines = []
            for _ in range(6):
                x, y, w, h = chance.uniform(0.2, 0.8), chance.uniform(0.2, 0.8), *chance.uniform(0.05, 0.35, 2)
                corners = (np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * size).clip(0, size - 1).astype(int)
                kind = int(chance.integers(0, 3))
                colour = [0, 0, 0]
                colour[kind] = 255
                cv2.rectangle(image, tuple(map(int, corners[:2])), tuple(map(int, corners[2:])), colour, -1)
                lines.append(f"{kind} {x:.4f} {y:.4f} {w:.4f} {h:.4f}")
            cv2.imwrite(str(folder / "images" / split / f"{i}.jpg"), image)
            (folder / "labels" / split / f"{i}.txt").write_text("\n".join(lines))
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({
        "path": str(folder.resolve()), "train": "images/train", "val": "images/val", "names": ["a", "b", "c"],
    }))  # fmt: skip
    return file


def say(what: str, images: float, seconds: float, unit: str = "images/s") -> None:
    print(f"T12 {what}: {images / seconds:.0f} {unit}", flush=True)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def detect_script(data: Path, given: argparse.Namespace) -> None:
    options = f"--imgsz {given.imgsz} --batch {given.batch} --nbs {given.batch} --epochs {given.epochs} --workers 8"
    options += " --mixed-precision bf16 --trackers none --no-plots --close-mosaic 0"
    command = [sys.executable, str(DETECT), "--data", str(data), "--model", given.model, *options.split()]
    begun = time.perf_counter()
    console = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    whole = time.perf_counter() - begun
    lines = re.findall(r"^epoch \d+/\d+  train .*?(\d+) images in ([\d.]+) s", console, re.MULTILINE)
    images, seconds = lines[-1]
    say("train/detect.py, last epoch", float(images), float(seconds))
    training = sum(float(seconds) for _, seconds in lines)
    print(
        f"T12 train/detect.py, all: {whole:.1f} s, of them {training:.1f} s in {len(lines)} epochs' steps", flush=True
    )


def ultralytics(data: Path, given: argparse.Namespace) -> None:
    import ultralytics.engine.trainer as trainer
    from ultralytics import YOLO

    trainer.check_amp = lambda model: True  # it would fetch a model to try
    trainer.BaseTrainer.read_results_csv = lambda self: {}  # for its checkpoint, by a library that may not be there
    times: list[float] = []
    model = YOLO(given.model)
    model.add_callback("on_train_epoch_start", lambda _: times.append(-time.perf_counter()))

    def ended(_: object) -> None:
        wait()
        times[-1] += time.perf_counter()

    model.add_callback("on_train_epoch_end", ended)
    model.train(
        data=str(data), imgsz=given.imgsz, batch=given.batch, nbs=given.batch, epochs=given.epochs, amp=True,
        cache="ram", val=False, save=False, plots=False, workers=8, close_mosaic=0, verbose=False,
        device=0 if torch.cuda.is_available() else "cpu", project=str(data.parent / "theirs"),
    )  # fmt: skip
    images = len(list((data.parent / "images" / "train").iterdir())) // given.batch * given.batch
    say("yolo train, images in memory, last epoch", images, times[-1])


def steps(run: Parts, number: int) -> float:
    """Seconds of so many steps on one batch."""
    batch = next(iter(run.loader))
    for i in range(number + 4):
        if i == 4:  # the first make what is made once
            wait()
            begun = time.perf_counter()
        images = as_images(batch["img"], run.config.memory_format)
        losses, _ = run.state.detector.loss(batch, run.state.model(images))
        run.accelerator.backward(losses.sum())
        run.state.optimizer.step()
        run.state.optimizer.zero_grad()
    wait()
    return time.perf_counter() - begun


def switches(data: Path, given: argparse.Namespace, number: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"model": given.model, "imgsz": given.imgsz, "batch": given.batch, "optimizer": "AdamW"}
    for name, precision in (("benchmark", "bf16"), ("allow_tf32", "no")):
        with parts(device, data, precision, **options) as run:
            before = getattr(torch.backends.cudnn, name)
            for on in (False, True, False):
                setattr(torch.backends.cudnn, name, on)
                say(f"steps, cudnn.{name} {on}, {precision}", number * given.batch, steps(run, number))
            setattr(torch.backends.cudnn, name, before)
    with parts(device, data, "bf16", **options) as run:
        for fused in (None, True, None):  # None: torch's choice among the others; False would be one tensor at a time
            run.state.optimizer.state.clear()  # a fused optimizer counts its steps on the device
            for group in run.state.optimizer.param_groups:
                group["fused"] = fused
            say(f"steps, fused optimizer {bool(fused)}", number * given.batch, steps(run, number))
        files = find_data(str(data))
        labels = to_validate_on(files, run.config, run.accelerator)
        truth = read_truth(labels, files, run.config, run.accelerator)
        val_set = ValSet(labels, files, run.config, 32)
        loader = val_loader(val_set, run.config, run.accelerator)
        copied = inference_copy(run.state.ema.ema, run.accelerator.device, run.config.memory_format, losses=True)
        stages = evaluation._Laps.end

        def each(self: object, stage: str) -> None:
            wait()
            stages(self, stage)  # type: ignore[arg-type]

        for name, end in (("as it is", stages), ("a wait after each stage", each), ("as it is", stages)):
            evaluation._Laps.end = end  # type: ignore[method-assign]
            begun = time.perf_counter()
            evaluation.evaluate(copied, loader, truth, run.config, run.accelerator)
            say(f"validation, {name}", len(labels), time.perf_counter() - begun)
        evaluation._Laps.end = stages  # type: ignore[method-assign]


def buffers(data: Path, given: argparse.Namespace, number: int) -> None:
    """Of several ranks: what DDP's broadcast of buffers before each forward costs, and what its other options give."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"model": given.model, "imgsz": given.imgsz, "batch": 2 * given.batch, "optimizer": "AdamW"}
    with parts(device, data, "bf16", **options) as run:
        for on in (False, True, False, True):
            run.state.model.broadcast_buffers = on
            seconds = steps(run, number)
            if run.accelerator.is_main_process:
                say(f"steps on 2 ranks, broadcast of buffers {on}", 2 * number * given.batch, seconds)
        for name in ("as it is", "static_graph", "gradients in bf16", "as it is"):
            run.state.model = DistributedDataParallel(
                run.state.detector, gradient_as_bucket_view=True, static_graph=name == "static_graph"
            )
            run.state.model.broadcast_buffers = False
            if name == "gradients in bf16":
                run.state.model.register_comm_hook(None, bf16_compress_hook)
            seconds = steps(run, number)
            if run.accelerator.is_main_process:
                say(f"steps on 2 ranks, DDP {name}", 2 * number * given.batch, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("images", int), ("imgsz", int), ("batch", int), ("epochs", int), ("model", str), ("only", str)):
        parser.add_argument(f"--{name}", type=kind)
    given = parser.parse_args()
    data = draw(Path("drawn"), given.images if given.only is None else 2 * given.batch, given.imgsz)
    number = 20 if torch.cuda.is_available() else 2
    if given.only == "buffers":
        buffers(data, given, number)
        return
    detect_script(data, given)
    ultralytics(data, given)
    switches(data, given, number)


main()
