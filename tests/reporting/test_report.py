"""What a run can do without does not end it; and what the lines say."""

import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator

from tests.labels import labels_of
from tests.truths import truth_of
from train.config.errors import InputError
from train.config.options import TrainConfig
from train.data.formats import ImageLabels
from train.evaluation.coco import silenced
from train.evaluation.detections import Detections
from train.evaluation.evaluate import Evaluation, measure
from train.processes.cores import Usage, shared_cores
from train.reporting import lines
from train.reporting.console import Log
from train.reporting.report import Report


@pytest.fixture
def report(tmp_path: Path) -> Report:
    report = Report(Accelerator(cpu=True), TrainConfig(progress="lines", hang_timeout=0))
    report.open(tmp_path, TrainConfig())
    yield report
    report.close()


def test_what_cannot_be_written_is_one_warning(report: Report, capsys):
    def full() -> None:
        raise OSError(28, "No space left on device")

    for _ in range(3):
        report.going_on("pictures", full)
    report.going_on("results.csv", full)
    said = capsys.readouterr().out
    assert said.count("warning: pictures could not be written (No space left on device); the run goes on") == 1
    assert said.count("warning: results.csv could not be written") == 1


def test_what_a_thread_says_while_the_metric_is_silenced_is_seen(report: Report, capsys):
    """As the watch does, and the thread that draws."""
    with silenced():
        print("a table of pycocotools")
        thread = threading.Thread(target=report.say, args=("still validating, 31 s",))
        thread.start()
        thread.join()
    print("the end")
    assert capsys.readouterr().out == "still validating, 31 s\nthe end\n"


def test_a_log_on_a_full_disk_is_one_warning():
    said: list[str] = []
    log = Log(Path("/dev/full"), said.append)
    for number in range(300):
        log.handle(logging.LogRecord("train", logging.INFO, "", 0, f"line {number} " + "x" * 100, (), None))
    log.close()
    assert len(said) == 1
    assert "/dev/full cannot be written" in said[0]
    assert "the run goes on" in said[0]


def test_results_are_on_disk_before_they_are_printed(report: Report, monkeypatch):
    def printed(*_: object) -> None:
        assert (report.folder / "metrics.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "say", printed)
    with pytest.raises(KeyboardInterrupt):
        report.evaluation(measured(), TRUTH, TrainConfig(plots=False))


TRUTH = truth_of({
    "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 64}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [1, 1, 20, 20], "area": 400, "iscrowd": 0}],
    "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}],
})  # fmt: skip


def measured(rows: list[list[float]] | None = None) -> Evaluation:
    found = Detections(np.array(rows or []).reshape(-1, 7))
    return measure(TRUTH, found, TrainConfig(), Accelerator(cpu=True))


def test_a_diagnosis_that_fails_costs_no_result(report: Report, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise ValueError("hotcoco")

    monkeypatch.setattr("train.reporting.report.diagnose", fail)
    report.evaluation(measured(), TRUTH, TrainConfig())
    assert (report.folder / "metrics.json").exists()
    assert "warning: the diagnosis of errors could not be written" in capsys.readouterr().out


def test_results_that_cannot_be_written_are_an_error_of_validate(report: Report, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.results, "evaluation", full)
    with pytest.raises(InputError, match=r"results could not be written to .* \(No space left on device\)"):
        report.evaluation(measured(), TRUTH, TrainConfig())


def test_minus_one_is_a_dash_with_a_line_that_says_why():
    said = lines.table(measured([[1, 1, 1, 20, 20, 0.9, 0]]), TrainConfig())
    (small,) = (line for line in said if line.startswith("AP small, medium, large"))
    assert small.split()[-3:] == ["1.000", "\u2013", "\u2013"]
    assert "-1.000" not in "".join(said)
    assert sum(line.startswith("\u2013: nothing to measure") for line in said) == 1


def test_what_is_left_out_is_said_in_a_line(report: Report, tmp_path: Path, capsys):
    whole = labels_of([ImageLabels("a", 0, (1, 1), np.zeros(1), np.zeros((1, 4)), [])])
    report.faults("d.yaml", whole)
    assert capsys.readouterr().out == ""
    fewer = labels_of([ImageLabels("a", 0, (1, 1), np.zeros(1), np.zeros((1, 4)), []), "b.txt: no numbers"])
    fewer.source.table = SimpleNamespace(left_out={0: [[1], [2, 4]]})
    report.faults("d.yaml", whole, fewer)
    where, check = tmp_path / "faults.txt", "python train/check_data.py d.yaml lists all that is wrong"
    objects = "3 objects without a size or there twice"
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out are 1 images ({where} says why) and {objects}; {check}. First: b.txt: no numbers" in said
    assert where.read_text() == "b.txt: no numbers\n"
    fewer = labels_of([ImageLabels("a", 0, (1, 1), np.zeros(1), np.zeros((1, 4)), [])])
    fewer.source.table = SimpleNamespace(left_out={0: [[1], [2, 4]]})
    report.faults("d.yaml", fewer)
    assert f"warning: left out are {objects}; {check}.\n" in capsys.readouterr().out


def test_tide_is_left_out_where_nothing_is_found(report: Report, capsys):
    report.evaluation(measured(), TRUTH, TrainConfig())
    assert "TIDE" not in capsys.readouterr().out
    report.evaluation(measured([[1, 1, 1, 20, 20, 0.9, 0]]), TRUTH, TrainConfig())
    assert "AP50 lost to errors (TIDE)" in capsys.readouterr().out


def test_images_without_a_box_are_counted():
    entries = [ImageLabels("a", i, (1, 1), np.zeros(n), np.zeros((n, 4)), []) for i, n in enumerate((2, 0, 0))]
    assert lines.data_line("d", labels_of(entries), labels_of(entries[:1])) == (
        "data       d: 3 images with 2 boxes to train on (2 without a box), "
        "1 images with 2 boxes to validate on (0 without a box)"
    )


def test_cores_that_others_keep_busy(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    before, after = Usage(clock=10.0, busy=100.0, own=3.0), Usage(clock=12.0, busy=107.0, own=4.0)
    assert after.others_since(before) == 2.5  # 7 seconds of cores in 2, of which this rank and its fellow had 1 each
    assert after.others_since(after) == 0
    assert "OMP_NUM_THREADS=1" in shared_cores(1.9, 2, "here")
