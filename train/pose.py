"""Train a YOLO pose model, whose labels are keypoints, on one process or many.

    python train/pose.py                                               # the built-in shapes, one process
    accelerate launch train/pose.py --data coco8-pose.yaml --model yolov8n-pose.pt
    make train TASK=pose GPUS=2 ARGS="--data coco8-pose.yaml --epochs 50"

It is the story that train/detect.py tells, with the task of train/model/tasks.py. `--help` lists the options.
"""

from train.processes import early  # noqa: F401  # first, see there

# isort: split

from train.config.task_options import PoseConfig
from train.detect import main
from train.processes.script import run

if __name__ == "__main__":
    run(main, PoseConfig, __doc__)
