import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakernels as ak
from adakernels.models import A3DSlow, A3DSlowFast, a3d_slow_resnet50, a3d_slowfast_resnet50
from adakernels.models._layers import make_divisible
from adakernels.models.a3d import Lateral, SlimBottleneck, subsampled
from adakernels.nn import SlimConv3d

# Size, frames, width, GFLOPs and million parameters, as published.
TABLE_9 = (
    (256, 8, 1.0, 54.5, 32.5),
    (224, 8, 1.0, 41.7, 32.5),
    (224, 6, 1.0, 31.3, 32.5),
    (224, 4, 1.0, 20.9, 32.5),
    (224, 4, 0.9, 16.8, 26.5),
    (224, 4, 0.8, 13.4, 21.0),
    (192, 4, 0.8, 9.8, 21.0),
    (192, 4, 0.7, 7.6, 16.0),
    (224, 4, 0.5, 5.3, 8.3),
    (192, 4, 0.5, 3.9, 8.3),
    (160, 4, 0.5, 2.7, 8.3),
    (192, 2, 0.5, 2.0, 8.3),
    (160, 2, 0.5, 1.4, 8.3),
    (128, 2, 0.5, 0.9, 8.3),
)
TABLE_10 = (
    (256, 8, 1.0, 54.5, 32.5),
    (224, 8, 1.0, 41.7, 32.5),
    (224, 8, 0.83, 29.3, 22.5),
    (224, 8, 0.73, 22.5, 17.5),
    (224, 8, 0.63, 16.6, 13.0),
    (224, 5, 0.63, 10.4, 13.0),
    (178, 5, 0.63, 7.3, 13.0),
    (178, 3, 0.63, 4.4, 13.0),
    (142, 3, 0.63, 2.7, 13.0),
)
TABLE_11 = (
    (256, 4, 1.0, 36.1, 34.5),
    (224, 4, 1.0, 27.6, 34.5),
    (224, 3, 1.0, 22.1, 34.5),
    (224, 3, 0.83, 17.4, 24.4),
    (224, 3, 0.73, 14.7, 19.2),
    (224, 3, 0.63, 12.4, 14.5),
    (224, 2, 0.63, 10.2, 14.5),
    (178, 2, 0.63, 8.8, 14.5),
    (142, 2, 0.73, 8.3, 19.2),
    (142, 2, 0.63, 7.6, 14.5),
)


def within_one_percent(got: float, published: float) -> bool:
    # What is published is rounded to one decimal.
    return abs(got - published) <= 0.01 * published + 0.05


@pytest.fixture(scope="module")
def slow_on_meta() -> A3DSlow:
    with torch.device("meta"):
        return a3d_slow_resnet50().eval()


@pytest.fixture(scope="module")
def slowfast_on_meta() -> A3DSlowFast:
    with torch.device("meta"):
        return a3d_slowfast_resnet50().eval()


@pytest.mark.parametrize("size, frames, width, cost, parameters", TABLE_9 + TABLE_10)
def test_cost_of_slow(
    slow_on_meta: A3DSlow, size: int, frames: int, width: float, cost: float, parameters: float
) -> None:
    slow_on_meta.set_budget(width=width, size=size, frames=frames)
    count = ak.count_flops(slow_on_meta, torch.empty(1, 3, 8, 256, 256, device="meta"))
    assert within_one_percent(count.actual.item(), cost)
    assert within_one_percent(slow_on_meta.active_parameters() / 1e6, parameters)
    if width == 1:
        assert count.dense == pytest.approx(count.actual.item())


@pytest.mark.parametrize("size, frames, width, cost, parameters", TABLE_11)
def test_cost_of_slowfast(
    slowfast_on_meta: A3DSlowFast, size: int, frames: int, width: float, cost: float, parameters: float
) -> None:
    # The Fast pathway keeps the size of the clip, which is 224 but for the first row.
    clip = torch.empty(1, 3, 32, *(max(size, 224),) * 2, device="meta")
    slowfast_on_meta.set_budget(width=width, size=size, frames=frames)
    count = ak.count_flops(slowfast_on_meta, clip)
    assert within_one_percent(count.actual.item(), cost)
    assert within_one_percent(slowfast_on_meta.active_parameters() / 1e6, parameters)


