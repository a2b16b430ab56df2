"""The one call for a GPU, on a CPU with a ViT of one block and few images."""

import json

import pytest

from fmlora_jax.bench import gpu_report as gpu
from fmlora_jax.bench import speed
from fmlora_jax.bench.gpu_report import Plan
from fmlora_jax.models import vit
from fmlora_jax.tasks.benchmarks import random_images
from fmlora_jax.types import Sizes

TINY = Sizes(image_size=16, patch_size=8, width=32, depth=1, num_heads=2)


@pytest.fixture
def plan(monkeypatch, tmp_path):
  monkeypatch.setitem(vit.ARCHITECTURES, "micro", TINY)
  monkeypatch.setattr(speed, "TURN_SECONDS", 0)
  monkeypatch.setattr(random_images, "NUM_CLASSES", 10)
  monkeypatch.setattr(random_images, "PER_CLASS", 10)
  return Plan(
    out=tmp_path,
    peers_python="false",
    seconds=1000.0,
    batches=(4, 8),
    architecture="micro",
    dtype="float32",
    epochs=2,
  )


@pytest.mark.tier(2)  # the parts are tested one by one
def test_all_parts_are_on_disk_though_one_fails(plan):
  parts = gpu.measure(plan)
  assert json.loads((plan.out / "gpu.json").read_text()) == parts
  assert [name for name, part in parts.items() if "failed" in part] == ["batch 8 beside PyTorch"]
  assert "ended with code 1" in parts["batch 8 beside PyTorch"]["failed"]
  assert parts["batch 4"]["task_2"]["images_per_second"] > 0
  top = parts["kernels"]["top"]
  assert len(top) == 10 and 0 < sum(row["share"] for row in top) <= 1
  assert [row["share"] for row in top] == sorted((row["share"] for row in top), reverse=True)
  whole = parts["whole run"]
  assert whole["epochs"] == 2 and not whole["is_extrapolated"]
  assert whole["total_seconds"] == whole["wall_seconds"]["total"] > 0
  text = (plan.out / "gpu.txt").read_text()
  for shown in ("step at task 2 of 2", "2 epochs, measured", "floor of a step"):
    assert shown in text


def test_what_finds_no_time_is_left_out_and_said(plan):
  report = gpu.Report(plan)
  found = report.part("batch 4", lambda: {"left_out": "no time was left"}, gpu.show_speed)
  assert found["left_out"] and "no time was left" in (plan.out / "gpu.txt").read_text()
  assert "not enough" in gpu.whole_run(plan, rate=1e9, seconds=10.0)["left_out"]


def test_fewer_epochs_are_extrapolated(plan, monkeypatch):
  spent = {"total": 100.0, "train": 60.0}
  monkeypatch.setattr(gpu.run, "run", lambda config, workdir: {"wall_seconds": spent})
  # 70 images: (0.8 x 200 - 90) s x 1 image/s are one epoch of two
  whole = gpu.whole_run(plan, rate=1.0, seconds=200.0)
  assert (whole["epochs"], whole["total_seconds"]) == (1, 160.0)
  assert whole["is_extrapolated"]
  assert "2 epochs, extrapolated from 1: 160.0 s" in gpu.show_run(whole)
