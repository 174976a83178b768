"""The only file that touches the insides of Ultralytics' models, losses and checkpoints."""

from collections.abc import Callable
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401  # imported first: Ultralytics' NMS uses it only if it is already there
from torch import Tensor, nn
from ultralytics import __version__ as ultralytics_version
from ultralytics.cfg import get_cfg
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel, load_checkpoint, yaml_model_load
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, GITHUB_ASSETS_REPO, attempt_download_asset
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.torch_utils import ModelEMA as ModelEMA  # for the scripts

from train.config import InputError, TrainConfig


def fetch_weights(model: str) -> str:
    """Path of the checkpoint or YAML that `model` names; an official checkpoint that is not there is downloaded.

    Call it on one process. Raises InputError where the file is not there and cannot be had.
    """
    path = Path(model).expanduser()
    if path.suffix == ".pt":
        if path.is_file():
            return str(path)
        if str(path) != path.name or path.name not in GITHUB_ASSETS_NAMES:
            raise InputError(f"There is no checkpoint {path} (looked in {path.absolute().parent}).")
        try:
            return attempt_download_asset(path.name)
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


def load_detector(weights: str) -> tuple[DetectionModel, dict[str, Any]]:
    """An Ultralytics detection checkpoint as (fp32 model in eval mode, the checkpoint's other entries).

    The file is read with torch's weights-only rules and Ultralytics' list of allowed classes: it cannot run code.
    """
    try:
        model, checkpoint = load_checkpoint(weights)
    except Exception as error:  # a broken pickle fails in as many ways as there are bytes
        raise InputError(f"{weights} is not a checkpoint that can be loaded: {_first_line(error)}") from None
    if not isinstance(model, DetectionModel) or not isinstance(model.model[-1], Detect):
        task = getattr(model, "task", None) or type(model).__name__
        raise InputError(f"{weights} holds a {task} model; these scripts are for YOLO detection models.")
    return model, {key: value for key, value in checkpoint.items() if key not in ("model", "ema")}


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
        weights, _ = load_detector(source)
        yaml = dict(weights.yaml)
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
    model.args = get_cfg(overrides={"box": config.box, "cls": config.cls, "dfl": config.dfl, "epochs": config.epochs})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".dfl" not in name  # the DFL's weights are the integers it sums over
    return model, origin


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


def inference_copy(model: DetectionModel, device: torch.device, memory_format: torch.memory_format) -> DetectionModel:
    """A copy for evaluation: fp32, convolution and BatchNorm fused, raw head outputs (see `detect`)."""
    # Contiguous first: fusing sums in memory order, and a checkpoint's weights come back contiguous.
    model = deepcopy(model).float().eval().to(device).to(memory_format=torch.contiguous_format)
    model.fuse(verbose=False)
    model.model[-1].training = True  # the head's own flag alone: raw outputs; its layers stay in eval mode
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.to(memory_format=memory_format)


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
    raw = {"boxes": raw["boxes"].float(), "scores": raw["scores"].float(), "feats": [x.float() for x in raw["feats"]]}
    predictions = head._inference(raw)
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
    model.args = vars(get_cfg()) | {key: value for key, value in train_args.items() if key in vars(get_cfg())}
    model.criterion = None
    return {
        "epoch": epoch,
        "model": model,
        "ema": None,
        "optimizer": None,
        "train_args": model.args,
        "train_metrics": metrics,
        "date": datetime.now().astimezone().isoformat(),
        "version": ultralytics_version,
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
    }
