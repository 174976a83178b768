"""The only file that touches the insides of Ultralytics' models, losses and checkpoints."""

import os
from collections.abc import Callable
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401  # imported first: Ultralytics' NMS uses it only if it is already there
from torch import Tensor, nn
from ultralytics import __version__ as ultralytics_version
from ultralytics.cfg import get_cfg
from ultralytics.nn import tasks
from ultralytics.nn.modules.head import Detect, v10Detect
from ultralytics.nn.tasks import BaseModel, DetectionModel, load_checkpoint, yaml_model_load
from ultralytics.utils.checks import check_yolov5u_filename
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, GITHUB_ASSETS_REPO, attempt_download_asset
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.torch_utils import ModelEMA as ModelEMA  # for the scripts

from train.config import InputError, TrainConfig


def fetch_weights(model: str) -> str:
    """Path of the checkpoint or YAML that `model` names; an official checkpoint that is not there is downloaded.

    Call it on one process. Raises InputError where the file is not there and cannot be had.
    """
    path = Path(os.path.expanduser(model))
    if path.suffix == ".pt":
        if path.is_file():
            return str(path)
        official = check_yolov5u_filename(path.name, verbose=False)  # yolov5n.pt is yolov5nu.pt here
        if str(path) != path.name or official not in GITHUB_ASSETS_NAMES:
            raise InputError(f"There is no checkpoint {path} (looked in {path.absolute().parent}).")
        try:
            return attempt_download_asset(official)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{path.name} is not in {Path.cwd()} and could not be downloaded ({_first_line(error)}). "
                f"Get it from https://github.com/{GITHUB_ASSETS_REPO}/releases and put it there, "
                f"or train from scratch with {path.stem}.yaml."
            ) from None
    if path.suffix in (".yaml", ".yml"):
        try:
            yaml_model_load(model)  # knows that yolov8n.yaml is yolov8.yaml at scale n
            return model
        except FileNotFoundError:
            raise InputError(
                f"There is no model {model}, neither a file nor one of Ultralytics' (yolov8n.yaml, yolo11s.yaml, …)."
            ) from None
    raise InputError(f"--model is {model!r}; it must be an Ultralytics model .yaml or a .pt checkpoint.")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_detector(weights: str, trust: bool = False) -> tuple[DetectionModel, dict[str, Any]]:
    """An Ultralytics detection checkpoint as (fp32 model in eval mode, the checkpoint's other entries).

    The file is read with torch's weights-only rules and Ultralytics' list of allowed classes, so that it cannot run
    code, unless it is trusted.
    """
    tasks.SAFE_LOAD = not trust  # Ultralytics' switch for the process; load_checkpoint has no parameter for it
    try:
        if any(name.startswith("models.") for name in torch.serialization.get_unsafe_globals_in_checkpoint(weights)):
            name = Path(weights).stem
            raise InputError(
                f"{weights} is a checkpoint of the original YOLOv5 code. Use its successor {name}u.pt from "
                f"https://github.com/{GITHUB_ASSETS_REPO}/releases, or train from scratch with {name}.yaml."
            )
        model, checkpoint = load_checkpoint(weights)
    except InputError:
        raise
    except Exception as error:  # a broken pickle fails in as many ways as there are bytes
        hint = "" if trust else " --trust-checkpoint loads classes other than Ultralytics' and torch's, and their code."
        raise InputError(f"{weights} is not a checkpoint that can be loaded: {_first_line(error)}{hint}") from None
    finally:
        tasks.SAFE_LOAD = True
    if type(model) is not DetectionModel or type(model.model[-1]) not in (Detect, v10Detect):  # segmentation inherits
        kind = type(model.model[-1]).__name__ if isinstance(model, BaseModel) else type(model).__name__
        raise InputError(f"{weights} ends in a {kind} head; these scripts are for YOLO detection models.")
    return model, {key: value for key, value in checkpoint.items() if key not in ("model", "ema")}


def trained_with(weights: str, trust: bool = False) -> dict[str, Any]:
    """Options that a checkpoint was trained and validated with: all of them, or, of another trainer, data and imgsz."""
    _, checkpoint = load_detector(weights, trust)
    if isinstance(config := checkpoint.get("config"), dict):
        return config
    theirs = checkpoint.get("train_args") or {}
    return {"data": str(theirs.get("data") or ""), "imgsz": theirs.get("imgsz") or 640}


