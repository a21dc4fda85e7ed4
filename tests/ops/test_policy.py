"""The channels that a policy makes necessary and the work they cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import adakernels as ak
from adakernels import flops
from adakernels.ops import gated_conv2d_flops, needed_channels

KEEP, REUSE, SKIP = (int(value) for value in ak.Policy)


def test_values_follow_the_paper() -> None:
    assert (KEEP, REUSE, SKIP) == (0, 1, 2)


def test_needed_channels() -> None:
    # One channel per column: kept, reused in the next frame, reused in the next clip, skipped.
    policy = torch.tensor(
        [
            [KEEP, SKIP, SKIP, SKIP],
            [KEEP, REUSE, SKIP, SKIP],
            [KEEP, SKIP, REUSE, SKIP],
            [KEEP, SKIP, SKIP, SKIP],
        ]
    )
    want = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert needed_channels(policy, 2).int().tolist() == want
    assert needed_channels(F.one_hot(policy, 3).double(), 2).tolist() == want


def test_needed_channels_have_a_gradient() -> None:
    weights = torch.rand(4, 3, 3, dtype=torch.float64).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: needed_channels(w, 2), weights)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flops_count_pairs_of_live_channels(groups: int) -> None:
    torch.manual_seed(0)
    policy, in_policy = torch.randint(0, 3, (6, 8)), torch.randint(0, 3, (6, 4))
    dense, actual = gated_conv2d_flops(
        (6, 4, 9, 9),
        (8, 4 // groups, 3, 2),
        policy,
        frames=3,
        output_size=(5, 7),
        groups=groups,
        in_policy=in_policy,
    )
    assert dense == 8 * (4 // groups) * 3 * 2 * 5 * 7
    needed = needed_channels(policy, 3)
    for n in range(6):
        pairs = sum(
            bool(needed[n, out]) and int(in_policy[n, channel]) != SKIP
            for out in range(8)
            for channel in range(4)
            if out // (8 // groups) == channel // (4 // groups)
        )
        assert actual[n] == pairs * 3 * 2 * 5 * 7
    one_hot = F.one_hot(policy, 3).double()
    _, soft = gated_conv2d_flops(
        (6, 4, 9, 9),
        (8, 4 // groups, 3, 2),
        one_hot,
        frames=3,
        output_size=(5, 7),
        groups=groups,
        in_policy=in_policy,
    )
    torch.testing.assert_close(soft, actual)


def test_flops_of_a_plain_convolution() -> None:
    dense, actual = gated_conv2d_flops((3, 4, 9, 9), (8, 4, 3, 3), output_size=(9, 9))
    assert dense == 8 * 4 * 9 * 81 and actual.tolist() == [dense] * 3


def test_calls_are_recorded_while_a_count_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    records = []
    monkeypatch.setattr(flops, "record", lambda *record: records.append(record))
    input, weight = torch.randn(4, 3, 5, 5), torch.randn(6, 3, 3, 3)
    policy = torch.randint(0, 3, (4, 6))
    ak.gated_conv2d(input, weight, None, policy, frames=2, padding=1)
    assert not records
    monkeypatch.setattr(flops, "counting", True)
    ak.gated_conv2d(input, weight, None, policy, frames=2, padding="same")
    ((name, dense, actual),) = records
    assert name == "gated_conv2d" and dense == 6 * 3 * 9 * 25
    assert torch.equal(actual, needed_channels(policy, 2).sum(1).double() * 3 * 9 * 25)


@pytest.mark.usefixtures("backend")
def test_dense_count_of_torch() -> None:
    input, weight = torch.randn(4, 3, 5, 5, requires_grad=True), torch.randn(6, 3, 3, 3, requires_grad=True)
    counts = []
    for policy in (None, torch.randint(0, 3, (4, 6))):
        with FlopCounterMode(display=False) as counter:
            ak.gated_conv2d(input, weight, None, policy, frames=2, padding=1).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 4 * 6 * 3 * 9 * 25
