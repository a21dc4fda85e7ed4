import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from plain_resnet import plain_forward, shake_norms, shapes_of, torchvision_shapes
from torch import Tensor, nn

import adakernels as ak
from adakernels.models import AdaFuseResNet, adafuse_resnet18, adafuse_resnet34, adafuse_resnet50
from adakernels.policies import ChannelPolicy

FRAMES = 3
FACTORIES = {18: adafuse_resnet18, 34: adafuse_resnet34, 50: adafuse_resnet50}


def spread_policies(model: nn.Module) -> None:
    """Makes the heads decide differently for different channels and frames."""
    for module in model.modules():
        if isinstance(module, ChannelPolicy):
            nn.init.normal_(module.fc2.weight)
            nn.init.normal_(module.fc2.bias)


def make(depth: int = 18, **kwargs: object) -> AdaFuseResNet:
    torch.manual_seed(0)
    model = AdaFuseResNet(depth, 5, FRAMES, hidden=16, **kwargs)
    shake_norms(model)
    spread_policies(model)
    return model.eval()


@pytest.fixture
def clips() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, FRAMES, 33, 40)


def masked_forward(model: AdaFuseResNet, clips: Tensor, policies: Iterator[Tensor]) -> Tensor:
    """The network by dense convolutions and masks, for given policies in the order of the blocks."""
    frames = clips.shape[2]

    def shifted(x: Tensor) -> Tensor:
        y = x.unflatten(0, (-1, frames)).clone()
        fold = x.shape[1] // 8
        y[:, :, : 2 * fold] = 0
        for t in range(frames):
            if t + 1 < frames:
                y[:, t, :fold] = x.unflatten(0, (-1, frames))[:, t + 1, :fold]
            if t > 0:
                y[:, t, fold : 2 * fold] = x.unflatten(0, (-1, frames))[:, t - 1, fold : 2 * fold]
        return y.flatten(0, 1)

    def fused(y: Tensor, policy: Tensor) -> Tensor:
        history = torch.zeros_like(y)
        for n in range(len(y)):
            if n % frames:
                history[n] = y[n - 1]
        if policy.dim() == 2:
            policy = F.one_hot(policy, 3).to(y)
        return y * policy[:, :, None, None, 0] + history * policy[:, :, None, None, 1]

    def dense(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(F.conv2d(x, conv.weight, None, conv.stride, conv.padding))

    x = clips.permute(0, 2, 1, 3, 4).reshape(-1, *clips.shape[1:2], *clips.shape[3:])
    x = F.max_pool2d(F.relu(dense(model.conv1, model.bn1, x)), 3, 2, 1)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            y = F.relu(dense(block.conv1, block.bn1, shifted(x) if block.shift else x))
            y = y if block.policy is None else fused(y, next(policies))
            y = dense(block.conv2, block.bn2, y)
            if hasattr(block, "conv3"):
                y = dense(block.conv3, block.bn3, F.relu(y))
            x = F.relu(y + (x if block.downsample is None else dense(*block.downsample, x)))
    logits = F.linear(x.mean((2, 3)), model.fc.weight, model.fc.bias)
    return logits.unflatten(0, (-1, frames)).mean(1)


@pytest.mark.parametrize("depth", FACTORIES)
def test_only_policies_are_added_to_torchvisions_keys(depth: int) -> None:
    with torch.device("meta"):
        shapes = shapes_of(FACTORIES[depth](174))
        first = shapes["layer2.0.policy.fc1.weight"]
        backbone = {key: shape for key, shape in shapes.items() if ".policy." not in key}
    assert backbone == torchvision_shapes(depth, 174)
    assert first == (1024, 2 * (256 if depth == 50 else 64))


def test_policy_of_every_block() -> None:
    with torch.device("meta"):
        for make_model, count in ((adafuse_resnet18, 8), (adafuse_resnet34, 16), (adafuse_resnet50, 16)):
            model = make_model()
            heads = [module for module in model.modules() if isinstance(module, ChannelPolicy)]
            assert len(heads) == count
            widths = [block.conv1.out_channels for _, block in model.blocks()]
            assert [head.out_channels for head in heads] == widths


def test_number_of_parameters_of_the_papers_tsm_last() -> None:
    with torch.device("meta"):
        model = adafuse_resnet50(174, shift=True, gated_stages=(4,))
    # Table 7: 39.1M with 1024 hidden units.
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(39.1e6, rel=0.002)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("gated_stages", [None, (2, 4)])
def test_evaluation(depth: int, shift: bool, gated_stages: tuple[int, ...] | None, clips: Tensor) -> None:
    model = make(depth, shift=shift, gated_stages=gated_stages)
    with torch.no_grad():
        logits, policies = model(clips, return_policies=True)
        expected = masked_forward(model, clips, iter(policies.values()))
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(model(clips), logits)
        assert torch.equal(model(clips.transpose(1, 2).flatten(0, 1)), logits)
    gated = [name for name, block in model.blocks() if block.policy is not None]
    assert list(policies) == gated
    assert {name[5] for name in gated} == ({"2", "4"} if gated_stages else set("1234"))
    assert set(torch.cat([p.flatten() for p in policies.values()]).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("shift", [False, True])
def test_training(shift: bool, clips: Tensor) -> None:
    model = make(shift=shift).train()
    reference = copy.deepcopy(model)
    logits, policies = model(clips, return_policies=True)
    expected = masked_forward(reference, clips, iter([p.detach() for p in policies.values()]))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        if ".policy." not in name and not shift:
            # The straight-through policies also pass gradients back into the features: only the last block,
            # behind all of them, has the reference's.
            if name.startswith(("layer4.1.conv2", "layer4.1.bn2", "fc")):
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-2, atol=1e-3)


def test_training_then_evaluation_uses_the_new_statistics(clips: Tensor) -> None:
    model = make()
    with torch.no_grad():
        before = model(clips)
        model.train()(clips)
        model.eval()
        after, policies = model(clips, return_policies=True)
        torch.testing.assert_close(
            after, masked_forward(model, clips, iter(policies.values())), rtol=1e-3, atol=1e-3
        )
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("shift", [False, True])
def test_clips_do_not_mix(shift: bool, clips: Tensor) -> None:
    model = make(shift=shift)
    changed = clips.clone()
    changed[1] += torch.randn_like(changed[1])
    with torch.no_grad():
        before, after = model(clips), model(changed)
        alone = model(clips[:1])
    torch.testing.assert_close(before[0], after[0])
    torch.testing.assert_close(before[0], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before[1], after[1])


def test_keeping_everything_is_the_plain_network(clips: Tensor) -> None:
    model = make()
    for module in model.modules():
        if isinstance(module, ChannelPolicy):
            module.fc2.weight.data.zero_()
            module.fc2.bias.data.view(-1, 3).copy_(torch.tensor([1.0, 0.0, 0.0]))
    with torch.no_grad():
        x = clips.transpose(1, 2).flatten(0, 1)
        expected = plain_forward(model, x).unflatten(0, (2, FRAMES)).mean(1)
        torch.testing.assert_close(model(clips), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [False, True])
def test_one_frame(shift: bool, clips: Tensor) -> None:
    model = make(shift=shift)
    model.frames = 1
    with torch.no_grad():
        logits, policies = model(clips[:, :, :1], return_policies=True)
        expected = masked_forward(model, clips[:, :, :1], iter(policies.values()))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert not any((policy == ak.Policy.REUSE).any() for policy in policies.values())


def test_no_clips() -> None:
    assert make()(torch.empty(0, 3, FRAMES, 32, 32)).shape == (0, 5)


def test_frames_can_be_changed(clips: Tensor) -> None:
    model = make()
    model.frames = 2
    with torch.no_grad():
        assert model(clips.transpose(1, 2).flatten(0, 1)).shape == (3, 5)
    with pytest.raises(ValueError, match="positive"):
        model.frames = 0


def test_errors(clips: Tensor) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"clips of 3 frames, got .*\[2, 3, 2, 33, 40\]"):
        model(clips[:, :, :2])
    with pytest.raises(ValueError, match=r"\[B \* 3, 3, H, W\], got \[4, 3, 33, 40\]"):
        model(torch.empty(4, 3, 33, 40))
    with pytest.raises(ValueError, match="gated_stages to be among 1, 2, 3, 4"):
        adafuse_resnet18(gated_stages=(5,))
    with pytest.raises(ValueError, match="frames to be positive, got 0"):
        adafuse_resnet18(frames=0)


