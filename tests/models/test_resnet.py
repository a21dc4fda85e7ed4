import pytest
import torch
from plain_resnet import BLOCKS, plain_forward, shake_norms, shapes_of, torchvision_shapes

from adakernels.models import ResNet, resnet18, resnet34, resnet50

FACTORIES = {18: resnet18, 34: resnet34, 50: resnet50}


@pytest.mark.parametrize("depth", BLOCKS)
def test_keys_are_those_of_torchvision(depth: int) -> None:
    with torch.device("meta"):
        assert shapes_of(FACTORIES[depth]()) == torchvision_shapes(depth)
        assert shapes_of(FACTORIES[depth](10)) == torchvision_shapes(depth, 10)


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in make().parameters()) for make in FACTORIES.values()]
    assert counts == [11689512, 21797672, 25557032]


@pytest.mark.parametrize("depth", [18, 50])
def test_evaluation(depth: int) -> None:
    torch.manual_seed(0)
    model = shake_norms(FACTORIES[depth](7)).eval()
    x = torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        expected = plain_forward(model, x)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_other_depths() -> None:
    with pytest.raises(ValueError, match="depth to be 18, 34 or 50, got 101"):
        ResNet(101)


def test_training() -> None:
    torch.manual_seed(0)
    model = resnet18(7)
    model(torch.randn(2, 3, 33, 40)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.layer4[1].bn2.num_batches_tracked == 1
