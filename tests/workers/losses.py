"""Train outputs that are parameters, so that a case can be made of them, by the real losses on however many ranks.

usage: losses.py OUT

Of six images each rank has its share; their raw outputs are learnt by five steps of SGD under DDP. Each rank writes for
each case OUT/CASE.RANK.pt: the terms of each step, meant over the ranks, what the likelihood was on this rank alone,
of how many visible and how many valid keypoints, and the outputs.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.config.objects import Objects
from train.config.task_options import PoseConfig, SegmentConfig
from train.model.build import build_model
from train.model.tasks import TASKS, build_criterion, with_sigmas
from train.processes.accelerator import start_processes
from train.training.meter import Meter

IMAGES, SIZE, STEPS = 6, 64, 5
OF: dict[str, tuple[str, dict[str, Any]]] = {
    "segment": ("yolov8n-seg.yaml", {}),
    "segment, one mask an object": ("yolov8n-seg.yaml", {"overlap_mask": False}),
    "segment, end to end": ("yolo26n-seg.yaml", {}),
    "segment, end to end, one mask an object": ("yolo26n-seg.yaml", {"overlap_mask": False}),
    "pose": ("yolov8n-pose.yaml", {}),
    "pose, two dimensions": ("yolov8n-pose.yaml", {"dimensions": 2}),
    "pose, end to end": ("yolo26n-pose.yaml", {}),
    "pose, end to end, two dimensions": ("yolo26n-pose.yaml", {"dimensions": 2}),
    "pose, likelihood negative on the first rank": ("yolo26n-pose.yaml", {"near": (0, 1, 2), "sigma": -2.0}),
    "pose, likelihood negative in sum": ("yolo26n-pose.yaml", {"near": (0, 1, 2), "sigma": -9.0}),
    "pose, an error that overflows": ("yolo26n-pose.yaml", {"beyond": 0}),
}
EMPTY = (4, 5)  # images without an object: of three ranks the last has no other
INVISIBLE = 1  # an image whose keypoints are all invisible


def objects_on(image: int, rng: torch.Generator) -> Tensor:
    """Boxes xywh normalised."""
    count = 0 if image in EMPTY else 1 + image % 3
    centre = 0.3 + 0.4 * torch.rand(count, 2, generator=rng)
    return torch.cat((centre, 0.3 + 0.2 * torch.rand(count, 2, generator=rng)), 1)


def truth(overlap: bool) -> list[dict[str, Tensor]]:
    """What is on each image."""
    rng, found = torch.Generator().manual_seed(0), []
    for image in range(IMAGES):
        boxes, side = objects_on(image, rng), SIZE // 4
        classes = torch.randint(0, 2, (len(boxes), 1), generator=rng).float()
        ys, xs = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
        each = torch.stack(
            [((xs / side - x) / w * 2) ** 2 + ((ys / side - y) / h * 2) ** 2 < 1 for x, y, w, h in boxes.tolist()]
            or [torch.zeros(side, side, dtype=torch.bool)]
        )[: len(boxes)]
        one, semantic = torch.zeros(1, side, side), torch.zeros(1, side, side)
        for k, mask in enumerate(each):
            one[0][mask], semantic[0][mask] = k + 1, classes[k]
        corners = torch.tensor([[0, -0.5], [0.5, 0], [0, 0.5], [-0.5, 0]])
        keypoints = boxes[:, None, :2] + corners * boxes[:, None, 2:]
        visible = torch.full((len(boxes), 4, 1), 0.0 if image == INVISIBLE else 2.0)
        masks = one if overlap else each.float()
        found.append({
            "cls": classes, "bboxes": boxes, "masks": masks, "sem_masks": semantic,
            "keypoints": torch.cat((keypoints, visible), 2),
        })  # fmt: skip
    return found


class Held(nn.Module):
    """Raw outputs of the images as parameters, and the model's own that only the loss uses."""

    def __init__(self, shapes: dict[str, Any], flow: nn.Module | None):
        super().__init__()
        self.flow = flow
        rng = torch.Generator().manual_seed(1)
        self.held = nn.ParameterDict()
        for branch, parts in shapes.items():
            for name, shape in parts.items():
                self.held[f"{branch}_{name}"] = nn.Parameter(torch.randn(IMAGES, *shape, generator=rng) * 0.5)

    def forward(self, images: list[int], feats: list[Tensor]) -> dict[str, Any]:
        raw: dict[str, Any] = {}
        for key, value in self.held.items():
            branch, _, name = key.partition("_")
            raw.setdefault(branch, {"feats": feats})[name] = value[images]
        for parts in raw.values():
            if "semantic" in parts:
                parts["proto"] = parts["proto"], parts.pop("semantic")
        return raw if "one2many" in raw else raw["only"]


def shapes_of(raw: Any) -> dict[str, dict[str, Any]]:
    """Of a model's raw outputs, by branch and name, without the images."""
    found: dict[str, dict[str, Any]] = {}
    for branch, parts in raw.items() if "one2many" in raw else (("only", raw),):
        found[branch] = {name: tuple(v.shape[1:]) for name, v in parts.items() if isinstance(v, Tensor)}
        if isinstance(parts.get("proto"), tuple):
            found[branch] |= {"proto": parts["proto"][0].shape[1:], "semantic": parts["proto"][1].shape[1:]}
    return found


