"""The image cache: the same bytes as without, shared, refused where it does not fit, and left by nobody."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import DETECT, ROOT, TINY, succeed
from tests.data.test_index import draw
from tests.labels import to_train_on, to_validate_on
from train.config.errors import InputError
from train.config.options import TrainConfig
from train.data import cache
from train.data.cache import cache_images
from train.data.files import find_data
from train.data.loaders import train_loader
from train.data.sets import Images, TrainSet, ValSet
from train.processes import holders, room


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch) -> Path:
    """A shared memory of this test's own: others' runs remove what nobody holds in the real one."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(room, "SHARED", tmp_path / "shm")
    return tmp_path / "shm"


def sets(yaml: Path, folder: Path, accelerator: Accelerator, **options: Any) -> dict[str, Images]:
    """The data sets of a training, with their caches."""
    config = TrainConfig(**({"imgsz": 64, "batch": 8, "index_dir": str(folder)} | options))
    data = find_data(str(yaml))
    train = TrainSet(to_train_on(data, config, accelerator), data, config)
    val = ValSet(to_validate_on(data, config, accelerator), data, config, 32)
    said.clear()
    cache_images({"train": train, "val": val}, config, accelerator, said.append, lambda images, _: images)
    return {"train": train, "val": val}


said: list[str] = []


def release(these: dict[str, Images]) -> None:
    for one in these.values():
        if one.cached is not None:
            one.cached.release()


def equal(a: dict, b: dict) -> bool:
    return a["im_file"] == b["im_file"] and all(torch.equal(a[name], b[name]) for name in ("img", "cls", "bboxes"))


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("options", [{"mixup": 0.5, "cutmix": 0.3}, {"rect": True}, {"imgsz": 96, "mosaic": 0.5}])
def test_samples_are_the_same_bytes(kind: str, options: dict, shapes: Path, tmp_path: Path, accelerator, monkeypatch):
    plain = sets(shapes, tmp_path / "kept", accelerator, **options)
    kept = sets(shapes, tmp_path / "kept", accelerator, cache=kind, **options)
    assert plain["train"].cached is None
    monkeypatch.setattr(Images, "decode", lambda *_: pytest.fail("an image was decoded that is in the cache"))
    samples = [kept["train"].__getitems__([(0, p, closed) for p in range(24)]) for closed in (False, True)]
    val = [kept["val"][i] for i in range(len(kept["val"]))]
    again = [kept["train"].__getitems__([(0, p, closed) for p in range(24)]) for closed in (False, True)]
    monkeypatch.undo()
    for closed in (False, True):
        wanted = plain["train"].__getitems__([(0, p, closed) for p in range(24)])
        assert all(map(equal, samples[closed], wanted))
        assert all(map(equal, again[closed], wanted))  # nothing has written into the cache
    assert all(equal(sample, plain["val"][i]) for i, sample in enumerate(val))
    assert val[0]["ori_shape"] == plain["val"][0]["ori_shape"]
    assert val[0]["ratio_pad"] == plain["val"][0]["ratio_pad"]
    release(kept)


def test_workers_map_it_and_the_rank_alone_holds_it(shapes: Path, tmp_path: Path, shared: Path, accelerator):
    kept = sets(shapes, tmp_path / "kept", accelerator, cache="ram", workers=2)
    train: Any = kept["train"]
    by_workers = []
    for workers in (0, 2):
        train.config = replace(train.config, workers=workers)
        loader, positions = train_loader(train, 5, accelerator)
        positions.set(0, 0, False)
        batches = iter(loader)
        by_workers.append([batch["img"] for batch in batches])
        if workers:
            assert not any(holders.remove_unheld(file) for file in shared.iterdir())
            release(kept)  # the workers live on, and have it mapped
            assert not list(shared.iterdir())
    assert all(torch.equal(a, b) for a, b in zip(*by_workers, strict=True))


@pytest.mark.slow
def test_a_run_is_the_same_with_it_and_leaves_nothing_in_the_memory(runs, shapes: Path, tmp_path: Path):
    options = "--imgsz 64 --epochs 2 --batch 8 --nbs 8 --warmup-epochs 0 --workers 2 --trackers none --cache ram"
    more = ["--log-interval", 2, "--index-dir", tmp_path / "index"]
    console = succeed(2, DETECT, "--data", shapes, "--model", TINY, *options.split(), *more, cwd=tmp_path)
    assert re.search("cache      train: 40 images at 64 px, [0-9]+ kB in /dev/shm", console)
    columns = [
        [line.split(",")[5:] for line in (folder / "results.csv").read_text().splitlines()]
        for folder in (runs[2][0], tmp_path / "runs" / "detect" / "exp")
    ]
    assert columns[0] == columns[1]
    mine = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line}
    key = next(file.name for file in (tmp_path / "index").iterdir())
    assert not [file for file in Path("/dev/shm").glob(f"{cache.OWN}*") if key[:8] in file.name], mine


