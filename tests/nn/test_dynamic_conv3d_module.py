from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakernels as ak
from adakernels.nn import ChannelFilters, FrameFilters
from adakernels.ops import dynamic_conv3d_reference


def make(**keywords) -> ak.DynamicConv3d:
    torch.manual_seed(0)
    arguments = {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "temporal_levels": 3, "channel_levels": 3}
    conv = ak.DynamicConv3d(4, 6, **(arguments | keywords))
    for phi in (conv.temporal_phi, conv.channel_phi):
        if isinstance(phi, ChannelFilters | FrameFilters):
            nn.init.normal_(phi.weight)
    return conv


def gates(clips: int = 3, levels: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    both = torch.rand(2, clips, levels) * (torch.rand(2, clips, levels) < 0.6)
    both[0, 0] = 0
    return both[0], both[1]


def shake(norm: nn.BatchNorm3d) -> nn.BatchNorm3d:
    nn.init.uniform_(norm.weight, 0.5, 1)
    nn.init.normal_(norm.bias)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    return norm


@pytest.mark.parametrize("arguments", [{}, {"padding": 1, "kernel_size": 3}, {"padding_mode": "circular"}])
def test_without_gates_it_is_conv3d(arguments: dict) -> None:
    conv = make(**arguments)
    plain = nn.Conv3d(4, 6, **({"kernel_size": (1, 3, 3), "padding": (0, 1, 1)} | arguments))
    missing = plain.load_state_dict(conv.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert set(missing.unexpected_keys) == {"temporal_phi.weight", "channel_phi.weight"}
    x = torch.randn(2, 4, 3, 5, 6)
    assert torch.equal(conv(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(conv(x), plain(x), rtol=1e-4, atol=1e-5)


def test_one_level_has_no_filters() -> None:
    conv = make(temporal_levels=1, channel_levels=1)
    assert set(conv.state_dict()) == {"weight", "bias"}
    x = torch.randn(2, 4, 3, 5, 6)
    one = torch.ones(2, 1)
    torch.testing.assert_close(conv(x, one, one), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("filter_size", [1, 3])
def test_filters_start_as_copies(filter_size: int) -> None:
    conv = ak.DynamicConv3d(4, 6, 1, temporal_levels=3, channel_levels=3, filter_size=filter_size)
    x = torch.randn(1, 4, 5, 3, 4)
    third = torch.eye(3)[2:]
    y = conv(x, third, third)
    z = F.conv3d(x, conv.weight, conv.bias)
    for t, c in itertools.product(range(5), range(6)):
        torch.testing.assert_close(y[:, c, t], z[:, c % 2, t // 4 * 4])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"padding_mode": "replicate"}, {"padding": "same"}])
def test_with_gates(norm: bool, training: bool, arguments: dict) -> None:
    conv = make(norm=nn.BatchNorm3d if norm else None, activation="relu", **arguments).train(training)
    if norm:
        shake(conv.norm)
    other = copy.deepcopy(conv)
    x, both = torch.randn(3, 4, 5, 5, 6), gates()
    y = F.conv3d(
        F.pad(x, (1, 1, 1, 1, 0, 0), "replicate" if "padding_mode" in arguments else "constant"),
        other.weight,
        other.bias,
    )
    if norm:
        y = other.norm(y)
    want = dynamic_conv3d_reference(
        y,
        torch.ones(6, 1, 1, 1, 1),
        None,
        *both,
        temporal_weight=other.temporal_phi.weight,
        channel_weight=other.channel_phi.weight,
        groups=6,
        activation="relu",
    )
    for _ in range(2 if not training else 1):
        got = conv(x, *both)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad)
    for (name, p), q in zip(conv.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
    if norm:
        torch.testing.assert_close(conv.norm.running_mean, other.norm.running_mean)


class Repeat(nn.Module):
    """Φ_t of a module's own: frame m after a computed one is that, times a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))

    def forward(self, computed: Tensor, level: int) -> Tensor:
        return computed.unsqueeze(3) * self.scale[: 2**level - 1, None, None]


class Spread(nn.Module):
    """Φ_c by a 1x1 convolution from all computed channels."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv3d(3, 3, 1), nn.Conv3d(2, 4, 1)])

    def forward(self, computed: Tensor, level: int) -> Tensor:
        return self.levels[level - 1](computed)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_default_filters_as_modules(groups: int) -> None:
    class Frames(FrameFilters):
        pass

    fast = make(activation="silu", groups=groups, padding="same")
    slow = make(activation="silu", groups=groups, padding="same", temporal_phi=Frames(6, 3))
    slow.load_state_dict(fast.state_dict())
    assert type(slow.channel_phi) is ChannelFilters
    x, both = torch.randn(3, 4, 5, 5, 6), gates()
    got, want = slow(x, *both), fast(x, *both)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad)
    for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", [None, nn.BatchNorm3d])
def test_other_filters(norm: type | None) -> None:
    conv = make(temporal_phi=Repeat(), channel_phi=Spread(), norm=norm, stride=(1, 2, 2))
    x, both = torch.randn(3, 4, 5, 5, 6), gates()
    y = conv._conv_forward(x, conv.weight, conv.bias)
    if norm is not None:
        y = copy.deepcopy(conv.norm)(y)
    got = conv(x, *both)
    for b in range(3):
        mixed = 0
        for i in range(3):
            given = (6, 3, 2)[i]
            made = [] if i == 0 else [conv.channel_phi(y[b : b + 1, :given], i)]
            mixed = mixed + both[1][b, i] * torch.cat([y[b : b + 1, :given], *made], 1)
        want = 0
        for j in range(3):
            scale = torch.cat((torch.ones(1), conv.temporal_phi.scale))
            frames = [mixed[:, :, t // 2**j * 2**j] * scale[t % 2**j] for t in range(5)]
            want = want + both[0][b, j] * torch.stack(frames, 2)
        torch.testing.assert_close(got[b : b + 1], want, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in conv.parameters())
    with pytest.raises(ValueError, match="expected temporal_gate of non-negative weights, got -"):
        conv(x, both[0] - 1, both[1])


def test_work_with_other_filters() -> None:
    conv = make(temporal_phi=Repeat(), temporal_levels=2, channel_levels=1)
    x, gate = torch.randn(2, 4, 4, 5, 5), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    count = ak.count_flops(conv, x, gate)
    dense = 6 * 4 * 9 * 4 * 25 / 1e9
    assert count.dense == pytest.approx(dense)
    assert count.actual.tolist() == pytest.approx([dense / 2, dense])


def test_dead_clips_with_other_filters_have_a_gradient() -> None:
    conv = make(temporal_phi=Repeat())
    x, dead = torch.randn(3, 4, 5, 5, 6, requires_grad=True), torch.zeros(3, 3, requires_grad=True)
    output = conv(x, dead, gates()[1])
    assert (output == 0).all()
    output.sum().backward()
    for tensor in (x, dead, conv.weight, conv.bias):
        assert (tensor.grad == 0).all()


def test_format_with_other_filters() -> None:
    conv = make(temporal_phi=Repeat(), padding="same")
    x = torch.randn(3, 4, 5, 5, 6)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    for clips, form in ((x, torch.contiguous_format), (last, torch.channels_last_3d)):
        assert conv(clips, *gates()).is_contiguous(memory_format=form)


@pytest.mark.parametrize("phi", [{}, {"temporal_phi": Repeat(), "channel_phi": Spread()}])
def test_autocast(phi: dict[str, nn.Module]) -> None:
    conv, x = make(**phi), torch.randn(3, 4, 5, 5, 6)
    want = conv(x, *gates())
    with torch.autocast("cpu", torch.bfloat16):
        got = conv(x, *gates())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.1)


def test_compiles() -> None:
    conv = make(norm=nn.BatchNorm3d, activation="relu")
    x, both = torch.randn(3, 4, 5, 5, 6), gates()
    for module in (conv.train(), conv.eval()):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, *both), module(x, *both), rtol=1e-4, atol=1e-4)


def test_folded_weights_follow_the_parameters() -> None:
    conv = make(norm=nn.BatchNorm3d).eval()
    x, both = torch.randn(3, 4, 5, 5, 6), gates()
    with torch.no_grad():
        before = conv(x, *both)
        conv.norm.running_mean += 1
        assert not torch.allclose(conv(x, *both), before)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"activation": "gelu"}, "expected activation to be one of None, .*, got 'gelu'"),
        ({"temporal_levels": 4}, "expected temporal_levels to be 1 to 3, got 4"),
        ({"channel_levels": 0}, "expected channel_levels to be 1 to 3, got 0"),
        ({"filter_size": 5}, "expected filter_size to be 1 or 3, got 5"),
    ],
)
def test_bad_arguments(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"DynamicConv3d: {sentence}"):
        make(**arguments)


def test_repr() -> None:
    assert "activation=relu, levels=3x3" in repr(make(activation="relu"))
