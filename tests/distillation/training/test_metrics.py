"""Means over micro-batches and ranks, and the table of a run."""

from __future__ import annotations

import csv
import json
import math

import torch

from distillation.training.metrics import MetricsCSV, RunningMeans

CPU = torch.device("cpu")


class OneProcess:
    """As much of a trainer as the metrics ask for."""

    world_size = 1

    class strategy:
        @staticmethod
        def broadcast(value):
            return value


def test_running_means():
    means = RunningMeans(weighted=True)
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(10.0)}, seconds=1.0)
    means.add({"a": torch.tensor(4.0), "b": torch.tensor(10.0)}, seconds=3.0)
    assert means.reduce(OneProcess, CPU) == {"seconds": 4.0, "a": (1 + 12) / 4, "b": 10.0}
    plain = RunningMeans()
    plain.add({"a": torch.tensor(1.0)}, 1.0)
    resumed = RunningMeans.from_state(plain.state(OneProcess, CPU), rank=0, device=CPU)
    resumed.add({"a": torch.tensor(4.0)}, 3.0)
    assert resumed.reduce(OneProcess, CPU) == {"seconds": 4.0, "a": 2.5}
    other_rank = RunningMeans.from_state(plain.state(OneProcess, CPU), rank=1, device=CPU)
    assert not other_rank.sums and other_rank.seconds == 0


def test_metrics_csv_resumes_without_repeating_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    log.log_metrics({"a": 1.0}, step=2)
    log.log_metrics({"a": 2.0, "valid": 3.0}, step=4)
    log.log_metrics({"late": 5.0}, step=4)
    log.log_metrics({"a": 9.0}, step=6)
    again = MetricsCSV(path)
    again.resume(step=4)
    again.log_metrics({"a": 6.5}, step=6)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "2", "a": "1", "valid": "", "late": ""},
        {"step": "4", "a": "2", "valid": "3", "late": "5"},
        {"step": "6", "a": "6.5", "valid": "", "late": ""},
    ]
    assert not list(tmp_path.glob(".*"))


def test_values_that_are_not_finite_count_for_the_seconds_alone():
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(3.0)}, 1.0)
    means.add({"a": torch.tensor(float("nan")), "b": torch.tensor(9.0)}, 2.0)
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(float("-inf"))}, 4.0)
    assert means.reduce(OneProcess, CPU) == {"seconds": 7.0, "a": 1.0, "b": 3.0}
    nothing = RunningMeans()
    nothing.add({"a": torch.tensor(float("inf"))}, 2.0)
    found = nothing.reduce(OneProcess, CPU)
    assert found["seconds"] == 2.0 and math.isnan(found["a"])


def test_means_survive_a_checkpoint():
    means = RunningMeans(weighted=True)
    means.add({"a": torch.tensor(0.1), "b": torch.tensor(1 / 3)}, 0.7)
    means.begin -= 100
    state = json.loads(json.dumps(means.state(OneProcess, CPU)))
    again = RunningMeans.from_state(state, rank=0, device=CPU)
    assert again.reduce(OneProcess, CPU) == means.reduce(OneProcess, CPU)
    assert 100 <= again.elapsed() < 110
    assert 100 <= RunningMeans.from_state(state, rank=1, device=CPU).elapsed() < 110


def test_a_row_is_what_is_known_about_a_step(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"a": 1 / 3}, step=1)
    log.log_metrics({"b": 2.0}, step=2)
    assert log.row(1) == {"step": 1, "a": "0.33333333"} and log.row(3) == {}
    again = MetricsCSV(log.path)
    again.resume(step=2)
    assert again.row(2) == {"step": "2", "b": "2"}, "an empty cell is nothing known"


def test_a_table_whose_last_line_was_cut_is_continued(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a\n1,0.5\n2,0.25\n,\nx,1\n")
    log = MetricsCSV(path)
    log.resume(step=1)
    assert [row["step"] for row in log.rows] == ["1"]
    log.log_metrics({"a": 0.125}, step=2)
    assert path.read_text().split() == ["step,a", "1,0.5", "2,0.125"]
    MetricsCSV(tmp_path / "none.csv").resume(step=5)  # a run killed before its first row