def test_full_budget(slow_on_meta: A3DSlow, slowfast_on_meta: A3DSlowFast) -> None:
    for model, cost, millions in ((slow_on_meta, 54.5, 32.5), (slowfast_on_meta, 36.1, 34.4)):
        model.set_budget()
        frames = 8 if isinstance(model, A3DSlow) else 32
        count = ak.count_flops(model, torch.empty(1, 3, frames, 256, 256, device="meta"))
        assert count.actual.item() == pytest.approx(cost, rel=0.01)
        assert model.active_parameters() == sum(parameter.numel() for parameter in model.parameters())
        assert model.active_parameters() / 1e6 == pytest.approx(millions, rel=0.01)


def test_make_divisible() -> None:
    assert [make_divisible(64 * width) for width in (1, 0.83, 0.63, 0.5)] == [64, 56, 40, 32]
    assert make_divisible(256 * 0.73) == 184
    assert (make_divisible(3), make_divisible(11), make_divisible(12), make_divisible(19)) == (8, 16, 16, 24)


def test_subsampled() -> None:
    clips = torch.arange(8.0).reshape(1, 1, 8, 1, 1)
    for frames, kept in ((8, list(range(8))), (6, [0, 1, 2, 4, 5, 6]), (3, [0, 2, 5]), (2, [0, 4])):
        assert subsampled(clips, frames).flatten().tolist() == kept


def small(kind: str) -> A3DSlow | A3DSlowFast:
    torch.manual_seed(0)
    if kind == "slow":
        return a3d_slow_resnet50(num_classes=5, frames=4)
    return a3d_slowfast_resnet50(num_classes=5, frames=2)


@pytest.fixture(params=["slow", "slowfast"], scope="module")
def trained(request: pytest.FixtureRequest) -> A3DSlow | A3DSlowFast:
    """A network whose batch normalisation has seen something."""
    model = small(request.param)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def clips(trained: A3DSlow | A3DSlowFast) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 4 if isinstance(trained, A3DSlow) else 16, 48, 48)


def plain(conv: SlimConv3d, input: Tensor, out_channels: int | None = None, lateral: int = 0) -> Tensor:
    """A layer by slices, convolution and normalisation of torch."""
    count, norm = out_channels or conv.out_channels, conv.norm
    first = input.shape[1] - lateral
    weight = conv.weight[:count]
    weight = torch.cat([weight[:, :first], weight[:, conv.in_channels - lateral :]], 1)
    output = F.conv3d(input, weight, None, conv.stride, conv.padding)
    statistics = (norm.running_mean[:count], norm.running_var[:count], norm.weight[:count], norm.bias[:count])
    output = F.batch_norm(output, *statistics, eps=norm.eps)
    return output.relu() if conv.activation == "relu" else output


def plain_block(block: SlimBottleneck, input: Tensor, width: float) -> Tensor:
    inner = make_divisible(block.conv1.out_channels * width)
    outer = make_divisible(block.conv3.out_channels * width)
    branch = plain(block.conv1, input, inner, block.lateral)
    branch = plain(block.conv3, plain(block.conv2, branch, inner), outer)
    shortcut = input if block.downsample is None else plain(block.downsample, input, outer, block.lateral)
    return (branch + shortcut).relu()


def plain_stem(conv: SlimConv3d, input: Tensor, width: float) -> Tensor:
    output = plain(conv, input, make_divisible(conv.out_channels * width))
    return F.max_pool3d(output, (1, 3, 3), (1, 2, 2), (0, 1, 1))


