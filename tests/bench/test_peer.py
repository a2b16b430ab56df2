"""The way to PyTorch, without it."""

import sys

import pytest

from fmlora_jax.bench import peer, torch_peers


def test_a_peer_that_does_not_start_is_one_message():
  with pytest.raises(ValueError, match="ended with code 1; --peers needs torch"):
    peer.Peer({}, "false")


def test_every_variant_is_a_model_in_pytorch_eager_or_compiled():
  assert {name.removesuffix("_compiled") for name in peer.VARIANTS} == set(torch_peers.MODELS)
  assert set(peer.DEFAULT) < set(peer.VARIANTS)


def test_pytorch_is_imported_for_the_peer_only():
  assert torch_peers.make_step
  assert not {"torch", "transformers", "peft"} & set(sys.modules)