def build_model(config: TrainConfig, source: str, names: dict[int, str], channels: int) -> tuple[DetectionModel, str]:
    """The model to train, on the CPU, and a sentence on where its weights come from.

    Args:
        config: gives the loss gains, which Ultralytics keeps with the model.
        source: path that `fetch_weights` returned.
        names: class names of the data set by class index.
        channels: image channels.
    """
    weights = None
    yaml: dict | str = source
    if source.endswith(".pt"):
        weights, _ = load_detector(source, config.trust_checkpoint)
        yaml = dict(weights.yaml)
        own = weights.yaml.get("channels", 3)
        if own != channels:
            raise InputError(f"{config.model} takes images of {own} channels, the data set has {channels}.")
    else:
        head = str(yaml_model_load(source)["head"][-1][2])
        if head not in ("Detect", "v10Detect"):
            raise InputError(
                f"--model {config.model} ends in a {head} head; these scripts are for YOLO detection models."
            )
    model = DetectionModel(yaml, ch=channels, nc=len(names), verbose=False)
    model.names = names  # before load(), so that the head's rows are matched by class name
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
    if config.end2end is not None:
        set_end2end(model, config.end2end, config.model)
    model.args = get_cfg(overrides={"box": config.box, "cls": config.cls, "dfl": config.dfl, "epochs": config.epochs})
    frozen = _frozen_layers(model, config.freeze)
    for name, parameter in model.named_parameters():  # the DFL's weights are the integers it sums over
        parameter.requires_grad = ".dfl" not in name and not name.startswith(frozen)
    return model, origin


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


def largest_stride(model: DetectionModel) -> int:
    """What image sides must be a multiple of."""
    return max(int(model.stride.max()), 32)


def check_imgsz(imgsz: int, stride: int) -> None:
    """Raise InputError where the image size does not fit the stride, and say the nearest that does."""
    if imgsz % stride:
        low = imgsz // stride * stride
        nearest = low if low and imgsz - low < low + stride - imgsz else low + stride
        raise InputError(f"--imgsz is {imgsz}; it must be a multiple of the stride {stride}. The nearest is {nearest}.")


class GlobalLoss(v8DetectionLoss):
    """Ultralytics' loss, divided by the target-score sum of the global batch instead of by this rank's.

    Ultralytics divides each rank's loss by that rank's own sum, so the gradients of two processes differ from those of
    one process at the same global batch. Here the mean over ranks, which DDP takes, is what one process computes.
    """

    assigner: Any

    def __init__(self, model: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor], ranks: int, **kwargs: Any):
        super().__init__(model, **kwargs)
        assign = self.assigner

        def assign_and_sum(*args: Any, **kwargs: Any) -> Any:
            assigned = assign(*args, **kwargs)
            local = assigned[2].sum()  # target scores, (images, anchors, classes)
            total = sum_over_ranks(local.float())  # collective: every rank, once for each criterion and batch
            self.rescale = ranks * local.clamp(min=1).float() / total.clamp(min=1)
            return assigned

        self.assigner = assign_and_sum

    def get_assigned_targets_and_loss(self, preds: dict[str, Tensor], batch: dict[str, Any], **kwargs: Any) -> tuple:
        """Ultralytics' assigned targets and (box, cls, dfl) loss, with its denominator exchanged."""
        assigned, loss, _ = super().get_assigned_targets_and_loss(preds, batch, **kwargs)
        loss = loss * self.rescale
        return assigned, loss, dict(zip(self.loss_names, loss.detach(), strict=True))


def use_global_loss(model: DetectionModel, sum_over_ranks: Callable[[Tensor], Tensor], ranks: int) -> None:
    """Give the model the global loss, in both branches where it is end to end. Call it after ModelEMA has copied it."""

    def loss(model: nn.Module, **kwargs: Any) -> GlobalLoss:
        return GlobalLoss(model, sum_over_ranks, ranks, **kwargs)

    plain = model.init_criterion()
    if isinstance(plain, E2ELoss):
        model.criterion = E2ELoss(model, loss_fn=loss)
    elif type(plain) is v8DetectionLoss:
        model.criterion = loss(model)
    else:
        raise InputError(f"{type(plain).__name__} has no global normaliser here; add --local-loss-norm.")


