"""Floors of FM-LoRA's training step: the least FLOPs, seconds and bytes it can take."""

from fmlora_jax.bench.workload import BenchSettings

PEAK_FLOPS = (  # bfloat16 products per second without sparsity, as their makers state
  ("H100 PCIe", 756e12),
  ("H100", 989e12),
  ("H200", 989e12),
  ("A100", 312e12),
  ("TPU v6", 918e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5e", 197e12),
  ("TPU v5", 459e12),
  ("TPU v4", 275e12),
)


def flops(setting: BenchSettings) -> dict[str, float]:
  """Returns the FLOPs per image of the matrix products that cannot be left out.

  Returns:
    "forward": the plain ViT, of whose last block only the class token is needed. "step": a forward
    with prompt and adapters, then one more product for each frozen one and two for each of
    attention's. The first block's query, key and value need theirs for the prompt's gradient only.
  """
  sizes, rank, prompts = setting.sizes, setting.rank, setting.prompts
  width, patches = sizes.width, sizes.grid**2
  embedding = 2 * patches * 3 * sizes.patch_size**2 * width

  def blocks(tokens):
    """FLOPs of (query, key, value; out and mlp; attention) over all blocks."""
    queries = [tokens] * (sizes.depth - 1) + [1]
    project = sum(2 * width**2 * (2 * tokens + n) for n in queries)
    rest = sum(2 * width**2 * (1 + 2 * sizes.mlp_ratio) * n for n in queries)
    return project, rest, sum(4 * width * tokens * n for n in queries)

  tokens = patches + 1 + prompts
  project, rest, attention = blocks(tokens)
  adapters = sum(
    2 * rank * (2 * width + rank) * n
    for n in (*[tokens] * sizes.depth, *[tokens] * (sizes.depth - 1), 1)
  )
  first = 2 * width**2 * 3 * tokens
  backward = project - first + first * prompts / tokens + rest + 2 * attention + adapters
  return {
    "forward": float(embedding + sum(blocks(patches + 1))),
    "step": float(embedding + project + rest + attention + adapters + backward),
  }


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Returns the chip's peak in FLOP/s; None where it is unknown or the dtype is not bfloat16."""
  if dtype != "bfloat16":
    return None
  return next((peak for name, peak in PEAK_FLOPS if name in device_kind), None)


def seconds(setting: BenchSettings, product_rate: float) -> dict[str, float]:
  """Returns the seconds that the products of `flops` take for a batch at `product_rate` FLOP/s."""
  return {name: count * setting.batch / product_rate for name, count in flops(setting).items()}


def residual_bytes(setting: BenchSettings) -> int:
  """Returns the bytes of activations that the backward pass needs if it recomputes no block.

  For each token of each block but the last: the two normalised inputs (2 widths), query, key and
  value (3), attention's output (1) and the MLP's hidden layer (mlp_ratio), and x·A and x·A·core of
  the six adapters. Attention weights and GELU do not count: recomputing them costs little. Nor
  do weights, which are arguments, and gradients, which one block at a time needs. Of the last
  block: input, keys and values of all tokens.
  """
  sizes, itemsize = setting.sizes, 2 if setting.dtype == "bfloat16" else 4
  tokens = sizes.num_tokens + setting.prompts
  block = (6 + sizes.mlp_ratio) * sizes.width + 6 * 2 * setting.rank
  last = 3 * sizes.width
  return setting.batch * tokens * ((sizes.depth - 1) * block + last) * itemsize
