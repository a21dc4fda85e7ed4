import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakernels as ak
from adakernels import flops
from adakernels.flops import count_flops
from adakernels.models import AdaFuseResNet, adafuse_resnet18, adafuse_resnet50, resnet18, resnet50
from adakernels.nn import GatedConv2d
from adakernels.policies import ChannelPolicy


@pytest.mark.parametrize(
    ("factory", "plain", "papers"), [(adafuse_resnet18, resnet18, 14.6), (adafuse_resnet50, resnet50, 32.9)]
)
def test_dense_work_of_the_papers_networks(factory: object, plain: object, papers: float) -> None:
    with torch.device("meta"):
        clip = torch.empty(2, 3, 8, 224, 224)
        count = count_flops(factory().eval(), clip)
        assert count.dense == pytest.approx(papers, rel=0.01)
        assert count.actual.shape == (2,)
        assert count_flops(plain().eval(), clip[0].transpose(0, 1)).dense == pytest.approx(
            papers / 8, rel=0.01
        )


class Pair(nn.Module):
    """Two convolutions with a fixed policy between them, and a classifier for each clip."""

    def __init__(self, policy: Tensor, frames: int) -> None:
        super().__init__()
        self.conv1 = GatedConv2d(4, 6, 3, padding=1, norm=nn.BatchNorm2d, activation="relu")
        self.conv2 = GatedConv2d(6, 5, 1, stride=2)
        self.fc = nn.Linear(5, 7)
        self.policy, self.frames = policy, frames

    def forward(self, x: Tensor) -> Tensor:
        policy = self.policy
        x = self.conv1(x, policy, frames=self.frames)
        x = self.conv2(x, in_policy=None if policy.is_floating_point() else policy)
        return self.fc(x.unflatten(0, (-1, self.frames)).mean((1, 3, 4)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_actual_work_of_each_clip(backend: str) -> None:
    frames, clips = 3, 2
    policy = torch.randint(0, 3, (clips * frames, 6), generator=torch.Generator().manual_seed(0))
    model = Pair(policy, frames).eval()
    with ak.use_backend(backend):
        count = count_flops(model, torch.randn(clips * frames, 4, 7, 7))
    dense = frames * (7 * 7 * 6 * 4 * 9 + 4 * 4 * 5 * 6) + 5 * 7
    assert count.dense == pytest.approx(dense / 1e9, rel=1e-12)
    for b in range(clips):
        work = 5 * 7
        for t in range(frames):
            row = policy[b * frames + t].tolist()
            later = policy[b * frames + t + 1].tolist() if t + 1 < frames else [2] * 6
            needed = sum(now == 0 or after == 1 for now, after in zip(row, later, strict=True))
            work += 7 * 7 * needed * 4 * 9 + 4 * 4 * 5 * sum(now != 2 for now in row)
        assert count.actual[b].item() == pytest.approx(work / 1e9, rel=1e-12)
    assert count.actual.dtype == torch.float64


def test_policy_heads_count_as_actual_work_only() -> None:
    model = AdaFuseResNet(18, 5, 2, hidden=16)
    heads = [module for module in model.modules() if isinstance(module, ChannelPolicy)]
    for head in heads:
        nn.init.zeros_(head.fc2.weight)
        with torch.no_grad():
            head.fc2.bias.view(-1, 3).copy_(torch.tensor([1.0, 0.0, 0.0]))
    clip = torch.randn(1, 3, 2, 32, 32)
    count = count_flops(model.eval(), clip)
    work = 2 * sum(head.fc1.weight.numel() + head.fc2.weight.numel() for head in heads)
    assert count.actual.item() == pytest.approx(count.dense + work / 1e9, rel=1e-12)
    plain = count_flops(resnet18(5).eval(), clip[0].transpose(0, 1))
    # The plain network classifies each of the two frames.
    assert count.dense == pytest.approx(2 * plain.dense - 512 * 5 / 1e9, rel=1e-12)


def test_same_count_in_training_mode() -> None:
    policy = F.one_hot(torch.randint(0, 3, (4, 6)), 3).float()
    x = torch.randn(4, 4, 7, 7)
    model = Pair(policy, 2)
    training, evaluation = count_flops(model, x), count_flops(model.eval(), x)
    assert training.dense == evaluation.dense


def test_layers_of_torch() -> None:
    model = nn.Sequential(nn.Conv3d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 27, 3))
    count = count_flops(model, torch.randn(2, 2, 5, 5, 5))
    assert count.dense * 1e9 == pytest.approx(27 * 4 * 27 + 4 * 27 * 3)
    assert count.actual.tolist() == pytest.approx([count.dense] * 2)
    assert str(count) == "0.00 of 0.00 GF"


def test_compiled_models_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(2, 3, 5, 5)
    assert count_flops(torch.compile(model), x).dense == count_flops(model, x).dense


def test_nothing_is_left_behind() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        count_flops(model, torch.randn(2, 3))
    assert not flops.counting and not model._forward_hooks and not model._forward_pre_hooks


def test_outputs_without_a_batch() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    with pytest.raises(ValueError, match="return a batch of tensors"):
        count_flops(Sum(), torch.ones(3))
