"""Train a YOLO segmentation model, whose labels are polygons, on one process or many.

    python train/segment.py                                               # the built-in shapes, one process
    accelerate launch train/segment.py --data coco8-seg.yaml --model yolov8n-seg.pt
    make train TASK=segment GPUS=2 ARGS="--data coco8-seg.yaml --epochs 50"

It is the story that train/detect.py tells, with the task of train/model/tasks.py. `--help` lists the options.
"""

from train.processes import early  # noqa: F401  # first, see there

# isort: split

from train.config.task_options import SegmentConfig
from train.detect import main
from train.processes.script import run

if __name__ == "__main__":
    run(main, SegmentConfig, __doc__)
