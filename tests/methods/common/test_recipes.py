"""The official settings of the methods that take SD-LoRA's, CODA's, PILOT's or InfLoRA's."""

import importlib

import cases
import pytest

from fmlora_jax.input.augment import NORMALISATIONS, PRESETS
from fmlora_jax.models.weights import registry

NAMES = ("adapter", "c_lora", "finetune", "lora", "sd_lora")
BENCHMARKS = ("imagenet_r", "cifar100", "cub200", "domainnet")
FT = "augreg_in21k_ft_in1k"
SD = "augreg2_in21k_ft_in1k"


def official(name, benchmark, num_tasks=10):
  pixels = {"source_size": 256, "augmentation": "none"}
  return cases.official(name, benchmark, num_tasks, input=pixels)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("name", NAMES)
def test_official_settings_build_and_name_what_exists(name, benchmark):
  built = official(name, benchmark)
  assert built.method.name == name and built.tasks.num_tasks == 10
  assert built.weights.tag in registry.WEIGHTS
  cuts = importlib.import_module(f"fmlora_jax.tasks.benchmarks.{benchmark}").SPLITS
  assert built.tasks.split in cuts
  assert built.input.augmentation in PRESETS and built.input.normalisation in NORMALISATIONS
  assert built.input.source_size == 256  # what the recipe does not say stays
  assert (built.batch_size, built.compute_dtype) == (128, "float32")
  assert built.optim.head_learning_rate == built.optim.learning_rate
  assert built.optim.clip_norm is None


@pytest.mark.parametrize(
  ("name", "benchmark", "optimiser", "rate", "epochs", "schedule", "tag", "augmentation"),
  [
    ("sd_lora", "imagenet_r", "sgd", 8e-3, 20, "constant", SD, "pilot"),
    ("sd_lora", "cifar100", "sgd", 8e-3, 20, "constant", SD, "pilot"),
    ("sd_lora", "cub200", "sgd", 8e-3, 20, "constant", SD, "pilot"),
    ("sd_lora", "domainnet", "sgd", 2e-2, 10, "steps", SD, "pilot"),
    ("lora", "imagenet_r", "sgd", 8e-3, 20, "constant", SD, "pilot"),
    ("adapter", "cifar100", "sgd", 8e-3, 20, "constant", SD, "pilot"),
    ("c_lora", "imagenet_r", "adam", 1e-3, 50, "coda_cosine", "augreg_in21k", "coda"),
    ("c_lora", "cifar100", "adam", 1e-3, 20, "coda_cosine", "augreg_in21k", "coda_uncropped"),
    ("c_lora", "cub200", "adam", 1e-3, 50, "coda_cosine", "augreg_in21k", "pilot"),
    ("c_lora", "domainnet", "adam", 1e-3, 5, "coda_cosine", "augreg_in21k", "coda"),
    ("finetune", "cifar100", "adam", 5e-5, 20, "coda_cosine", FT, "coda_uncropped"),
    ("finetune", "domainnet", "adam", 5e-5, 5, "coda_cosine", FT, "coda"),
    ("finetune", "imagenet_r", "sgd", 1e-3, 20, "constant", "augreg_in21k_ft_in1k", "pilot"),
    ("finetune", "cub200", "sgd", 1e-3, 20, "constant", "augreg_in21k_ft_in1k", "pilot"),
  ],
)
def test_the_decisive_numbers(
  name, benchmark, optimiser, rate, epochs, schedule, tag, augmentation
):
  built = official(name, benchmark)
  assert (built.optim.name, built.optim.learning_rate) == (optimiser, rate)
  assert (built.epochs, built.optim.schedule) == (epochs, schedule)
  assert (built.weights.tag, built.input.augmentation) == (tag, augmentation)
  decay = 2e-4 if (name, optimiser) == ("finetune", "sgd") else 0.0
  assert (built.optim.weight_decay, built.optim.head_weight_decay) == (decay, decay)


@pytest.mark.parametrize(("num_tasks", "rate"), [(5, 1e-2), (10, 8e-3), (20, 1e-2)])
def test_sd_loras_rate_on_imagenet_r_depends_on_the_number_of_tasks(num_tasks, rate):
  assert official("sd_lora", "imagenet_r", num_tasks).optim.learning_rate == rate
  assert official("sd_lora", "cifar100", num_tasks).optim.learning_rate == 8e-3


def test_ranks_and_targets_are_those_of_the_codes():
  for name in ("lora", "sd_lora"):
    method = official(name, "imagenet_r").method
    assert (method.rank, method.targets) == (10, ("query", "value"))
  method = official("c_lora", "imagenet_r").method
  assert (method.rank, method.targets, method.penalty_weight) == (64, ("key", "value"), 0.5)
  assert official("c_lora", "cifar100").tasks.order == "natural"
  assert official("sd_lora", "cifar100").tasks.order == "shuffled"


def test_domainnet_decays_at_three_epochs():
  optim = official("sd_lora", "domainnet").optim
  assert (optim.milestones, optim.decay) == ((4, 6, 8), 0.005)


@pytest.mark.parametrize(
  ("name", "starts"),  # of ImageNet-R, CIFAR-100, CUB-200 and DomainNet
  [
    ("adapter", ["kaiming_uniform"] * 4),
    ("c_lora", ["torch_linear"] * 4),
    ("coda_prompt", ["torch_linear"] * 4),
    ("dualprompt", ["zero", "zero", "truncated_normal", "zero"]),
    ("finetune", ["kaiming_uniform", "torch_linear", "kaiming_uniform", "torch_linear"]),
    ("hide_prompt", ["truncated_normal"] * 4),
    ("inflora", ["torch_linear"] * 4),
    ("l2p", ["truncated_normal", "zero", "truncated_normal", "zero"]),
    ("lora", ["kaiming_uniform"] * 4),
    ("sd_lora", ["kaiming_uniform"] * 4),
  ],
)
def test_heads_start_as_those_of_the_codes(name, starts):
  assert [cases.official(name, benchmark).head.start for benchmark in BENCHMARKS] == starts


@pytest.mark.parametrize("name", ["c_lora", "coda_prompt", "finetune", "inflora"])
def test_only_cifars_test_images_are_not_cropped(name):
  got = {b: cases.official(name, b).input.augmentation for b in BENCHMARKS}
  assert got.pop("cifar100") == "coda_uncropped"
  assert "coda_uncropped" not in got.values() and got["domainnet"] == "coda"


def test_settings_that_are_off_by_default_are_on_in_the_recipe():
  assert official("lora", "cifar100").method.init == "torch_linear"
  assert official("adapter", "cifar100").method.train_norms
  assert cases.official("hide_prompt", "cifar100").method.identity.epsilon == 1e-5
