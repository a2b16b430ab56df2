"""The way to PyTorch, without it."""

import sys

import pytest

from fmlora_jax.bench import peer


def test_a_peer_that_does_not_start_is_one_message():
  with pytest.raises(ValueError, match="ended with code 1; --peers needs torch"):
    peer.Peer({}, "false")


def test_pytorch_is_imported_for_the_peer_only():
  assert peer.make_step
  assert not {"torch", "transformers", "peft"} & set(sys.modules)
