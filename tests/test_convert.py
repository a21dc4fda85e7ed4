import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adakernels.convert import convert
from adakernels.models import AdaFuseResNet, resnet18
from adakernels.models.resnet import ResidualBlock

FRAMES = 3


class BasicBlock(nn.Module):
    """In the manner of torchvision's."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = None
        if stride != 1 or inputs != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, planes, 1, stride, bias=False), norm(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """In the manner of torchvision's."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = norm(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), norm(4 * planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """In the manner of torchvision's, with a narrow body."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        width: int = 8,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for stage in range(4):
            blocks = []
            for i in range(2):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(inputs, width * 2**stage, stride, norm))
                inputs = width * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2 * FRAMES, 3, 33, 40)


def shake_norms(model: nn.Module) -> nn.Module:
    """Makes every normalisation do something that can be seen."""
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            nn.init.uniform_(tensor, 0.5, 1)
        elif name.endswith(("running_mean", "bn1.bias", "bn2.bias")):
            nn.init.normal_(tensor, std=0.1)
    return model


def keep_everything(model: nn.Module) -> None:
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            nn.init.zeros_(block.policy.fc2.weight)
            with torch.no_grad():
                block.policy.fc2.bias.view(-1, 3).copy_(torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(4, channels)])
def test_weights_and_keys_are_kept(
    block: type[BasicBlock] | type[Bottleneck], norm: Callable[[int], nn.Module], images: Tensor
) -> None:
    model = shake_norms(ResNet(block, norm)).eval()
    expected = model(images)
    state = model.state_dict()
    weight = model.layer2[0].conv1.weight
    assert convert(model, frames=FRAMES, hidden=16) is model
    assert type(model) is ResNet
    assert model.layer2[0].conv1.weight is weight
    assert {key for key in model.state_dict() if ".policy." not in key} == set(state)
    assert not any(module.training for module in model.modules())
    keep_everything(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


def test_is_the_model_of_the_factory(images: Tensor) -> None:
    """Converting a plain ResNet and loading its weights into the factory's network is the same thing."""
    torch.manual_seed(0)
    model = convert(shake_norms(resnet18(5)).eval(), method="adafuse", frames=FRAMES, shift=True, hidden=16)
    other = AdaFuseResNet(18, 5, FRAMES, shift=True, hidden=16).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images).unflatten(0, (2, FRAMES)).mean(1), other(images))


def test_stages_and_shift(images: Tensor) -> None:
    model = convert(ResNet(BasicBlock), frames=FRAMES, shift=True, gated_stages=(4,), hidden=16)
    assert [block.policy is not None for layer in (model.layer1, model.layer4) for block in layer] == [
        False,
        False,
        True,
        True,
    ]
    assert all(block.shift and block.frames == FRAMES for block in model.layer1)
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_modes_are_kept() -> None:
    model = ResNet(BasicBlock)
    model.layer1[0].bn1.eval()
    convert(model, hidden=16)
    assert not model.layer1[0].bn1.training
    assert model.layer1[0].bn2.training and model.layer1[0].training


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="method to be 'adafuse', got 'magic'"):
        convert(ResNet(BasicBlock), method="magic")


def test_nothing_to_gate() -> None:
    with pytest.raises(ValueError, match="Linear has no residual blocks in layer1 to gate"):
        convert(nn.Linear(2, 2))


def with_attention(block: BasicBlock) -> None:
    block.se = nn.Conv2d(8, 8, 1)


def with_other_activation(block: BasicBlock) -> None:
    block.relu = nn.SiLU()


def with_other_conv(block: BasicBlock) -> None:
    block.conv2 = nn.ConvTranspose2d(8, 8, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_attention, r"layer1.1 \(BasicBlock\) can't be gated: expected the parts .*'se'"),
        (with_other_activation, "layer1.1 can't be gated: its activation is SiLU, not ReLU"),
        (with_other_conv, "layer1.1 can't be gated: its conv2 is a ConvTranspose2d, not a Conv2d"),
    ],
)
def test_other_blocks_leave_the_model_alone(change: Callable[[BasicBlock], None], message: str) -> None:
    model = ResNet(BasicBlock)
    change(model.layer1[1])
    with pytest.raises(ValueError, match=message):
        convert(model)
    assert not any(isinstance(module, ResidualBlock) for module in model.modules())


def test_bad_options_leave_the_model_alone() -> None:
    model = ResNet(BasicBlock)
    with pytest.raises(ValueError, match="gated_stages"):
        convert(model, gated_stages=(0,))
    with pytest.raises(ValueError, match="frames"):
        convert(model, frames=0)
    assert not any(isinstance(module, ResidualBlock) for module in model.modules())


def test_twice() -> None:
    model = convert(ResNet(BasicBlock), hidden=16)
    with pytest.raises(ValueError, match=r"layer1\.0 has a policy already"):
        convert(model)


def test_copies_of_a_converted_model(images: Tensor) -> None:
    model = convert(ResNet(Bottleneck).eval(), frames=FRAMES, hidden=16)
    assert torch.equal(copy.deepcopy(model)(images), model(images))
