"""A model as it is evaluated: a fused copy, its detections decoded and suppressed in fp32, its validation losses."""

import hashlib
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss
from ultralytics.utils.nms import non_max_suppression

from train.model.loss import build_criterion


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
        head.fuse = lambda: None  # would remove a branch
    model.fuse(verbose=False)
    vars(head).pop("fuse", None)
    head.training = True  # the head's own flag alone: raw outputs; its layers stay in eval mode
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
    feats = [x[:0].float() for x in raw["feats"]]  # of which only size and type are used
    return {"boxes": raw["boxes"].float(), "scores": raw["scores"].float(), "feats": feats}


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
    cudnn = torch.backends.cudnn
    # The decoding has a convolution (DFL), for which cuDNN would take TF32, of a mantissa of ten bits: up to 0.2 px.
    with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
        predictions = head._inference(_fp32(raw))
    if head.end2end:
        head.max_det = max_det
        predictions = head.postprocess(predictions.permute(0, 2, 1))
    # No time limit: past it Ultralytics would return no detections for the rest of the batch.
    return non_max_suppression(
        predictions, conf, iou, multi_label=True, max_det=max_det, max_time_img=1e9, end2end=head.end2end
    )
