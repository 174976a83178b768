"""The model to train: built for the classes of a data set, with what is frozen, and what its image sizes must fit."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA as ModelEMA  # for the scripts
from ultralytics.utils.torch_utils import get_flops, get_num_params

import train
from train.config.errors import InputError
from train.config.objects import Objects
from train.config.options import TrainConfig
from train.model.architecture import build_detector, read_architecture
from train.model.tasks import TASKS
from train.model.weights import load_detector

KEPT = ("box", "cls", "dfl", "pose", "kobj", "rle", "overlap_mask", "epochs")  # what losses find with the model


def build_model(config: TrainConfig, source: str, objects: Objects) -> tuple[DetectionModel, str]:
    """The model to train, on the CPU, and a sentence on where its weights come from.

    Args:
        config: gives the task, and the loss gains, which Ultralytics keeps with the model.
        source: path that `fetch_weights` returned.
        objects: of the data set.
    """
    weights, task = None, TASKS[config.task]
    if source.endswith(".pt"):
        weights, _ = load_detector(source, config.trust_checkpoint, task)
        architecture = dict(weights.yaml)
        own = architecture.get("channels", 3)
        if own != objects.channels:
            raise InputError(f"{config.model} takes images of {own} channels, the data set has {objects.channels}.")
    else:
        architecture = read_architecture(source, task)
    model = build_detector(architecture, task, objects, f"--model {config.model}")
    origin = f"{Path(config.model).name} from scratch"
    if weights is not None:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        given = weights.state_dict()
        model.load(weights, verbose=False)
        after = model.state_dict()
        taken = sum(
            (key in given and torch.equal(given[key], value)) or not torch.equal(before[key], value)
            for key, value in after.items()
            if before[key].shape == value.shape or (key in given and given[key].shape == value.shape)
        )
        origin = f"{taken} of {len(after)} tensors from {config.model}"
    _prepare(model, config, objects)
    return model, origin


def rebuild_model(
    config: TrainConfig, architecture: dict[str, Any], knows: dict[int, str], objects: Objects
) -> DetectionModel:
    """The model of a run that is gone on with, whose weights are still to come.

    Args:
        config: of the run.
        architecture: the model's description, which the run has kept.
        knows: the class names that it was trained on.
        objects: of the data set.
    """
    _check_classes(config, knows, objects.names)
    if (own := architecture.get("channels", 3)) != objects.channels:
        raise InputError(
            f"--resume {config.resume} takes images of {own} channels, the data set has {objects.channels}."
        )
    task = TASKS[config.task]
    if task.carries == "keypoints" and (own := architecture.get("kpt_shape")) != [*objects.keypoints]:
        raise InputError(
            f"--resume {config.resume} finds keypoints of kpt_shape {own}, the data set's are {[*objects.keypoints]}."
        )
    model = build_detector(architecture, task, objects, f"--resume {config.resume}")
    _prepare(model, config, objects)
    return model


def _prepare(model: DetectionModel, config: TrainConfig, objects: Objects) -> None:
    """The head that is validated, what the loss finds with the model, and which parameters are trained."""
    if config.end2end is not None:
        set_end2end(model, config.end2end, config.model)
    options = vars(config)
    model.args = get_cfg(overrides={name: options[name] for name in KEPT if name in options})
    if objects.keypoints and "sigmas" in options:  # as Ultralytics keeps them
        model.kpt_shape, model.kpt_oks_sigmas = [*objects.keypoints], [*options["sigmas"]]
        model.kpt_names = {index: [*objects.keypoint_names] for index in objects.names}
    frozen = _frozen_layers(model, config.freeze)
    for name, parameter in model.named_parameters():  # the DFL's weights are the integers it sums over
        parameter.requires_grad = ".dfl" not in name and not name.startswith(frozen)


def _check_classes(config: TrainConfig, knows: dict[int, str], names: dict[int, str]) -> None:
    """Raise InputError where a run is resumed on a data set of other classes than its own."""
    if knows == names:
        return
    if len(knows) != len(names):
        what = f"was trained on {len(knows)} classes, {config.data} names {len(names)}"
    else:
        first = next(index for index in names if knows.get(index) != names[index])
        what = f"knows class {first} as {knows.get(first)!r}, {config.data} names it {names[first]!r}"
    raise InputError(
        f"--resume {config.resume}: the run {what}. Start a new run from its weights: "
        f"--model {config.resume}/weights/last.pt"
    )


def set_end2end(model: DetectionModel, end2end: bool, source: str) -> None:
    """Choose the head that validation uses: one-to-one without NMS, or one-to-many with NMS."""
    head = model.model[-1]
    if end2end and getattr(head, "one2one_cv2", None) is None:
        raise InputError(f"--end2end was given, but {source} has no one-to-one head (v10 and 26 have one).")
    if not end2end and head.cv2 is None:
        raise InputError(f"--no-end2end was given, but {source} has lost its one-to-many head; it was fused.")
    head.end2end = end2end


def _frozen_layers(model: DetectionModel, freeze: int | tuple[int | str, ...] | None) -> tuple[str, ...]:
    """Prefixes of the parameters that are not trained: of the first N layers, or of layers by index or name."""
    layers = len(model.model)
    wanted = () if freeze is None else tuple(range(freeze)) if isinstance(freeze, int) else freeze
    prefixes = tuple(f"model.{layer}." for layer in wanted)
    modules = [f"{name}." for name, _ in model.named_modules()]
    unknown = [prefix for prefix in prefixes if not any(module.startswith(prefix) for module in modules)]
    if unknown or (isinstance(freeze, int) and not 0 <= freeze < layers):
        value = freeze if isinstance(freeze, int) else " ".join(map(str, wanted))
        raise InputError(
            f"--freeze is {value}; this model has the layers 0 to {layers - 1}, and at least one must train."
        )
    if prefixes and all(name.startswith(prefixes) for name, _ in model.named_parameters() if ".dfl" not in name):
        raise InputError("--freeze leaves no layer to train.")
    return prefixes


def compile_forward(model: DetectionModel, device: torch.device, folder: Path) -> None:
    """Have the model's forward compiled for the first batch it gets.

    The module stays what it is, so that its weights go by the same names, and copies and hooks know nothing of it.

    Args:
        model: to train.
        device: of the run.
        folder: where what is compiled is kept for the next run, unless the user has set TORCHINDUCTOR_CACHE_DIR.

    Raises:
        InputError: nothing to compile with.
    """
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not kept or kept.startswith(train.scratch.name):  # nobody's choice but torch's, and gone with this process
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise InputError("--compile needs a C++ compiler, and there is no g++ here: apt install g++, or leave it out.")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise InputError("--compile needs Triton for the GPU: pip install triton, or leave it out.")
    model.forward = torch.compile(model.forward, dynamic=False)


def of_the_loss(model: DetectionModel) -> list[nn.Parameter]:
    """Parameters that no forward uses, but the loss does: of 26 pose models the flow that errors are judged by."""
    flow = getattr(model.model[-1], "flow_model", None)
    return [] if flow is None else [parameter for parameter in flow.parameters() if parameter.requires_grad]


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """BatchNorms of frozen layers; like Ultralytics, training keeps their statistics too."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in norms if norm.weight is not None and not norm.weight.requires_grad]