def plain_logits(model: A3DSlow | A3DSlowFast, clips: Tensor, width: float, size: int, frames: int) -> Tensor:
    """What the network is to compute, spelled out."""
    kept = [i * clips.shape[2] // frames for i in range(frames)]
    slow = torch.stack(
        [
            F.interpolate(clips[:, :, t], (size, size), mode="bilinear") if size != 48 else clips[:, :, t]
            for t in kept
        ],
        2,
    )
    slow = plain_stem(model.slow.stem, slow, width)
    fast = None if isinstance(model, A3DSlow) else plain_stem(model.fast.stem, clips, 1)
    for i in range(4):
        if fast is not None:
            added = plain(model.laterals[i].conv, fast)
            added = added[:, :, [j * added.shape[2] // frames for j in range(frames)]]
            added = torch.stack(
                [
                    F.interpolate(added[:, :, t], slow.shape[3:], mode="bilinear", align_corners=False)
                    for t in range(frames)
                ],
                2,
            )
            slow = torch.cat([slow, added], 1)
        for block in getattr(model.slow, f"layer{i + 1}"):
            slow = plain_block(block, slow, width)
        if fast is not None:
            for block in getattr(model.fast, f"layer{i + 1}"):
                fast = plain_block(block, fast, 1)
    features, weight = slow.mean((2, 3, 4)), model.fc.weight
    used = weight[:, : features.shape[1]]
    if fast is not None:
        features = torch.cat([features, fast.mean((2, 3, 4))], 1)
        used = torch.cat([used, weight[:, -fast.shape[1] :]], 1)
    return features @ used.T + model.fc.bias


BUDGETS = [(1.0, 48, None), (0.63, 48, 2), (0.5, 39, 1), (0.83, 41, 2)]


@pytest.fixture(params=BUDGETS, ids=str)
def budget(
    request: pytest.FixtureRequest, trained: A3DSlow | A3DSlowFast
) -> Iterator[tuple[float, int, int]]:
    width, size, frames = request.param
    trained.set_budget(width=width, size=size, frames=frames)
    yield width, size, frames or trained.all_frames
    trained.set_budget()


def test_logits(trained: A3DSlow | A3DSlowFast, clips: Tensor, budget: tuple[float, int, int]) -> None:
    with torch.no_grad():
        want = plain_logits(trained, clips, *budget)
        for input in (clips, clips.contiguous(memory_format=torch.channels_last_3d)):
            torch.testing.assert_close(trained(input), want, rtol=1e-3, atol=1e-3)
        with ak.use_backend("reference"):
            torch.testing.assert_close(trained(clips), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["slow", "slowfast"])
def test_a_slim_step_of_training_leaves_the_rest_alone(kind: str) -> None:
    model = small(kind).train()
    model.set_budget(width=0.5, size=32, frames=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    input = torch.randn(2, 3, 4 if kind == "slow" else 16, 40, 40)
    F.cross_entropy(model(input), torch.tensor([0, 3])).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model.state_dict()
    conv = after["slow.layer1.1.conv2.weight"], before["slow.layer1.1.conv2.weight"]
    assert (conv[0][:32, :32] != conv[1][:32, :32]).any()
    assert torch.equal(conv[0][32:], conv[1][32:]) and torch.equal(conv[0][:, 32:], conv[1][:, 32:])
    mean = after["slow.layer1.1.conv2.norm.running_mean"]
    assert (mean[:32] != 0).all() and (mean[32:] == 0).all()
    if kind == "slowfast":
        first = after["slow.layer2.0.conv1.weight"] != before["slow.layer2.0.conv1.weight"]
        assert first[:64, :128].any() and first[:64, -64:].any() and not first[:, 128:-64].any()
        assert all(
            not torch.equal(tensor, before[name])
            for name, tensor in after.items()
            if name.startswith("fast.")
        )


def test_the_fast_pathway_is_never_slimmed() -> None:
    model = small("slowfast")
    model.set_budget(width=0.5, size=32, frames=1)
    assert model.slow.width == 0.5 and model.fast.width == 1
    assert all(block.width == 1 for stage in model.fast.stages() for block in stage)


def test_lateral_interpolates_and_subsamples() -> None:
    torch.manual_seed(0)
    lateral = Lateral(4, 2).eval()
    fast = torch.randn(1, 4, 8, 6, 6)
    with torch.no_grad():
        whole = lateral(fast, (4, 6, 6))
        part = lateral(fast, (3, 4, 5))
    assert whole.shape == (1, 8, 4, 6, 6)
    for i, t in enumerate((0, 1, 2)):
        want = F.interpolate(whole[:, :, t], (4, 5), mode="bilinear")
        torch.testing.assert_close(part[:, :, i], want)


def test_bad_budgets(slow_on_meta: A3DSlow) -> None:
    for arguments, message in (
        ({"width": 0}, r"A3DSlow: expected width in \(0, 1\], got 0"),
        ({"width": 1.1}, r"A3DSlow: expected width in \(0, 1\], got 1.1"),
        ({"frames": 9}, "A3DSlow: expected frames from 1 to 8, got 9"),
        ({"frames": 0}, "A3DSlow: expected frames from 1 to 8, got 0"),
        ({"size": 0}, "A3DSlow: expected size to be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            slow_on_meta.set_budget(**arguments)
    slow_on_meta.set_budget()
    with pytest.raises(
        ValueError, match=r"A3DSlow: expected input of shape \[B, 3, 8, H, W\], got \[1, 3, 4, "
    ):
        slow_on_meta(torch.empty(1, 3, 4, 64, 64, device="meta"))


@pytest.mark.parametrize("training", [False, True])
def test_block_compiled(training: bool) -> None:
    torch.manual_seed(0)
    block = SlimBottleneck(40, 16, 64, frames=3, stride=2, lateral=8).train(training)
    block.width = 0.63
    input = torch.randn(1, 16 + 8, 3, 6, 5)
    want = copy.deepcopy(block)(input)
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(input)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
