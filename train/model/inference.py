"""A model as it is evaluated: a fused copy, its detections decoded and suppressed in fp32, its validation losses."""

import hashlib
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.modules.head import Pose26
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import scale_boxes

from train.model.outputs import Letterbox
from train.model.tasks import build_criterion, task_of


def inference_copy(
    model: DetectionModel, device: torch.device, memory_format: torch.memory_format, losses: bool = False
) -> DetectionModel:
    """A copy for evaluation: fp32, convolution and BatchNorm fused, raw head outputs (see `detect`).

    Its `digest` tells whether the ranks evaluate the same weights.
    With `losses` it has a criterion, and keeps both branches of an end-to-end head: see `validation_losses`.
    """
    import torchvision  # noqa: F401  # Ultralytics' NMS uses it only if it is there; `start_processes` has imported it

    told = digest(model)
    # Contiguous first: fusing sums in memory order, and a checkpoint's weights come back contiguous.
    model = deepcopy(model).float().eval().to(device).to(memory_format=torch.contiguous_format)
    head = model.model[-1]
    if losses:
        head.fuse = lambda: None  # would remove a branch, and what training alone needs
    elif isinstance(head, Pose26):
        head.fuse = super(Pose26, head).fuse  # its own would remove what raw outputs are made of
    model.fuse(verbose=False)
    vars(head).pop("fuse", None)
    head.training = True  # the head's own flag alone: raw outputs; its layers stay in eval mode
    if losses and hasattr(head, "proto"):
        head.proto.training = True  # of 26 segmentation: what its semantic loss is computed from
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = model.to(memory_format=memory_format)
    criterion = build_criterion(model) if losses else None
    model.criterion = criterion.one2one if isinstance(criterion, E2ELoss) else criterion
    model.digest = told
    return model


def digest(model: torch.nn.Module) -> str:
    """A hash of the weights and buffers; before they are fused, which need not give the same bits on every GPU."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(tensor.contiguous().cpu().numpy().data)
    return found.hexdigest()[:16]


def validation_losses(raw: dict[str, Any], model: DetectionModel, batch: dict[str, Any]) -> Tensor:
    """Mean losses of a batch, in fp32, (losses,) by `model.criterion.loss_names`; of an end-to-end head those of the
    one-to-one branch, as Ultralytics logs them.

    Args:
        raw: output of an `inference_copy` with losses.
        model: the same `inference_copy`.
        batch: with `cls` (m, 1), `bboxes` (m, 4) xywh normalised to the padded image, `batch_idx` (m,).
    """
    _, items = model.criterion.loss(_fp32(raw.get("one2one", raw)), batch)
    return torch.stack(list(items.values()))


def _fp32(raw: dict[str, Any]) -> dict[str, Any]:
    """Raw outputs in fp32."""
    found: dict[str, Any] = {}
    for name, value in raw.items():
        if name == "feats":
            found[name] = [x[:0].float() for x in value]  # of which only size and type are used
        else:
            found[name] = tuple(x.float() for x in value) if isinstance(value, tuple) else value.float()
    return found


def detect(raw: dict[str, Any], model: DetectionModel, conf: float, iou: float, max_det: int) -> list[Tensor]:
    """Decode and suppress in fp32, whatever precision the forward had.

    bf16 has eight bits of mantissa: box edges decoded in it would jump in steps of 2 px at 300 px.

    Args:
        raw: output of an `inference_copy`.
        model: the same `inference_copy`.

    Returns:
        one (n, 6 + k) fp32 tensor per image: x1, y1, x2, y2 in pixels of the padded image, score, class index, and what
        the task adds: mask coefficients, or keypoints in pixels of the padded image; NMS order.
    """
    head = model.model[-1]
    cudnn = torch.backends.cudnn
    # The decoding has a convolution (DFL), for which cuDNN would take TF32, of a mantissa of ten bits: up to 0.2 px.
    with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
        predictions = head._inference(_fp32(_branch(raw, head)))
    if head.end2end:
        head.max_det = max_det
        predictions = head.postprocess(predictions.permute(0, 2, 1))
    # No time limit: past it Ultralytics would return no detections for the rest of the batch.
    return non_max_suppression(
        predictions, conf, iou, multi_label=True, max_det=max_det, nc=head.nc, max_time_img=1e9, end2end=head.end2end
    )


def in_original(
    found: list[Tensor], raw: dict[str, Any], model: DetectionModel, batch: dict[str, Any]
) -> tuple[list[Tensor], list[Any]]:
    """Detections in pixels of the original images.

    Args:
        found: what `detect` returned.
        raw, model: that it got.
        batch: with `img`, `ori_shape` and `ratio_pad`, see `ValSet`.

    Returns:
        by image (n, 6) boxes, x1, y1, x2, y2, score, class index; and what the task adds, see `Task.extra`.
    """
    head, extra = model.model[-1], task_of(model).extra
    padded, branch = tuple(batch["img"].shape[2:]), _branch(raw, head)
    boxes, extras = [], []
    for i, (one, shape, ratio_pad) in enumerate(zip(found, batch["ori_shape"], batch["ratio_pad"], strict=True)):
        scale_boxes(padded, one[:, :4], shape, ratio_pad)  # in place
        boxes.append(one[:, :6].clone())  # alone: what else is in the row would stay on the device with it
        extras.append(extra(one, Letterbox(padded, shape, ratio_pad), head, branch, i))
    return boxes, extras


def _branch(raw: dict[str, Any], head: Any) -> dict[str, Any]:
    """Of an end-to-end head the outputs that are evaluated."""
    if "one2many" not in raw:
        return raw
    branch: dict[str, Any] = raw["one2one"] if head.end2end else raw["one2many"]
    return branch
