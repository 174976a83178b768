# make help lists the targets. Everything is installed into .venv by the first target that needs it.
PYTHON ?= python3
GPUS ?=
CPUS ?=
PRECISION ?=
TASK ?= detect
DATA ?= shapes
ARGS ?=

$(if $(filter-out auto bf16 fp16 no,$(PRECISION)),$(error PRECISION is $(PRECISION); it must be auto, bf16, fp16 or no))

$(if $(filter-out detect segment pose,$(TASK)),$(error TASK is $(TASK); it must be detect, segment or pose))

PY := .venv/bin/python
# Runs a script on GPUS or CPUS processes: through accelerate launch, or as one plain process that gets the signals.
LAUNCH = @exec $(PY) -m train.processes.launcher --gpus "$(GPUS)" --cpus "$(CPUS)" --
# The recipe of a first run: two minutes on two CPU cores. It applies only where ARGS names no data set, file or run.
QUICK := --imgsz 160 --epochs 15 --batch 16 --nbs 16 --optimizer AdamW --lr0 0.002 --lrf 0.02 --cos-lr --momentum 0.9 \
	--warmup-epochs 1 --mosaic 0 --scale 0.2 --translate 0.05 --hsv-h 0 --hsv-s 0.2 --hsv-v 0.2
OWN = $(findstring --data,$(ARGS))$(findstring --cfg,$(ARGS))$(findstring --resume,$(ARGS))
LAST_WEIGHTS = $$(ls -t runs/$(TASK)/*/weights/best.pt 2>/dev/null | head -n 1)

.PHONY: help train validate doctor check-data test test-slow test-cuda fuzz bench bench-eval bench-log bench-quick bench-save bench-data bench-check soak hashes check clean clean-cache
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo "TASK=detect|segment|pose sets the task, GPUS=2 or CPUS=2 the processes (all GPUs, else one process),"
	@echo "PRECISION=auto|bf16|fp16|no the precision,"
	@echo 'ARGS="--data coco.yaml --epochs 50" the options; $(PY) train/detect.py --help lists them.'

train: .venv/installed  ## train, by default on the built-in shapes: make train TASK=segment GPUS=2 ARGS="--data coco.yaml"
	$(LAUNCH) train/$(TASK).py --mixed-precision $(or $(PRECISION),auto) $(if $(OWN),,$(QUICK)) $(ARGS)

validate: .venv/installed  ## evaluate, by default the newest best.pt: make validate ARGS="--weights x.pt --data coco.yaml"
	$(LAUNCH) train/validate.py $(if $(PRECISION),--mixed-precision $(PRECISION)) \
		$(if $(findstring --weights,$(ARGS))$(findstring --predictions,$(ARGS)),,--weights "$(LAST_WEIGHTS)") $(ARGS)

doctor: .venv/installed  ## what each process sees and what is wrong with it: make doctor GPUS=2
	$(LAUNCH) train/doctor.py --mixed-precision $(or $(PRECISION),auto) $(ARGS)

check-data: .venv/installed  ## what is in a data set and what is wrong with it: make check-data DATA=coco8.yaml ARGS="--fix DIR"
	@exec $(PY) train/check_data.py "$(DATA)" $(ARGS)

test: .venv/installed-dev  ## run the tests
	@OMP_NUM_THREADS=1 exec $(PY) -m pytest -m "not slow and not cuda" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/installed-dev  ## run the tests that take longer
	@OMP_NUM_THREADS=1 exec $(PY) -m pytest -m "slow and not cuda" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-cuda: .venv/installed-dev  ## run the tests that need a GPU, and print how fast it is
	@exec $(PY) -m pytest tests/test_cuda.py -m cuda -s --durations 10 $(ARGS)

fuzz: .venv/installed  ## damaged labels and YAMLs for 60 seconds: no reader fails but by its own error
	@exec $(PY) -m tests.fuzz $(or $(ARGS),60 $$(date +%s))

bench: .venv/installed-dev  ## train beside Ultralytics and print the ratios: ARGS="--data coco128.yaml --json FILE --plot FILE"
	@exec $(PY) -m tests.bench.race $(ARGS)

bench-eval: .venv/installed  ## measure evaluation against pycocotools and yolo val: TASK=segment ARGS="--data coco8-seg.yaml"
	@exec $(PY) -m tests.bench.evaluation --task $(TASK) $(ARGS)

bench-log: .venv/installed  ## measure what logging costs within the steps
	@exec $(PY) -m tests.bench.logs $(ARGS)

check: .venv/installed-dev  ## format and lint (ruff), types (mypy), which way imports run (import-linter)
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m mypy && .venv/bin/lint-imports

bench-quick: .venv/installed-dev  ## train the quick recipe with five seeds in bf16 and fp32: the range of AP50, the seconds
	@exec $(PY) -m tests.bench.quick $(ARGS)

soak: .venv/installed-dev  ## kill a training again and again and compare what it ends with, byte for byte
	@exec $(PY) -m tests.soak $(ARGS)

bench-save: .venv/installed-dev  ## measure what saving a run costs, and what it costs where no save is due
	@exec $(PY) -m tests.bench.saves $(ARGS)

bench-data: .venv/installed-dev  ## measure scan, start, memory and pipeline beside Ultralytics: ARGS="--data coco128.yaml"
	@exec $(PY) -m tests.bench.data $(ARGS)

bench-check: .venv/installed-dev  ## measure the check and the reading of COCO's JSON: ARGS="--data coco128.yaml"
	@exec $(PY) -m tests.bench.check $(ARGS)

hashes: .venv/installed-dev  ## hashes of five trainings, to be compared with another commit's: ARGS="--data coco128.yaml"
	@exec $(PY) -m tests.hashes $(ARGS)

clean-cache: .venv/installed  ## remove decoded images (--cache) that no run uses: from the memory, and from the disk
	@exec $(PY) -m train.data.cache $(ARGS)

clean:  ## remove .venv and caches; keeps datasets/ and runs/
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, but $(PYTHON) is " + sys.version.split()[0] + "; type PYTHON=python3.12, say.")'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@$(PY) -m pip install -e '.[dev]'
	@touch $@
