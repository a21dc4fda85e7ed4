"""Checkpoints of plain networks, for the dynamic ones that are built on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn


def load_backbone(model: nn.Module, state_dict: Mapping[str, Any], *, heads: Collection[str]) -> list[str]:
    """Loads a checkpoint of a plain network into a dynamic one, whose own parts stay as they are.

    A classifier `fc` of another width is left out.

    Args:
        heads: parts of the keys that the plain network does not have.

    Returns:
        The keys of `model` that `state_dict` did not provide.

    Raises:
        ValueError: if a key of the backbone is missing, or `state_dict` has one that `model` lacks.
        RuntimeError: if a tensor has another shape.
    """
    state_dict = dict(state_dict)
    for key in ("fc.weight", "fc.bias"):
        if key in state_dict and state_dict[key].shape != model.get_parameter(key).shape:
            del state_dict[key]
    own = model.state_dict()
    # Checkpoints from before torch 0.4.1 have no num_batches_tracked, and need none.
    optional = ("fc.weight", "fc.bias", ".num_batches_tracked")
    lacking = [
        key
        for key in own
        if key not in state_dict and not any(head in key for head in heads) and not key.endswith(optional)
    ]
    unexpected = [key for key in state_dict if key not in own]
    if lacking or unexpected:
        raise ValueError(f"load_backbone: the checkpoint lacks {lacking} and has unknown {unexpected}")
    return list(model.load_state_dict(state_dict, strict=False).missing_keys)
