from __future__ import annotations

import copy

import plain_r2plus1d
import pytest
import torch
import torch.nn.functional as F
from plain_resnet import shapes_of
from torch import Tensor, nn

import adakernels as ak
from adakernels.models import VARed2X3d, vared2_r2plus1d_18, vared2_x3d_m
from adakernels.nn import ChannelFilters, FrameFilters


def shake(model: nn.Module) -> nn.Module:
    """Makes normalisation and reconstruction do something that can be seen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
        if isinstance(module, ChannelFilters | FrameFilters):
            nn.init.normal_(module.weight, std=0.3)
    return model


def draw_gates(model: nn.Module, clips: int) -> dict[str, tuple[Tensor, Tensor]]:
    def one() -> Tensor:
        return torch.rand(clips, 2) * F.one_hot(torch.randint(2, (clips,)), 2)

    return {name: (one(), one()) for name, _ in model.dynamic_convs()}


def own_part(key: str) -> bool:
    return ".gate" in key or "_phi." in key


def test_keys_are_those_of_torchvision() -> None:
    with torch.device("meta"):
        shapes = shapes_of(vared2_r2plus1d_18())
    plain = {key: shape for key, shape in shapes.items() if not own_part(key)}
    assert plain == plain_r2plus1d.torchvision_shapes()
    assert (
        sum(torch.Size(shape).numel() for key, shape in plain.items() if key.endswith(("weight", "bias")))
        == 31505325
    )


def test_loads_the_plain_network() -> None:
    torch.manual_seed(0)
    checkpoint = {key: torch.randn(shape) for key, shape in plain_r2plus1d.torchvision_shapes().items()}
    model = vared2_r2plus1d_18(7, frames=4)
    missing = model.load_backbone(checkpoint)
    assert all(own_part(key) or key.startswith("fc.") for key in missing)
    assert torch.equal(model.layer2[0].conv2[0][3].weight, checkpoint["layer2.0.conv2.0.3.weight"])
    del checkpoint["layer1.0.conv1.0.0.weight"]
    with pytest.raises(ValueError, match=r"the checkpoint lacks \['layer1.0.conv1.0.0.weight'\]"):
        model.load_backbone(checkpoint)


@pytest.mark.parametrize("midplanes", ["torchvision", "formula"])
def test_r2plus1d_without_gates_is_the_plain_network(midplanes: str) -> None:
    torch.manual_seed(0)
    model = shake(vared2_r2plus1d_18(5, frames=5, midplanes=midplanes)).eval()
    x = torch.randn(2, 3, 5, 40, 36)
    with torch.no_grad():
        want = plain_r2plus1d.plain_forward(model, x)
        for input in (x, x.contiguous(memory_format=torch.channels_last_3d)):
            torch.testing.assert_close(model(input, {}), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [vared2_r2plus1d_18, vared2_x3d_m])
def test_gates(make) -> None:
    torch.manual_seed(0)
    model = shake(make(5, frames=None)).eval()
    x = torch.randn(2, 3, 4, 40, 40)
    gates = draw_gates(model, 2)
    with torch.no_grad():
        got, taken = model(x, gates, return_gates=True)
        assert taken == gates
        with ak.use_backend("reference"):
            want = model(x, gates)
            assert not torch.allclose(want, model(x, {}), rtol=0.1)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        # Clips do not depend on each other.
        alone = model(x[1:], {name: (t[1:], c[1:]) for name, (t, c) in gates.items()})
        torch.testing.assert_close(alone, got[1:], rtol=1e-3, atol=1e-3)
        # Its own gates.
        own, taken = model(x, return_gates=True)
        torch.testing.assert_close(model(x, taken), own, rtol=1e-3, atol=1e-3)
    assert list(taken) == [name for name, _ in model.dynamic_convs()]


@pytest.mark.parametrize("make", [vared2_r2plus1d_18, vared2_x3d_m])
def test_training(make) -> None:
    torch.manual_seed(0)
    model = make(5, frames=4, temporal_levels=2, channel_levels=3, filter_size=1)
    model(torch.randn(2, 3, 4, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_block_compiles() -> None:
    torch.manual_seed(0)
    block = shake(vared2_r2plus1d_18(5, frames=2)).layer1[0].eval()
    x = torch.randn(1, 64, 2, 6, 6)

    def run(x: Tensor) -> Tensor:
        return block(x, "layer1.0", lambda name, gate, features: gate(features))

    with torch.no_grad():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), run(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("frames", "midplanes", "paper"),
    [(8, "formula", 27.7), (16, "formula", 55.2), (32, "formula", 110.5), (16, "torchvision", None)],
)
def test_work_of_r2plus1d(frames: int, midplanes: str, paper: float | None) -> None:
    model = vared2_r2plus1d_18(frames=frames, midplanes=midplanes).eval()
    dense = ak.count_flops(model, torch.randn(1, 3, frames, 32, 32), {}).dense - 512 * 400 / 1e9
    # Everything but the classifier grows with the size of the frames.
    dense = 16 * dense + 512 * 400 / 1e9
    assert dense == pytest.approx(paper or 52.9, rel=0.02)
    if paper is None:
        assert dense < 0.98 * 55.2


def test_work_of_x3d() -> None:
    model = vared2_x3d_m().eval()
    count = ak.count_flops(model, torch.randn(1, 3, 16, 64, 64), {}).dense
    heads = (
        432 * 2048
        + 2048 * 400
        + sum(
            m.fc1.weight.numel() + m.fc2.weight.numel()
            for m in model.modules()
            if type(m).__name__ == "SqueezeExcitation"
        )
    ) / 1e9
    assert 16 * (count - heads) + heads == pytest.approx(6.20, rel=0.02)


def test_work_follows_the_gates() -> None:
    model = vared2_r2plus1d_18(frames=4).eval()
    x = torch.randn(2, 3, 4, 32, 32)
    whole = ak.count_flops(model, x, {})
    assert whole.actual.tolist() == pytest.approx([whole.dense] * 2)
    halves = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    count = ak.count_flops(model, x, {name: (halves, None) for name, _ in model.dynamic_convs()})
    spatial = sum(
        conv.weight.numel() * frames * size**2 / 1e9
        for (name, conv) in model.dynamic_convs()
        for frames, size in [
            {"1": (4, 16), "2": (2, 8), "3": (1, 4), "4": (1, 2)}[name[5]]
            if not (name.endswith("0.conv1.0.0") and name[5] != "1")
            else {"2": (4, 8), "3": (2, 4), "4": (1, 2)}[name[5]]
        ]
        if frames > 1
    )
    assert count.actual[0].item() == pytest.approx(whole.dense)
    # Half of the dynamic convolutions, where there are two frames, and 9 products for each pixel made.
    assert count.actual[1].item() == pytest.approx(whole.dense - spatial / 2, rel=0.03)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="midplanes to be 'torchvision' or 'formula', got 'mine'"):
        vared2_r2plus1d_18(midplanes="mine")
    model = VARed2X3d(5, frames=4)
    with pytest.raises(ValueError, match=r"VARed2X3d: expected input of shape \[B, 3, 4, H, W\], got"):
        model(torch.randn(1, 3, 5, 32, 32))
    with pytest.raises(ValueError, match=r"there are no dynamic convolutions \['layer1.0.conv9'\]"):
        model(torch.randn(1, 3, 4, 32, 32), {"layer1.0.conv9": (None, None)})


def test_copies_are_independent() -> None:
    model = shake(vared2_r2plus1d_18(5, frames=2)).eval()
    x = torch.randn(1, 3, 2, 32, 32)
    with torch.no_grad():
        want = model(x)
        other = copy.deepcopy(model)
        nn.init.zeros_(other.fc.weight)
        torch.testing.assert_close(model(x), want)
