from __future__ import annotations

import pytest
import torch
from torch import nn

import adakernels as ak


def make(**keywords) -> ak.SoftModulationGate:
    torch.manual_seed(0)
    gate = ak.SoftModulationGate(6, **keywords)
    nn.init.normal_(gate.fc2.weight)
    nn.init.normal_(gate.fc2.bias)
    return gate


@pytest.mark.parametrize("frames", [None, 4])
@pytest.mark.parametrize("training", [False, True])
def test_is_equation_4(frames: int | None, training: bool) -> None:
    gate = make(frames=frames, temporal_levels=3, channel_levels=2, hidden=5).train(training)
    nn.init.uniform_(gate.bn.running_var, 0.5, 2)
    x = torch.randn(7, 6, 4, 3, 5)
    pooled = x.mean((2, 3, 4)) if frames is None else x.mean((3, 4)).reshape(7, 24)
    hidden = pooled @ gate.fc1.weight.t()
    mean, var = (hidden.mean(0), hidden.var(0, False)) if training else (0, gate.bn.running_var)
    hidden = torch.tanh((hidden - mean) / (var + 1e-5).sqrt())
    want = torch.tanh(hidden @ gate.fc2.weight.t() + gate.fc2.bias).clamp(min=0)
    temporal, channel = gate(x)
    assert temporal.shape == (7, 3) and channel.shape == (7, 2)
    torch.testing.assert_close(torch.cat((temporal, channel), 1), want)
    assert (want == 0).any() and (want > 0).any()
    with torch.no_grad():
        if not training:
            torch.testing.assert_close(gate(x)[0], temporal)


def test_time_is_pooled_too_without_frames() -> None:
    gate = make().eval()
    x = torch.randn(2, 6, 8, 3, 3)
    torch.testing.assert_close(gate(x.repeat_interleave(2, 2)), gate(x))


def test_every_level_starts_alive() -> None:
    gate = ak.SoftModulationGate(6, 4, temporal_levels=3, channel_levels=3)
    assert all((weights > 0.5).all() for weights in gate(torch.randn(16, 6, 4, 5, 5)))


def test_gradients_through_a_convolution() -> None:
    gate, conv = ak.SoftModulationGate(6), ak.DynamicConv3d(6, 4, 1)
    x = torch.randn(5, 6, 4, 3, 3)
    conv(x, *gate(x)).square().sum().backward()
    for parameter in (*gate.parameters(), *conv.parameters()):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(2, 6, 5, 3, 3), (2, 5, 4, 3, 3), (2, 6, 3, 3)])
def test_bad_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"SoftModulationGate: expected input of shape \[B, 6, 4, H, W\], got"
    ):
        make(frames=4)(torch.randn(shape))


def test_work_is_counted() -> None:
    gate = make(frames=4, hidden=5).eval()
    count = ak.count_flops(gate, torch.randn(3, 6, 4, 2, 2))
    assert count.dense == 0
    assert count.actual.tolist() == pytest.approx([(24 * 5 + 5 * 4) / 1e9] * 3)