def test_load_backbone(clips: Tensor) -> None:
    model = make()
    checkpoint = {key: torch.randn(shape).abs() for key, shape in torchvision_shapes(18, 1000).items()}
    missing = model.load_backbone(checkpoint)
    assert all(".policy." in key or key.startswith("fc.") for key in missing)
    assert {"fc.weight", "fc.bias"} <= set(missing)
    assert torch.equal(model.layer3[1].conv2.weight, checkpoint["layer3.1.conv2.weight"])
    same_classes = {key: torch.randn(shape).abs() for key, shape in torchvision_shapes(18, 5).items()}
    missing = model.load_backbone(same_classes)
    assert missing and all(".policy." in key for key in missing)
    assert torch.equal(model.fc.weight, same_classes["fc.weight"])
    result = model.load_state_dict(same_classes, strict=False)
    assert not result.unexpected_keys and result.missing_keys == missing


def test_load_backbone_without_counts_of_batches() -> None:
    shapes = torchvision_shapes(18, 5)
    old = {key: torch.zeros(shape) for key, shape in shapes.items() if "num_batches" not in key}
    missing = make().load_backbone(old)
    assert all(".policy." in key for key in missing)


def test_load_backbone_refuses_other_networks() -> None:
    checkpoint = {key: torch.zeros(shape) for key, shape in torchvision_shapes(34, 5).items()}
    with pytest.raises(ValueError, match=r"layer1\.2\.conv1\.weight"):
        make().load_backbone(checkpoint)
    del checkpoint["conv1.weight"]
    with pytest.raises(ValueError, match=r"lacks \['conv1.weight'\]"):
        make().load_backbone({key: checkpoint[key] for key in checkpoint if key in torchvision_shapes(18, 5)})