def test_it_is_found_again_and_made_anew_where_images_have_changed(shapes: Path, tmp_path: Path, accelerator):
    yaml = draw(tmp_path / "set")
    kept = tmp_path / "kept"
    release(sets(yaml, kept, accelerator, cache="disk"))
    assert said[0].startswith("caching 6 images at 64 px, 49.5 kB in ")
    assert said[1].startswith("cache      train and val: 6 images at 64 px")
    release(sets(yaml, kept, accelerator, cache="disk"))
    assert said == [said[0]]
    assert said[0].endswith(", found")
    (file,) = kept.glob(f"*{cache.ENDING}")
    (tmp_path / "set" / "labels" / "0.txt").write_text("1 0.5 0.5 0.1 0.1\n")  # of images nothing has changed
    release(sets(yaml, kept, accelerator, cache="disk"))
    assert said[0].endswith(", found")
    for damage in (b"", b"\x10" + bytes(30), file.read_bytes()[:-7]):
        file.unlink()
        file.write_bytes(damage)
        release(sets(yaml, kept, accelerator, cache="disk"))
        assert said[0].startswith("caching"), damage[:10]
    changed = tmp_path / "set" / "images" / "0.png"
    content = bytearray(changed.read_bytes())
    changed.write_bytes(content)
    os.utime(changed, (1, 1))
    for options in ({}, {"imgsz": 96}, {"fraction": 3}):
        release(sets(yaml, kept, accelerator, cache="disk", **options))
        assert said[0].startswith("caching"), options


def test_a_cache_that_does_not_fit_is_refused_with_the_numbers(shapes: Path, tmp_path: Path, accelerator, monkeypatch):
    """40 images to train on and 21 to validate on, of 160 px: 4.7 MB."""
    options: dict[str, Any] = {"imgsz": 160, "workers": 0}
    plain = sets(shapes, tmp_path / "k", accelerator, **options)
    whole = sum(cache.wanted(one, name, tmp_path).size for name, one in plain.items())
    assert 2e6 < whole < 61 * 160 * 160 * 3 + 1
    monkeypatch.setattr(room, "disk", lambda folder: int(0.6 * whole) + (0 if folder == room.SHARED else cache.LEFT))
    with pytest.raises(InputError, match=r"--cache: 61 images at 160 px take .* MB, .* free in .*shm, less") as refused:
        sets(shapes, tmp_path / "k", accelerator, cache="ram", **options)
    share = float(str(refused.value).partition("--fraction ")[2].partition(",")[0])
    assert 0.3 < share < 0.5
    assert "--cache disk, which the page cache shares as well, or give the container more" in str(refused.value)
    release(sets(shapes, tmp_path / "k", accelerator, cache="ram", fraction=share, **options))
    with pytest.raises(InputError, match=r"free in .*k, less 1 GB. Say --fraction .*--index-dir"):
        sets(shapes, tmp_path / "k", accelerator, cache="disk", **options)
    monkeypatch.undo()
    monkeypatch.setattr(room, "SHARED", tmp_path / "shm")
    monkeypatch.setattr(room, "memory", lambda: cache.LEFT + whole - 1)
    with pytest.raises(InputError, match=r"free of memory, less 1 GB for each process. Say --fraction 0.99, or"):
        sets(shapes, tmp_path / "k", accelerator, cache="ram", **options)
    with pytest.raises(InputError, match=r"by --cache-limit. Say a higher --cache-limit"):
        sets(shapes, tmp_path / "k", accelerator, cache="disk", cache_limit=1e-4, **options)
    assert not list((tmp_path / "shm").iterdir())
    assert not [file for file in (tmp_path / "k").iterdir() if "images" in file.name]


def test_a_disk_that_is_full_leaves_nothing_half_written(shapes: Path, small_disk: Path, accelerator, monkeypatch):
    monkeypatch.setattr(room, "disk", lambda folder: 10**12)  # others are faster: it is full when it is written
    monkeypatch.setattr(room, "SHARED", small_disk)
    with pytest.raises(InputError, match=r"has no room for .* MB .No space left on device"):
        sets(shapes, small_disk.parent / "kept", accelerator, cache="ram", imgsz=160)
    assert not list(small_disk.iterdir())


