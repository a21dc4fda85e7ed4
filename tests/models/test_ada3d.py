from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adakernels import count_flops, models
from adakernels.models import Ada3DResNet, ada3d_i3d_resnet50, ada3d_slowonly_resnet50

# GF of the paper at 256x256: 8 frames, 16 frames, and 8 frames with every stage in 2D.
PAPER = [(ada3d_i3d_resnet50, 5, 58.6, 117.3, 42.7), (ada3d_slowonly_resnet50, 2, 54.5, 109.1, 42.7)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(policy: tuple[int, ...] = (0, 1, 2, 3, 4)) -> Ada3DResNet:
    """I3D with random statistics, which a 32x32 image is enough for."""
    model = Ada3DResNet(5, ((3,), (3, 1), (3, 1), (1, 3)), 7, policy_stages=policy)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()


def plain(model: Ada3DResNet, clip: Tensor, bits: list[bool]) -> Tensor:
    """One clip [1, 3, T, H, W] through the network in torch's own 3D operators."""

    def layer(conv: torch.nn.Conv3d, norm: torch.nn.Module, x: Tensor, whole: bool) -> Tensor:
        weight = conv.weight
        if not whole:
            centre = torch.zeros_like(weight)
            middle = weight.shape[2] // 2
            centre[:, :, middle] = weight[:, :, middle]
            weight = centre
        return norm(F.conv3d(x, weight, None, conv.stride, conv.padding))

    x = F.relu(layer(model.conv1, model.bn1, clip, bits[0]))
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for number in range(1, 5):
        for block in model.stage(number):
            y = F.relu(layer(block.conv1, block.bn1, x, bits[number]))
            y = F.relu(layer(block.conv2, block.bn2, y, True))
            y = layer(block.conv3, block.bn3, y, True)
            if block.downsample is not None:
                x = layer(*block.downsample, x, True)
            x = F.relu(x + y)
    return model.fc(x.mean((2, 3, 4)))


@pytest.mark.parametrize(("factory", "bits", "eight", "sixteen", "flat"), PAPER)
def test_work_of_the_papers_networks(
    factory: object, bits: int, eight: float, sixteen: float, flat: float
) -> None:
    with torch.device("meta"):
        model = factory().eval()
        assert len(model.policy_stages) == bits
        assert count_flops(model, torch.empty(1, 3, 16, 256, 256)).dense == pytest.approx(sixteen, rel=0.01)
        clips = torch.empty(2, 3, 8, 256, 256)
        assert count_flops(model, clips).dense == pytest.approx(eight, rel=0.01)


def test_work_that_the_policies_leave() -> None:
    model = ada3d_i3d_resnet50().eval()
    clips = torch.randn(2, 3, 8, 64, 64)
    temporal = torch.tensor([[False] * 5, [True, False, True, False, False]])
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[1, ::2] = False
    whole, sliced = count_flops(model, clips), count_flops(model, clips, temporal)
    assert sliced.dense == whole.dense == whole.actual[0]
    # Of 58.6 GF at 256x256, 42.7 are left in 2D; here all but the classifier is a sixteenth of that.
    assert sliced.actual[0] / sliced.dense == pytest.approx(42.7 / 58.6, rel=0.01)
    fewer = count_flops(model, clips, temporal, keep)
    assert fewer.dense == pytest.approx(whole.dense) and fewer.actual[0] == sliced.actual[0]
    classifier = model.fc.weight.numel() / 1e9
    half = (sliced.actual[1] - classifier) / 2 + classifier
    assert fewer.actual[1] == pytest.approx(half.item())


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_clip_has_its_own_policy(channels_last: bool) -> None:
    model = small()
    clips = torch.randn(3, 3, 6, 32, 32)
    if channels_last:
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
    temporal = torch.tensor([[True] * 5, [False] * 5, [True, False, False, True, False]])
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]]) > 0
    with torch.no_grad():
        got = model(clips, temporal, keep)
        for b in range(3):
            want = plain(model, clips[b : b + 1, :, keep[b]], temporal[b].tolist())
            torch.testing.assert_close(got[b : b + 1], want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model(clips)[:1], got[:1], rtol=1e-3, atol=1e-4)


def test_trains() -> None:
    model = small().train()
    loss = model(torch.randn(2, 3, 4, 32, 32), torch.tensor([[False] * 5] * 2)).square().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if name.endswith("conv1.weight"):
            taps = parameter.shape[2]
            outer = [j for j in range(taps) if j != taps // 2]
            assert (parameter.grad[:, :, outer] == 0).all() and (parameter.grad[:, :, taps // 2] != 0).any()


def test_bad_input() -> None:
    model = small((3, 4))
    clips = torch.randn(2, 3, 4, 32, 32)
    with pytest.raises(ValueError, match=r"Ada3DResNet: expected clips of shape \[B, 3, T, H, W\], got"):
        model(clips[0])
    with pytest.raises(ValueError, match=r"expected temporal of shape \[B, K\] = \[2, 2\], got \[2, 5\]"):
        model(clips, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="sliced_conv3d: expected temporal of dtype bool, got float32"):
        model(clips, torch.ones(2, 2))
    with pytest.raises(ValueError, match="to leave every clip at least one frame"):
        model(clips, None, torch.zeros(2, 4, dtype=torch.bool))
    assert models.VideoResNet(1, ((1,), (1,), (3,), (3,)), 5).fc.out_features == 5


@pytest.mark.parametrize("factory", [ada3d_i3d_resnet50, ada3d_slowonly_resnet50])
def test_length_of_the_clips(factory: Callable[..., Ada3DResNet]) -> None:
    with torch.device("meta"):
        model, clips = factory(num_classes=7, frames=8).eval(), torch.empty(2, 3, 8, 32, 32)
        assert model(clips).shape == (2, 7)
        with pytest.raises(ValueError, match=r"expected clips of shape \[B, 3, 8, H, W\], got \[2, 3, 6, "):
            model(clips[:, :, :6])