def test_sampling(clips: Tensor) -> None:
    model = make()
    with torch.no_grad():
        greedy = model(clips)
        model.sample_policies(generator=torch.Generator().manual_seed(0))
        first = model(clips)
        model.sample_policies(generator=torch.Generator().manual_seed(0))
        assert torch.equal(model(clips), first)
        assert not torch.allclose(first, greedy)
        model.sample_policies(False)
        assert torch.equal(model(clips), greedy)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(clone: Callable[[nn.Module], nn.Module], clips: Tensor) -> None:
    model = make(shift=True)
    with torch.no_grad():
        expected = model(clips)
        assert torch.equal(clone(model)(clips), expected)


def test_compiles_whole(clips: Tensor) -> None:
    model = make(shift=True, gated_stages=(1, 4))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        expected = model(clips)
        for _ in range(2):
            torch.testing.assert_close(compiled(clips), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool, clips: Tensor) -> None:
    model = make(shift=True).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(clips)
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad is not None for parameter in model.layer4.parameters()) or not training


def test_bfloat16_and_channels_last(clips: Tensor) -> None:
    model = make(gated_stages=(4,))
    with torch.no_grad():
        expected = model(clips)
        frames = clips.transpose(1, 2).flatten(0, 1).to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(frames), expected, rtol=1e-3, atol=1e-3)
        assert model.bfloat16()(clips.bfloat16()).dtype == torch.bfloat16