def near(held: Held, images: tuple[int, ...], sigma: float, keypoints: Tensor) -> None:
    """Have these images' keypoints be at the truth, of which they have one object, and be sure of it."""
    for branch in ("one2many", "one2one"):
        at = []
        for side in (8, 4, 2):
            ys, xs = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
            at.append(torch.stack((xs.flatten(), ys.flatten()), 1)[:, None] * -1 + keypoints[:, None] * side)
        for image in images:
            exact = torch.cat([a[image] if a.dim() == 4 else a for a in at])
            held.held[f"{branch}_kpts"].data[image].view(4, -1, exact.shape[0])[:, :2] = exact.permute(1, 2, 0)
            held.held[f"{branch}_kpts_sigma"].data[image] = sigma


def beyond(held: Held, image: int, keypoints: Tensor) -> None:
    """Have an error of this image be infinite: its first keypoint is too far away for an output that is so sure."""
    keypoints[:, 0, :2] = 1e30
    for branch in ("one2many", "one2one"):
        held.held[f"{branch}_kpts_sigma"].data[image, :2] = -110.0


class Noted:
    """Of each likelihood that a criterion computes the value, before Ultralytics clamps it, and its keypoints."""

    def __init__(self, criterion: Any, values: list[float], keypoints: list[tuple[int, int]]):
        self.values, self.keypoints = values, keypoints
        self.compute, criterion.calculate_rle_loss = criterion.calculate_rle_loss, self.visible
        criterion.rle_loss.register_forward_hook(self.valid)

    def visible(self, predicted: Tensor, truth: Tensor, visible: Tensor) -> Tensor:
        self.count = int(visible.sum())
        return self.compute(predicted, truth, visible)

    def valid(self, _: nn.Module, inputs: tuple[Tensor, ...], value: Tensor) -> None:
        self.values.append(value.item())
        self.keypoints.append((self.count, len(inputs[2])))


def run(accelerator: Any, case: str, out: Path) -> None:
    torch.manual_seed(0)
    model_name, options = OF[case]
    dimensions = options.get("dimensions", 3)
    kind = SegmentConfig if "seg" in model_name else PoseConfig
    config = kind(model=model_name, **{k: v for k, v in options.items() if k == "overlap_mask"})
    objects = Objects(names={0: "a", 1: "b"}, keypoints=(4, dimensions))
    config = with_sigmas(config, TASKS[config.task], objects)
    model, _ = build_model(config, model_name, objects)
    with torch.no_grad():
        raw = model.train()(torch.zeros(1, 3, SIZE, SIZE))
    feats = [f[:0] for f in (raw.get("one2many") or raw)["feats"]]
    ranks, rank = accelerator.num_processes, accelerator.process_index
    held: nn.Module = Held(shapes_of(raw), getattr(model.model[-1], "flow_model", None))
    images = truth(options.get("overlap_mask", True))
    if "near" in options:
        for image in images:  # one object each
            for name in ("cls", "bboxes", "keypoints"):
                image[name] = image[name][:1]
        places = torch.stack([i["keypoints"][0, :, :2] if len(i["cls"]) else torch.zeros(4, 2) for i in images])
        near(held, options["near"], options["sigma"], places)  # type: ignore[arg-type]
    if "beyond" in options:
        beyond(held, options["beyond"], images[options["beyond"]]["keypoints"])  # type: ignore[arg-type]
    model.criterion = build_criterion(model, Meter(accelerator, model).sum_over_ranks, ranks)
    share = IMAGES // ranks
    mine = [*range(rank * share, (rank + 1) * share)]
    batch = {
        name: torch.cat([images[i][name] for i in mine])
        for name in ("cls", "bboxes", "masks", "sem_masks", "keypoints")
    }
    if dimensions == 2:
        batch["keypoints"] = batch["keypoints"].clone()
    batch["batch_idx"] = torch.cat([torch.full((len(images[i]["cls"]),), float(n)) for n, i in enumerate(mine)])
    criteria = [getattr(model.criterion, name, None) for name in ("one2many", "one2one")]
    own: list[float] = []
    keypoints: list[tuple[int, int]] = []  # visible ones, and those that are left of them by Ultralytics' filter
    for criterion in criteria:
        if getattr(criterion, "rle_loss", None) is not None:
            Noted(criterion, own, keypoints)
    wrapped = DistributedDataParallel(held) if ranks > 1 else held
    optimizer = torch.optim.SGD(held.parameters(), lr=0.02)
    steps = []
    for _ in range(STEPS):
        raw = wrapped(mine, [f.new_zeros(share, *f.shape[1:]) for f in feats])
        terms, items = model.criterion(raw, batch)
        (terms.sum() * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(accelerator.reduce(torch.stack([*items.values()]), reduction="mean"))
    names = [*items]
    weights = {name: value.detach().clone() for name, value in held.state_dict().items()}
    told = {"names": names, "steps": steps, "own": own, "keypoints": keypoints, "weights": weights}
    torch.save(told, out / f"{case}.{rank}.pt")


accelerator, _ = start_processes("no", [])
for case in OF:
    run(accelerator, case, Path(sys.argv[1]))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
