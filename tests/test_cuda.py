"""What only a GPU can show. Each test takes the device: on the CPU the same body runs in `make test`, or, where it
starts processes, in `make test-slow`, so that it cannot rot; `make test-cuda` runs them on a machine with one GPU, and
with them what is marked `on CUDA`.

Two ranks on one GPU are two machines of one process each, which is also how several machines are tested. NCCL takes
two ranks on one GPU since 2.30; for older ones each rank claims a host of its own; where neither works it is gloo.
"""

import contextlib
import copy
import gc
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from ultralytics import YOLO

from tests.conftest import DETECT, POSE, ROOT, SEGMENT, TINY, VALIDATE
from tests.labels import to_train_on, to_validate_on
from train.config.objects import Objects
from train.config.options import TrainConfig
from train.data.files import find_data
from train.data.loaders import train_loader, val_loader
from train.data.sets import TrainSet, ValSet
from train.data.shapes import draw_shapes
from train.evaluation.cocofiles import read_truth
from train.evaluation.evaluate import evaluate
from train.model.build import ModelEMA, build_model
from train.model.inference import _fp32, detect, inference_copy
from train.model.tasks import TASKS, build_criterion
from train.processes.accelerator import resolved, start_processes
from train.processes.stops import Stop
from train.processes.watch import Watch
from train.training.engine import Progress, train_one_epoch
from train.training.meter import Meter
from train.training.optim import Schedule, build_optimizer
from train.training.saves import copied, states, write_state
from train.training.state import TrainState

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")],
)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
# Several launches of processes: on the CPU their bodies run in `make test-slow`
on_each_device_slowly = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
WORKERS = ROOT / "tests" / "workers"
MODELS = {"cpu": str(TINY), "cuda": "yolov8n.yaml"}
SIZES = {"cpu": 64, "cuda": 320}
SPLITS = {"train": 40, "val": 21}
SCRIPTS = {"detect": DETECT, "segment": SEGMENT, "pose": POSE}
# Of the libraries, not of a run that is wrong
KNOWN = ("ended by SIG", "slower than the median rank", "share")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 40 images to train on and 21 to validate on."""
    return draw_shapes(tmp_path_factory.mktemp("data"), SPLITS)


def environment(device: str, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "YOLO_", "ACCELERATE_"))}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    return clean | ({"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}) | more


def started(device: str, *command: object, cwd: Path, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment(device, **more),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(device: str, *command: object, cwd: Path, **more: str) -> str:
    """Run a Python command, which must end well; its standard output."""
    process = started(device, *command, cwd=cwd, **more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out[-3000:]}\n{err[-3000:]}"
    return out


# One process, in its own scripts --------------------------------------------------------------------------------------
@dataclass
class Trained:
    folder: Path
    console: str


@cache
def trained(device: str, model: str, precision: str, data: Path, home: Path) -> Trained:
    """Two epochs of a training of the task that the model is named after, once for each combination."""
    name = Path(model).stem
    task = "segment" if "-seg" in name else "pose" if "-pose" in name else "detect"
    cwd = home / f"{device}-{name}-{precision}"
    cwd.mkdir()
    data = draw_shapes(data.parents[1], SPLITS, carries=TASKS[task].carries)
    options = f"--imgsz {SIZES[device]} --epochs 2 --batch 8 --nbs 8 --workers 2 --trackers none --no-plots"
    options += f" --optimizer AdamW --lr0 0.001 --mosaic 0 --mixed-precision {precision}"
    console = run(device, SCRIPTS[task], "--data", data, "--model", model, *options.split(), cwd=cwd)
    return Trained(cwd / "runs" / task / "exp", console)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    ("device", "model", "precision"),
    [("cpu", str(TINY), "bf16")]
    + [pytest.param("cpu", str(TINY).replace(".yaml", f"{kind}.yaml"), "bf16", marks=pytest.mark.slow)
       for kind in ("-seg", "26-pose")]
    + [pytest.param("cuda", f"{m}.yaml", "bf16", marks=CUDA.marks) for m in ("yolov8n-seg", "yolo26n-pose")]
    + [pytest.param("cuda", f"{m}.yaml", p, marks=CUDA.marks) for m in ("yolov8n", "yolo26n")
       for p in ("bf16", "fp16", "no")],
)  # fmt: skip
def test_t1_training(device: str, model: str, precision: str, data: Path, home: Path):
    done = trained(device, model, precision, data, home)
    named = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    assert f"processes  1 process on {named}" in done.console
    said = {"bf16": "bf16 (asked for)", "fp16": "fp16 (asked for)", "no": "fp32"}[precision]
    assert f"precision  {said}" in done.console
    if device == "cuda" and precision == "no":  # on CUDA
        assert "precision  fp32, TF32 in convolutions (asked for)" in done.console
    rows = (done.folder / "results.csv").read_text().splitlines()
    names = [name.strip() for name in rows[0].split(",")]
    values = [dict(zip(names, map(str.strip, row.split(",")), strict=True)) for row in rows[1:]]
    losses = [sum(float(row[name]) for name in names if re.fullmatch(r"train/\w+_loss", name)) for row in values]
    assert losses[0] > losses[1] > 0
    loaded = YOLO(str(done.folder / "weights" / "last.pt"))
    assert len(loaded.predict(np.zeros((64, 64, 3), np.uint8), device=device, verbose=False)) == 1
    log = (done.folder / "logs" / "rank0.log").read_text()
    strange = [line for line in log.splitlines() if " WARNING " in line and not any(known in line for known in KNOWN)]
    assert not strange


# In this process ------------------------------------------------------------------------------------------------------
@dataclass
class Parts:
    """What train/detect.py trains with, made as it makes it."""

    state: TrainState
    schedule: Schedule
    accelerator: Any
    loader: Any
    positions: Any
    meter: Meter
    watch: Watch
    config: TrainConfig

    def epoch(self) -> list[Progress]:
        self.positions.set(self.state.epoch + 1, self.state.batches, False)
        self.state.begin()
        batches = self.meter.timed(self.loader)
        done = list(train_one_epoch(self.state, batches, self.schedule, self.meter, self.watch, Stop(self.accelerator)))
        self.state.finish(self.state.epoch + 1)
        return done

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.state.detector.state_dict().items()}

    def saved(self, folder: Path) -> dict[str, Any]:
        """The state through a file."""
        write_state(folder, copied(self.state.content(self.config, self.meter, {})))
        return torch.load(states(folder)[0], map_location="cpu", weights_only=True)


@contextlib.contextmanager
def parts(
    device: str, data: Path, precision: str = "no", scale: float | None = None, **options: Any
) -> Iterator[Parts]:
    """The parts of a training on this device, of one process; `scale` is where a gradient scaler starts."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()
    defaults = {"data": str(data), "model": MODELS[device], "imgsz": SIZES[device], "batch": 8, "nbs": 8, "epochs": 6}
    defaults |= {"optimizer": "SGD", "lr0": 0.01, "warmup_epochs": 0.0, "workers": 0, "mosaic": 0.0, "log_interval": 99}
    watch = None
    try:
        accelerator, _ = start_processes(precision, [], seed=0)
        config = resolved(TrainConfig(**(defaults | options)), accelerator)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler(device, init_scale=scale)
        found = find_data(config.data)
        labels = to_train_on(found, config, accelerator)
        detector, _ = build_model(config, config.model, found)
        detector = detector.to(accelerator.device, memory_format=config.memory_format)
        ema = ModelEMA(detector)
        total = None if config.local_loss_norm else partial(accelerator.reduce, reduction="sum")
        detector.criterion = build_criterion(detector, total, 1)
        schedule = Schedule(config, images=len(labels), classes=3)
        model, optimizer = accelerator.prepare(detector, build_optimizer(detector, schedule))
        loader, positions = train_loader(TrainSet(labels, found, config), schedule.batches, accelerator)
        state = TrainState(detector, model, ema, optimizer, accelerator)
        watch = Watch(0, 1, 0, print)
        meter = Meter(accelerator, detector)
        yield Parts(state, schedule, accelerator, loader, positions, meter, watch, config)
    finally:
        if watch is not None:
            watch.close()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_CPU") if before is None else os.environ.update(ACCELERATE_USE_CPU=before)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a if a[name].is_floating_point())