def end_of_epoch(model: DetectionModel) -> None:
    """Move the weights of an end-to-end model's two losses on by one epoch; on every rank."""
    if hasattr(model.criterion, "update"):
        model.criterion.update()


def inference_copy(
    model: DetectionModel, device: torch.device, memory_format: torch.memory_format, losses: bool = False
) -> DetectionModel:
    """A copy for evaluation: fp32, convolution and BatchNorm fused, raw head outputs (see `detect`).

    With `losses` it has a criterion, and keeps both branches of an end-to-end head: see `validation_losses`.
    """
    # Contiguous first: fusing sums in memory order, and a checkpoint's weights come back contiguous.
    model = deepcopy(model).float().eval().to(device).to(memory_format=torch.contiguous_format)
    head = model.model[-1]
    if losses:
        head.fuse = lambda: None  # would remove a branch
    model.fuse(verbose=False)
    vars(head).pop("fuse", None)
    head.training = True  # the head's own flag alone: raw outputs; its layers stay in eval mode
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = model.to(memory_format=memory_format)
    criterion = model.init_criterion() if losses else None
    model.criterion = criterion.one2one if isinstance(criterion, E2ELoss) else criterion
    return model


def validation_losses(raw: dict[str, Any], model: DetectionModel, batch: dict[str, Any]) -> Tensor:
    """Mean losses of a batch (3,), in fp32, by `model.criterion.loss_names`; of an end-to-end head those of the
    one-to-one branch, as Ultralytics logs them.

    Args:
        raw: output of an `inference_copy` with losses.
        model: the same `inference_copy`.
        batch: with `cls` (m, 1), `bboxes` (m, 4) xywh normalised to the padded image, `batch_idx` (m,).
    """
    _, items = model.criterion.loss(_fp32(raw.get("one2one", raw)), batch)
    return torch.stack(list(items.values()))


def _fp32(raw: dict[str, Any]) -> dict[str, Any]:
    return {"boxes": raw["boxes"].float(), "scores": raw["scores"].float(), "feats": [x.float() for x in raw["feats"]]}


def detect(raw: dict[str, Any], model: DetectionModel, conf: float, iou: float, max_det: int) -> list[Tensor]:
    """Decode and suppress in fp32, whatever precision the forward had.

    bf16 has eight bits of mantissa: box edges decoded in it would jump in steps of 2 px at 300 px.

    Args:
        raw: output of an `inference_copy`.
        model: the same `inference_copy`.

    Returns:
        one (n, 6) fp32 tensor per image: x1, y1, x2, y2 in pixels of the padded image, score, class index; NMS order.
    """
    head = model.model[-1]
    if "one2many" in raw:
        raw = raw["one2one"] if head.end2end else raw["one2many"]
    predictions = head._inference(_fp32(raw))
    if head.end2end:
        head.max_det = max_det
        predictions = head.postprocess(predictions.permute(0, 2, 1))
    # No time limit: past it Ultralytics would return no detections for the rest of the batch.
    return non_max_suppression(
        predictions, conf, iou, multi_label=True, max_det=max_det, max_time_img=1e9, end2end=head.end2end
    )


def as_checkpoint(
    model: DetectionModel, train_args: dict[str, Any], epoch: int, metrics: dict[str, float]
) -> dict[str, Any]:
    """What `ultralytics.YOLO` reads: the module itself, in fp32 and contiguous, with plain values beside it."""
    model = deepcopy(model).float().cpu().to(memory_format=torch.contiguous_format)
    theirs = vars(get_cfg())
    model.args = theirs | {key: value for key, value in train_args.items() if key in theirs and value is not None}
    model.criterion = None
    return {
        "epoch": epoch,
        "model": model,
        "ema": None,
        "optimizer": None,
        "train_args": model.args,
        "config": train_args,
        "train_metrics": metrics,
        "date": datetime.now().astimezone().isoformat(),
        "version": ultralytics_version,
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
    }