def set_class_weights(model: DetectionModel, counts: np.ndarray, power: float) -> None:
    """Weigh classes by frequency to minus `power`, mean 1; a class without labels gets the mean, as in Ultralytics.

    Args:
        model: keeps the weights for its loss.
        counts: (classes,) labels of each class.
        power: 0 for no weights.
    """
    if not power or not counts.any():
        return
    weights = (1.0 / np.where(counts > 0, counts, 1.0)) ** power
    weights = np.where(counts > 0, weights, weights[counts > 0].mean())
    model.class_weights = torch.from_numpy((weights / weights.mean()).astype(np.float32))


def size_in_words(model: DetectionModel, imgsz: int) -> str:
    """Layers, parameters, and floating-point operations of one forward, counted as Ultralytics counts them."""
    layers = sum(not module._modules for module in model.modules())
    return f"{layers} layers, {get_num_params(model):,} parameters, {get_flops(model, imgsz):.3g} GFLOPs at {imgsz} px"


def largest_stride(model: DetectionModel) -> int:
    """What image sides must be a multiple of."""
    return max(int(model.stride.max()), 32)


def check_imgsz(imgsz: int, stride: int) -> None:
    """Raise InputError where the image size does not fit the stride, and say the nearest that does."""
    if imgsz % stride:
        low = imgsz // stride * stride
        nearest = low if low and imgsz - low < low + stride - imgsz else low + stride
        raise InputError(f"--imgsz is {imgsz}; it must be a multiple of the stride {stride}. The nearest is {nearest}.")