def freeze_batchnorm(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None  # type: ignore[method-assign]


@on_each_device
def test_t2_no_step_waits_for_the_device(device: str, data: Path):
    ours: list[str] = []
    theirs: list[str] = []

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" not in str(message):  # another one says what the mode is
            return
        stack = [f for f in traceback.extract_stack() if f"{os.sep}torch{os.sep}" not in f.filename]
        inner = [f for f in stack if "ultralytics" in f.filename or f"{ROOT}{os.sep}train{os.sep}" in f.filename]
        if any(f.name == "gather" for f in inner):  # what a line measures
            return
        (theirs if inner and "ultralytics" in inner[-1].filename else ours).append(
            f"{inner[-1].filename}:{inner[-1].lineno} {inner[-1].line}" if inner else str(message)
        )

    with parts(device, data, "bf16", optimizer="AdamW") as run, warnings.catch_warnings():
        run.epoch()  # what is made once: moments, caches
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device == "cuda":  # on CUDA
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run.epoch()
            if device == "cuda":
                print(f"\nT2: Ultralytics' own waits in {run.schedule.batches} batches: {len(theirs)}")
                assert theirs  # the mode works
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert not ours, sorted(set(ours))


def three_steps(device: str, data: Path, model: str, tf32: bool) -> dict[str, torch.Tensor]:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        options = {"model": model, "imgsz": 96, "fraction": 24, "hsv_v": 0.0, "channels_last": False}
        with parts(device, data, **options) as run:  # type: ignore[arg-type]
            freeze_batchnorm(run.state.detector)
            assert len(run.epoch()) == 3
            return run.weights()
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@on_each_device
def test_t3_the_device_trains_what_the_cpu_trains(device: str, data: Path):
    model = MODELS[device]
    expected = three_steps("cpu", data, model, tf32=False)
    assert distance(three_steps(device, data, model, tf32=False), expected) < 1e-4
    print(f"\nT3: after three steps {device} is {distance(three_steps(device, data, model, True), expected):.2g} from "
          "the CPU where TF32 is allowed")  # fmt: skip


@on_each_device
def test_t4_boxes_are_decoded_in_true_fp32(device: str):
    torch.manual_seed(0)
    model, _ = build_model(TrainConfig(), "yolov8n.yaml", Objects(names={0: "a"}))
    cells = 40 * 40 + 20 * 20 + 10 * 10
    scores = torch.linspace(-4, 4, cells)[torch.randperm(cells)].reshape(1, 1, cells)
    raw = {"boxes": torch.randn(1, 64, cells) * 3, "scores": scores}
    raw["feats"] = [torch.zeros(1, 64, side, side) for side in (40, 20, 10)]  # type: ignore[assignment]

    def boxes(device: str, fp32: bool = True) -> torch.Tensor:
        copied = inference_copy(model, torch.device(device), torch.contiguous_format)
        moved = {k: [x.to(device) for x in v] if isinstance(v, list) else v.to(device) for k, v in raw.items()}
        with torch.inference_mode():
            if not fp32:
                return copied.model[-1]._inference(_fp32(moved)).cpu()
            return detect(moved, copied, conf=0.0, iou=1.0, max_det=cells)[0].cpu()

    ours, cpu = boxes(device), boxes("cpu")
    assert ours.shape == cpu.shape == (cells, 6)
    assert (ours[:, :4] - cpu[:, :4]).abs().max() < 1e-3
    print(f"\nT4: without it {(boxes(device, False) - boxes('cpu', False)).abs()[:, :4].max():.2g} px off")
    if device == "cuda":  # on CUDA; the switch is where it was
        assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("kind", ["", "-seg"])
@on_each_device_slowly
def test_t5_validation_gives_the_same_bits(device: str, kind: str, data: Path, home: Path):
    precision = "bf16"
    done = trained(device, MODELS[device].replace(".yaml", f"{kind}.yaml"), precision, data, home)
    places = [home / f"{device}{kind}{i}" for i in range(2)]
    consoles = [
        run(device, VALIDATE, "--weights", done.folder, "--save-dir", place, "--no-plots", "--workers", 2 * i, cwd=home)
        for i, place in enumerate(places)
    ]
    assert all("precision  bf16" in console for console in consoles)
    logged = json.loads((done.folder / "metrics.json").read_text())
    files = sorted(file.name for file in done.folder.glob("predictions*.json"))
    assert len(files) == (2 if kind else 1)
    for place in places:
        assert json.loads((place / "metrics.json").read_text()) == logged
        assert [digest(place / name) for name in files] == [digest(done.folder / name) for name in files]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@on_each_device
def test_t5_workers_change_no_image(device: str, data: Path):
    seen: dict[int, list[str]] = {}
    for workers in (0, 2):
        with parts(device, data, workers=workers, mosaic=1.0) as run:
            seen[workers] = []
            for epoch in range(3):
                run.positions.set(epoch, 0, False)
                for batch in run.loader:
                    seen[workers].append(hashlib.sha256(batch["img"].cpu().numpy().tobytes()).hexdigest())
    assert seen[0] == seen[2]
    assert len(set(seen[0])) == 15


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@on_each_device
def test_t6_steps_that_overflow_are_skipped(device: str, data: Path, optimizer: str):
    # fp16 is CUDA's; on the CPU fp32's range is left by a scale that is larger
    precision, scale = ("fp16", 2.0**40) if device == "cuda" else ("no", 2.0**127)
    with parts(device, data, precision, scale, optimizer=optimizer, nbs=16) as run:
        unscaled = 0
        if device == "cuda":  # on CUDA
            unscale = run.accelerator.scaler.unscale_

            def counted(*arguments: Any) -> Any:
                nonlocal unscaled
                unscaled += 1
                return unscale(*arguments)

            run.accelerator.scaler.unscale_ = counted
        before = {name: p.detach().cpu().clone() for name, p in run.state.detector.named_parameters()}
        steps = len(run.epoch())
        after = {name: p.detach().cpu() for name, p in run.state.detector.named_parameters()}
        assert steps == 3
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert run.accelerator.scaler.get_scale() == scale / 2**steps
        assert all(value.isfinite().all() for value in run.state.ema.ema.state_dict().values())
        assert device == "cpu" or unscaled == steps
        run.accelerator.scaler.update(64.0)
        run.epoch()
        after = {name: p.detach().cpu() for name, p in run.state.detector.named_parameters()}
        assert not all(torch.equal(before[name], after[name]) for name in before)


T7 = {
    "the same": ({}, {}, 1e-6),
    "another memory order": ({"channels_last": False}, {"channels_last": True}, 1e-4),
    "and back": ({"channels_last": True}, {"channels_last": False}, 1e-4),
    "the local norm": ({"local_loss_norm": True}, {"local_loss_norm": True}, 1e-6),
}


@pytest.mark.parametrize("case", T7)
@on_each_device_slowly
def test_t7_resume_on_another_kind_of_device(device: str, data: Path, tmp_path: Path, case: str):
    """The state of one epoch, saved on the CPU, then gone on with on the device, and the other way round."""
    first, second, near = T7[case]
    common = {"optimizer": "AdamW", "lr0": 1e-4, "model": str(TINY), "imgsz": 64, "fraction": 16}
    for start, end in ((device, device), ("cpu", device), (device, "cpu")):
        with parts(start, data, **(common | first)) as run:  # type: ignore[arg-type]
            run.epoch()
            saved = run.saved(tmp_path)
            run.epoch()
            expected = run.weights()
        with parts(end, data, **(common | second)) as run:  # type: ignore[arg-type]
            fused = run.state.optimizer.param_groups[0]["fused"]
            run.state.load(copy.deepcopy(saved), run.meter)
            assert run.state.optimizer.param_groups[0]["fused"] == fused == (end == "cuda")
            for p, slots in run.state.optimizer.state.items():
                assert all(v.stride() == p.stride() for v in slots.values() if torch.is_tensor(v) and v.dim())
            run.epoch()
            # Adam's first steps divide by the gradient's own size: bits of it that differ by device move a whole step
            assert distance(run.weights(), expected) < (near if start == end else 5e-4)
        if device == "cpu":
            break


@on_each_device
def test_t7_a_run_of_the_cpu_goes_on_in_fp16(device: str, data: Path, tmp_path: Path):
    with parts("cpu", data, optimizer="AdamW") as run:
        run.epoch()
        saved = run.saved(tmp_path)
    precision = "fp16" if device == "cuda" else "bf16"
    with parts(device, data, precision, optimizer="AdamW", model=MODELS["cpu"], imgsz=64) as run:
        run.state.load(saved, run.meter)
        run.epoch()
        assert all(value.isfinite().all() for value in run.weights().values())


@on_each_device_slowly
def test_t8_memory_does_not_grow(device: str, data: Path):
    def held() -> int:
        gc.collect()
        if device == "cuda":  # on CUDA
            return torch.cuda.memory_allocated()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    with parts(device, data, "bf16") as run:
        files = find_data(str(data))
        labels = to_validate_on(files, run.config, run.accelerator)
        truth = read_truth(labels, files, run.config, run.accelerator)
        loader = val_loader(ValSet(labels, files, run.config, 32), run.config, run.accelerator)
        at = []
        for _ in range(4):
            run.epoch()
            before = held()
            copied = inference_copy(run.state.ema.ema, run.accelerator.device, run.config.memory_format)
            result = evaluate(copied, loader, truth, run.config, run.accelerator)
            assert result.images == 21
            del copied, result
            at.append((before, held()))
    assert at[1] == at[3]
    assert at[3][0] == at[3][1]


# NCCL -----------------------------------------------------------------------------------------------------------------
# With addresses, for without a network the launcher looks for its machine's name in vain, for long.
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--local_addr", "127.0.0.1"]


@on_each_device_slowly
def test_t9_one_rank_with_a_process_group(device: str, data: Path, tmp_path: Path):
    """NCCL's collectives, of a group of one; and DDP over it by hand, for Accelerate wraps for several alone."""
    options = f"--imgsz {SIZES[device]} --epochs 1 --batch 8 --nbs 8 --workers 0 --trackers none --no-plots"
    base = ["--data", data, "--model", MODELS[device], *options.split()]
    standalone = [*TORCHRUN, "--master_addr", "127.0.0.1", "--master_port", free_port()]
    run(device, *standalone, DETECT, *base, cwd=tmp_path)
    weights = tmp_path / "runs" / "detect" / "exp"
    assert json.loads((weights / "status.json").read_text())["state"] == "finished"
    out = run(device, *standalone, WORKERS / "ddp.py", MODELS[device], *(["yolo26n.yaml"] * (device == "cuda")),
              cwd=tmp_path)  # fmt: skip
    assert out.count("the same gradients") == (4 if device == "cuda" else 2)
    print(out)
    if device == "cuda":  # on CUDA
        assert "backend nccl" in out
        run(device, *standalone, VALIDATE, "--weights", weights, "--no-plots", cwd=tmp_path)
    process = started(device, *standalone, WORKERS / "faulty.py", "input", 0, *base, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("now:"):
            break
    begun = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert process.returncode != 0
    assert err.count("error: bad input found late") == 1


@cache
def backend(device: str) -> tuple[dict[str, str], bool]:
    """Environment by which two ranks share the GPU, with {rank} in it, and whether they talk by gloo."""
    if device == "cpu":
        return {}, False
    lo = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}
    ways = [("NCCL", {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}), ("NCCL by two hosts", {"NCCL_HOSTID": "host{rank}"} | lo)]
    probe = (
        "import torch, torch.distributed as d; d.init_process_group('nccl'); t = torch.ones(4, device='cuda:0'); "
        "d.all_reduce(t); assert t.sum().item() == 8; import os; os._exit(0)"
    )
    for name, way in ways:
        port = str(free_port())
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", probe], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env=environment(device, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                | {k: v.format(rank=rank) for k, v in way.items()},
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            if all(rank.wait(timeout=20) == 0 for rank in ranks):
                print(f"\nTwo ranks on one GPU talk by {name}")
                return way, False
        except subprocess.TimeoutExpired:
            pass
        finally:
            for rank in ranks:
                rank.kill()
        print(f"\n{name}: {(ranks[0].stderr.read() or '')[-300:]}")  # type: ignore[union-attr]
    print("\nTwo ranks on one GPU talk by gloo")
    return {}, True


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(device: str, script: Path, *arguments: object, cwd: Path, **more: str) -> list[subprocess.Popen]:
    """A script on two ranks, as two machines of one process each, in folders of their own."""
    way, gloo = backend(device)
    port, ranks = free_port(), []
    for rank in range(2):
        (cwd / f"m{rank}").mkdir(exist_ok=True)
        machine = ["--nnodes", 2, "--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port]
        command = [*TORCHRUN, *machine, *([WORKERS / "gloo.py"] if gloo else []), script, *arguments]
        mine = {k: v.format(rank=rank) for k, v in way.items()}
        ranks.append(started(device, *command, cwd=cwd / f"m{rank}", **mine, **more))
    return ranks


def finished(ranks: list[subprocess.Popen]) -> list[str]:
    """Their standard outputs; they must end well."""
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(f"{out[-1500:]}\n{err[-2500:]}" for out, err in said)
    return [out for out, _ in said]


NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}


@cache
def one_rank(device: str, modes: tuple[str, ...], data: Path, home: Path) -> Path:
    """What one rank trains, by tests/workers/parity.py."""
    out = home / f"{device}-{modes[0]}"
    run(device, WORKERS / "parity.py", data, out, *modes, cwd=home, **NO_TF32)
    return out


@on_each_device_slowly
def test_t10_two_ranks_train_what_one_trains(device: str, data: Path, tmp_path: Path, home: Path):
    for modes in [("global",)] if device == "cpu" else [("global", "sync"), ("fp16",)]:
        finished(two_ranks(device, WORKERS / "parity.py", data, tmp_path, *modes, cwd=tmp_path, **NO_TF32))
        for mode in modes:
            one = torch.load(one_rank(device, modes, data, home) / mode / "rank0.pt", map_location="cpu")
            two = [torch.load(tmp_path / mode / f"rank{rank}.pt", map_location="cpu") for rank in range(2)]
            apart = distance(one["model"], two[0]["model"])
            print(f"\nT10: {mode}: {apart:.2g} apart")
            assert apart < {"global": 1e-5, "sync": 1e-4, "fp16": 1e-2}[mode]
            assert distance(two[0]["ema"], two[1]["ema"]) < 1e-6
            assert two[0]["scaler"] == two[1]["scaler"]
    if device == "cuda":  # on CUDA; of fp16
        assert two[0]["scaler"]["scale"] > 0


@on_each_device_slowly
def test_t10_two_ranks_give_the_same_ap(device: str, data: Path, tmp_path: Path, home: Path):
    one = trained(device, MODELS[device], "bf16", data, home).folder  # test_t5: it says what validate.py says
    options = ["--weights", one, "--no-plots", "--workers", 0, "--save-dir", tmp_path / "two"]
    finished(two_ranks(device, VALIDATE, *options, cwd=tmp_path))
    for file in ("metrics.json", "predictions.json"):
        assert digest(one / file) == digest(tmp_path / "two" / file)


T11 = [
    ("fail", 1, None, "ValueError: broken on purpose"),
    ("late-input", 0, None, "bad input found late"),
    ("kill", 1, None, "rank 1 of 2"),
    ("late-hang", 1, signal.SIGINT, "interrupted"),
    ("late-stop", 1, None, "rank 1 of 2; it does not answer"),
    ("hang", 1, None, "rank 1 of 2, at waiting for batch"),
]


@pytest.mark.parametrize(
    ("device", "kind", "rank", "number", "words"),
    [pytest.param("cpu", *case, marks=pytest.mark.slow) for case in T11]
    + [pytest.param("cuda", *case, marks=CUDA.marks) for case in T11],
)
def test_t11_one_rank_ends_all(device: str, data: Path, tmp_path: Path, kind: str, rank: int, number, words: str):
    """On one machine after the other; which files stand where is tested in tests/processes."""
    options = "--imgsz 64 --epochs 50 --batch 8 --nbs 8 --workers 0 --trackers none --no-plots --hang-timeout 10"
    mark = uuid.uuid4().hex
    ranks = two_ranks(
        device, WORKERS / "faulty.py", kind, rank, "--data", data, "--model", TINY, *options.split(), cwd=tmp_path,
        TEST_MARK=mark,
    )  # fmt: skip
    stdout = ranks[rank].stdout
    assert stdout is not None
    for line in stdout:
        if line.startswith("now:"):
            break
    begun = time.monotonic()
    if number is not None:
        ranks[rank].send_signal(number)
    # NCCL does not say that a peer is gone, and here no launcher sees both: it is found by its silence, as a hang is.
    silent = number is None and (kind in ("hang", "late-stop") or (kind == "kill" and device == "cuda"))
    limit = 45 if silent else 15
    while (left := marked(mark)) and time.monotonic() - begun < limit:
        time.sleep(0.1)
    seconds = time.monotonic() - begun
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    err = "".join(one.communicate(timeout=20)[1] for one in ranks)
    print(f"\nT11: {kind}: all ended after {seconds:.1f} s")
    assert not left, err[-3000:]
    assert all(one.returncode for one in ranks)
    said = [line for line in err.splitlines() if line.startswith(("error: ", "interrupted"))]
    assert len(said) == 1, err[-3000:]
    assert words in err


@on_each_device_slowly
def test_t14_both_ranks_stop_after_the_same_step(device: str, data: Path, tmp_path: Path):
    """A GPU's host runs ahead of it: the step is agreed without a wait for the device."""
    options = "--imgsz 64 --batch 8 --nbs 8 --workers 0 --trackers none --no-plots --save-interval 1000"
    train = ["--data", data, "--model", TINY, *options.split()]
    ranks = two_ranks(device, DETECT, *train, "--epochs", 500, cwd=tmp_path)
    stdout = ranks[0].stdout
    assert stdout is not None
    for line in stdout:
        if line.startswith("epoch 2/500"):
            break
    (told,) = psutil.Process(ranks[1].pid).children()
    told.send_signal(signal.SIGUSR1)
    _, err = ranks[0].communicate(timeout=30)
    ranks[1].communicate(timeout=30)
    status = json.loads((tmp_path / "m0" / "runs" / "detect" / "exp" / "status.json").read_text())
    assert (status["state"], status["reason"], status["rank"]) == ("preempted", "ended by SIGUSR1", 1), err[-2000:]
    said = run(device, DETECT, "--resume", "runs/detect/exp", "--epochs", status["epoch"] + 1, cwd=tmp_path / "m0")
    assert "tiny.yaml, resumed after " in said


def marked(mark: str) -> list[int]:
    """Processes with this mark in their environment."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


@on_each_device_slowly
def test_t12_speed(device: str, tmp_path: Path):
    """Numbers to read, not to pass."""
    sizes = {
        "cpu": ("--images 16 --imgsz 64 --batch 4 --epochs 2"),
        "cuda": "--images 1024 --imgsz 640 --batch 64 --epochs 3",
    }
    command = [WORKERS / "speed.py", *sizes[device].split(), "--model", MODELS[device]]
    out = run(device, *command, cwd=tmp_path)
    print(f"\n{out}")
    assert len(re.findall(r"^T12 .*\d images/s", out, re.MULTILINE)) >= 4
    if device == "cuda":  # on CUDA: two ranks on the GPU
        print("\n".join(finished(two_ranks(device, *command, "--only", "buffers", cwd=tmp_path))[:1]))


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda", marks=[*CUDA.marks, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="1 GPU")]),
    ],
)
def test_t13_a_gpu_for_each_rank(device: str, data: Path, tmp_path: Path, home: Path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--local_addr", "127.0.0.1"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    run(device, *launcher, WORKERS / "parity.py", data, tmp_path, "global", cwd=tmp_path, **NO_TF32)
    modes = ("global",) if device == "cpu" else ("global", "sync")
    one, two = (
        torch.load(folder / "global" / "rank0.pt", map_location="cpu")
        for folder in (one_rank(device, modes, data, home), tmp_path)
    )
    assert distance(one["model"], two["model"]) < 1e-5
    others = json.loads((tmp_path / "global" / "rank1.json").read_text())["gpus"]
    assert others == ([1] if device == "cuda" else [])  # on CUDA rank 1 has no context on another GPU