def test_the_least_recently_used_make_way_but_not_those_in_use(tmp_path: Path, accelerator):
    yaml, kept = draw(tmp_path / "set"), tmp_path / "kept"
    each = 6 * 64 * 43 * 3 / 1e9  # GB of the smallest
    ages = {}
    for i, imgsz in enumerate((64, 60, 56)):
        release(sets(yaml, kept, accelerator, cache="disk", imgsz=imgsz))
        (file,) = kept.glob(f"*-{imgsz}-*")
        ages[imgsz] = time.time() - 1000 + i
        os.utime(file, (ages[imgsz], ages[imgsz]))
    used = sets(yaml, kept, accelerator, cache="disk", imgsz=64)  # now it is the newest, and held
    more = sets(yaml, kept, accelerator, cache="disk", imgsz=62, cache_limit=2.5 * each)
    assert said[0].startswith("2 caches not used for long, of 82.6 kB, were removed from")
    assert sorted(int(file.name.split("-")[1]) for file in kept.glob("*images*")) == [62, 64]
    with pytest.raises(InputError, match=r"by --cache-limit, less what other runs use"):
        sets(yaml, kept, accelerator, cache="disk", imgsz=58, cache_limit=2.5 * each)
    release(used)
    release(more)


BUILD = """
import os, signal, sys
import torch
from pathlib import Path
from accelerate import Accelerator
from train.config.options import TrainConfig
from train.data import cache, labels, scan, sets
from train.data.files import find_data
from train.processes import room
room.SHARED = Path(sys.argv[2])
config = TrainConfig(imgsz=64, cache="ram", index_dir=sys.argv[3])
data, accelerator = find_data(sys.argv[1]), Accelerator(cpu=True)
index = scan.read_index(data, ("train",), config, accelerator)["train"]
train = sets.TrainSet(labels.train_labels(index, 2, config), data, config)
whole = train.decode
def decode(i):
    if i == 3 and sys.argv[4] == "building":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(i)
train.decode = decode
cache.cache_images({"train": train}, config, accelerator, print, lambda images, _: images)
print("built", flush=True)
if sys.argv[4] == "held":
    sys.stdin.read()
"""


def build(yaml: Path, shared: Path, kept: Path, what: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(yaml), str(shared), str(kept), what], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_what_killed_runs_leave_is_removed_or_used_and_what_is_held_stays(tmp_path: Path, shared: Path, accelerator):
    yaml, kept = draw(tmp_path / "set"), tmp_path / "kept"
    clean = [sys.executable, "-c", "import sys; from train.processes import room; from pathlib import Path; "
             f"room.SHARED = Path({str(shared)!r}); from train.data.cache import main; main()",
             "--index-dir", str(kept)]  # fmt: skip
    killed = build(yaml, shared, kept, "building")
    assert killed.wait(60) == -signal.SIGKILL
    assert [file.suffix for file in shared.iterdir()] == [".draft"]
    two = [build(yaml, shared, kept, "held") for _ in range(2)]  # at once, and beside the draft of a dead one
    for run in two:
        assert run.stdout is not None
        while "built" not in (line := run.stdout.readline()):
            assert line
    assert [file.name.endswith(cache.ENDING) for file in shared.iterdir()] == [True]
    assert "0 caches" in subprocess.run(clean, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    two[0].communicate("", timeout=60)  # one ends: the other holds it
    assert len(list(shared.iterdir())) == 1
    two[1].kill()
    two[1].wait()
    assert len(list(shared.iterdir())) == 1  # leaked
    release(sets(yaml, kept, accelerator, cache="ram"))  # the next run uses it, and removes it
    assert said[0].endswith(", found")
    assert not list(shared.iterdir())
    last = build(yaml, shared, kept, "held")
    assert last.stdout is not None
    while "built" not in (line := last.stdout.readline()):
        assert line
    last.kill()
    last.wait()
    assert len(list(shared.iterdir())) == 1
    assert "1 cache of" in subprocess.run(clean, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not list(shared.iterdir())


def test_an_image_that_cannot_be_decoded_is_left_to_the_loader(tmp_path: Path, accelerator):
    yaml, kept = draw(tmp_path / "set"), tmp_path / "kept"
    sets(yaml, kept, accelerator)
    broken = tmp_path / "set" / "images" / "2.png"
    stat, content = broken.stat(), broken.read_bytes()
    broken.write_bytes(bytes(len(content)))
    os.utime(broken, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk does that fails
    found = sets(yaml, kept, accelerator, cache="disk")
    assert [found["train"].cached.image(row) is None for row in range(6)] == [False, False, True, False, False, False]
    broken.write_bytes(content)
    assert np.array_equal(found["train"].load_image(2)[0], found["train"].decode(2)[0])
    release(found)


def test_how_long_it_will_take_is_said_once(monkeypatch):
    monkeypatch.setattr(cache, "SPOKEN", 0)
    told: list[str] = []
    assert [*cache._estimated(range(5), 5, told.append)] == [0, 1, 2, 3, 4]
    assert len(told) == 1
    assert re.fullmatch(r"caching images: about 0 minutes left", told[0])
