import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakernels as ak
from adakernels import _extension
from adakernels.nn import GatedConv2d, conv_norm_act
from adakernels.ops._winograd import Transform

FRAMES = 3
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}


def masked(
    features: Tensor,  # [N, C, H, W]
    policy: Tensor,  # [N, C]
    frames: int,
) -> Tensor:
    """Keep, reuse and skip done channel by channel."""
    output = torch.zeros_like(features)
    for n in range(features.shape[0]):
        for c in range(features.shape[1]):
            if policy[n, c] == 0:
                output[n, c] = features[n, c]
            elif policy[n, c] == 1 and n % frames > 0:
                output[n, c] = features[n - 1, c]
    return output


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """A batch normalisation that has seen something."""
    norm = nn.BatchNorm2d(channels)
    for tensor in (norm.weight, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    for tensor in (norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    return norm


def make(activation: str | None = "relu", **kwargs: object) -> GatedConv2d:
    return GatedConv2d(4, 6, 3, padding=1, norm=batch_norm(6), activation=activation, **kwargs)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def frames() -> Tensor:
    return torch.randn(2 * FRAMES, 4, 5, 7)


@pytest.fixture
def policy() -> Tensor:
    return torch.randint(0, 3, (2 * FRAMES, 6))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": 1, "groups": 2, "padding_mode": "circular"},
    ],
)
def test_is_conv2d_without_a_policy(kwargs: dict[str, object], frames: Tensor) -> None:
    conv, gated = nn.Conv2d(4, 6, 3, **kwargs), GatedConv2d(4, 6, 3, **kwargs)
    assert list(gated.state_dict()) == list(conv.state_dict())
    gated.load_state_dict(conv.state_dict())
    assert torch.equal(gated(frames), conv(frames))
    keep = torch.zeros(len(frames), 6, dtype=torch.int64)
    torch.testing.assert_close(gated(frames, keep, frames=FRAMES), conv(frames))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_matches_dense_and_mask(
    activation: str | None, training: bool, frames: Tensor, policy: Tensor
) -> None:
    module = make(activation).train(training)
    reference = copy.deepcopy(module)
    dense = F.conv2d(frames, reference.weight, reference.bias, padding=1)
    expected = masked(ACTIVATIONS[activation](reference.norm(dense)), policy, FRAMES)
    torch.testing.assert_close(module(frames, policy, frames=FRAMES), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        # A second call changes the running statistics again, but not what the first batch is normalised with.
        torch.testing.assert_close(module(frames, policy, frames=FRAMES), expected, rtol=1e-4, atol=1e-5)
    if training:
        assert module.norm.num_batches_tracked == 2
    else:
        assert torch.equal(module.norm.running_mean, reference.norm.running_mean)


@pytest.mark.parametrize("training", [True, False])
def test_float_policy_is_the_integer_policy(training: bool, frames: Tensor, policy: Tensor) -> None:
    module = make().train(training)
    one_hot = F.one_hot(policy, 3).float().requires_grad_()
    soft = module(frames, one_hot, frames=FRAMES)
    torch.testing.assert_close(soft, module(frames, policy, frames=FRAMES), rtol=1e-4, atol=1e-5)
    soft.square().sum().backward()
    assert one_hot.grad is not None and one_hot.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_in_policy_marks_channels_that_are_zero(training: bool, frames: Tensor, policy: Tensor) -> None:
    in_policy = torch.randint(0, 3, (2 * FRAMES, 4))
    zeroed = frames * (in_policy != 2)[:, :, None, None]
    module = make().train(training)
    expected = module(zeroed, policy, frames=FRAMES)
    actual = module(frames, policy, frames=FRAMES, in_policy=in_policy)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(frames, in_policy=in_policy), module(zeroed), rtol=1e-4, atol=1e-5)


def test_frozen_norm_in_training_is_folded(frames: Tensor, policy: Tensor) -> None:
    module = make()
    module.norm.eval()
    expected = masked(
        F.relu(module.norm(F.conv2d(frames, module.weight, module.bias, padding=1))), policy, FRAMES
    )
    torch.testing.assert_close(module(frames, policy, frames=FRAMES), expected, rtol=1e-4, atol=1e-5)
    assert module.norm.num_batches_tracked == 0


def test_norms_that_can_not_be_folded(frames: Tensor, policy: Tensor) -> None:
    for norm in (nn.GroupNorm(2, 6), nn.BatchNorm2d(6, track_running_stats=False)):
        module = GatedConv2d(4, 6, 3, norm=norm, activation="relu").eval()
        expected = masked(F.relu(norm(F.conv2d(frames, module.weight, module.bias))), policy, FRAMES)
        torch.testing.assert_close(module(frames, policy, frames=FRAMES), expected)


def test_norm_may_be_given_as_its_class(frames: Tensor) -> None:
    module = GatedConv2d(4, 6, 3, norm=nn.BatchNorm2d)
    assert list(module.state_dict())[:3] == ["weight", "bias", "norm.weight"]
    assert module.norm.num_features == 6
    assert GatedConv2d(4, 6, 3, norm=nn.BatchNorm2d, dtype=torch.float64).norm.bias.dtype == torch.float64


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"to be one of None, 'relu', .*got 'gelu'"):
        GatedConv2d(4, 6, 3, activation="gelu")


def test_frames_that_do_not_divide_the_batch(frames: Tensor, policy: Tensor) -> None:
    for training in (True, False):
        with pytest.raises(ValueError, match="frames = 4"):
            make().train(training)(frames, policy, frames=4)


def test_clips_do_not_mix(frames: Tensor) -> None:
    module = make().eval()
    policy = torch.full((2 * FRAMES, 6), ak.Policy.REUSE)
    changed = frames.clone()
    changed[:FRAMES] += 1
    before, after = module(frames, policy, frames=FRAMES), module(changed, policy, frames=FRAMES)
    assert torch.equal(before[FRAMES:], after[FRAMES:])
    assert not torch.equal(before[:FRAMES], after[:FRAMES])


def scale_weight(module: GatedConv2d) -> None:
    with torch.no_grad():
        module.weight.mul_(2)


def scale_bias(module: GatedConv2d) -> None:
    with torch.no_grad():
        module.bias.add_(1)


def optimiser_step(module: GatedConv2d) -> None:
    module(torch.randn(2, 4, 5, 5)).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()


def load_other(module: GatedConv2d) -> None:
    module.load_state_dict(make().state_dict())


def assign_other(module: GatedConv2d) -> None:
    module.load_state_dict(make().state_dict(), assign=True)


def round_trip_dtype(module: GatedConv2d) -> None:
    module.bfloat16().float()


def transpose_parameter(module: GatedConv2d) -> None:
    module.weight = nn.Parameter(module.weight.detach().mT)


def replace_parameter(module: GatedConv2d) -> None:
    module.weight = nn.Parameter(torch.randn_like(module.weight))


def replace_norm(module: GatedConv2d) -> None:
    module.norm = batch_norm(6).eval()


def edit_norm(module: GatedConv2d) -> None:
    with torch.no_grad():
        module.norm.running_var.mul_(2)
        module.norm.bias.add_(1)


def set_eps(module: GatedConv2d) -> None:
    module.norm.eps = 0.5


def train_norm_alone(module: GatedConv2d) -> None:
    module.norm.train()
    module.norm(torch.randn(4, 6, 3, 3))
    module.norm.eval()


def train_a_while(module: GatedConv2d) -> None:
    module.train()
    module(torch.randn(4, 4, 5, 5))
    module.eval()


def write_through_data(module: GatedConv2d) -> None:
    module.weight.data.mul_(2)
    module.eval()


@pytest.mark.parametrize(
    "change",
    [
        scale_weight,
        scale_bias,
        optimiser_step,
        load_other,
        assign_other,
        round_trip_dtype,
        replace_parameter,
        transpose_parameter,
        replace_norm,
        edit_norm,
        set_eps,
        train_norm_alone,
        train_a_while,
        write_through_data,
    ],
)
def test_folded_weights_follow_changes(
    change: Callable[[GatedConv2d], None], frames: Tensor, policy: Tensor
) -> None:
    module = make().eval()
    with torch.no_grad():
        before = module(frames, policy, frames=FRAMES)
    change(module)
    with torch.no_grad():
        after = module(frames, policy, frames=FRAMES)
        expected = F.relu(module.norm(F.conv2d(frames, module.weight, module.bias, padding=1)))
    torch.testing.assert_close(after, masked(expected, policy, FRAMES), rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, after)


def test_folding_happens_once(frames: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from adakernels.nn import folding

    calls = []
    fold = folding.fold_batch_norm
    monkeypatch.setattr(folding, "fold_batch_norm", lambda *args: calls.append(1) or fold(*args))
    module = make().eval()
    with torch.no_grad():
        module(frames)
        module(frames)
        assert len(calls) == 1
    module(frames)
    assert len(calls) == 2, "with gradients to the weights they are folded anew"
    module.requires_grad_(False)
    module(frames)
    assert len(calls) == 2


@pytest.fixture
def transforms(monkeypatch: pytest.MonkeyPatch) -> list[Transform]:
    """What kernels are transformed for, one after the other."""
    from adakernels.nn import _conv_norm_act

    made = []
    transform = _conv_norm_act.winograd_kernels
    monkeypatch.setattr(
        _conv_norm_act, "winograd_kernels", lambda *args: made.append(args[1]) or transform(*args)
    )
    return made


needs_cpu_kernels = pytest.mark.skipif(not _extension.has_cpu, reason="the compiled extension keeps kernels")


@needs_cpu_kernels
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
@pytest.mark.parametrize("gated", [True, False])
def test_kernels_are_transformed_once(
    gated: bool, norm: Any, policy: Tensor, transforms: list[Transform]
) -> None:
    module = GatedConv2d(4, 6, 3, padding=1, norm=norm, activation="relu").eval()
    policies = (policy,) if gated else ()
    inputs = [torch.randn(2 * FRAMES, 4, *size) for size in ((40, 40), (5, 7), (8, 130))]
    expected = [module(frames, *policies, frames=FRAMES).detach() for frames in inputs]
    with torch.no_grad(), ak.use_backend("reference"):
        module(inputs[0], *policies, frames=FRAMES)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        module(inputs[0], *policies, frames=FRAMES)
    assert not transforms
    with torch.inference_mode():
        for _ in range(4):
            for frames, result in zip(inputs, expected, strict=True):
                actual = module(frames, *policies, frames=FRAMES)
                torch.testing.assert_close(actual, result, rtol=1e-4, atol=1e-5)
        # A plain layer follows whatever happens to a parameter, as torch's does, and leaves small maps to it.
        kept = [(4, 1), (2, 1)] if gated else [(4, 1)] if norm else []
        assert transforms == kept
        module.eval()
        for _ in range(2):
            module(inputs[0], *policies, frames=FRAMES)
        assert len(transforms) == (len(kept) + 1 if kept else 0), "kept no longer than until the mode is set"


@needs_cpu_kernels
def test_a_stride_changes_the_kernels(policy: Tensor, transforms: list[Transform]) -> None:
    module = GatedConv2d(4, 6, 3, padding=1, norm=batch_norm(6)).eval()
    small, large = torch.randn(2 * FRAMES, 4, 7, 7), torch.randn(2 * FRAMES, 4, 22, 22)
    with torch.no_grad():
        for policies in ((policy,), ()):
            for stride, frames in (((1, 1), small), ([2, 2], large), ((2, 2), large), ((1, 1), small)):
                module.stride = stride
                with ak.use_backend("reference"):
                    expected = module(frames, *policies, frames=FRAMES)
                for _ in range(3):
                    actual = module(frames, *policies, frames=FRAMES)
                    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert transforms == [(2, 1), (2, 2)]


@needs_cpu_kernels
def test_results_do_not_depend_on_calls_before(frames: Tensor, policy: Tensor) -> None:
    module = make().eval()
    with torch.no_grad():
        first = module(frames, policy, frames=FRAMES)
        assert torch.equal(module(frames, policy, frames=FRAMES), first)


def no_norm() -> GatedConv2d:
    return GatedConv2d(4, 6, 3, padding=1, activation="relu").eval()


@needs_cpu_kernels
@pytest.mark.parametrize(
    "change",
    [
        scale_weight,
        optimiser_step,
        lambda module: module.load_state_dict(no_norm().state_dict()),
        lambda module: module.load_state_dict(no_norm().state_dict(), assign=True),
        replace_parameter,
        transpose_parameter,
        write_through_data,
    ],
)
def test_transformed_kernels_follow_changes(
    change: Callable[[GatedConv2d], None], frames: Tensor, policy: Tensor, transforms: list[Transform]
) -> None:
    module = no_norm()
    twin = copy.deepcopy(module)

    def run() -> Tensor:
        with torch.no_grad():
            return [module(frames, policy, frames=FRAMES) for _ in range(3)][-1]

    before = run()
    change(module)
    after = run()
    expected = F.relu(F.conv2d(frames, module.weight, module.bias, padding=1)).detach()
    torch.testing.assert_close(after, masked(expected, policy, FRAMES), rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, after)
    assert transforms == [(2, 1)] * 2
    module = twin
    torch.testing.assert_close(run(), before)


@needs_cpu_kernels
def test_weights_that_are_new_in_every_call_are_not_transformed(
    frames: Tensor, policy: Tensor, transforms: list[Transform]
) -> None:
    def of(norm: nn.Module | None) -> GatedConv2d:
        return GatedConv2d(4, 6, 3, padding=1, norm=norm).eval()

    norm = nn.utils.parametrizations.weight_norm(batch_norm(6), dim=None)
    layers = [nn.utils.parametrizations.weight_norm(of(each)) for each in (None, batch_norm(6))]
    large = torch.randn(2 * FRAMES, 4, 40, 40)
    with torch.no_grad():
        for layer in (*layers, of(norm)):
            for _ in range(3):
                layer(frames, policy, frames=FRAMES)
                layer(large)
    with torch.inference_mode():
        layer = of(batch_norm(6))
        for _ in range(3):
            layer(frames, policy, frames=FRAMES)
    assert not transforms


def test_weights_folded_in_inference_mode_serve_a_gradient(frames: Tensor) -> None:
    module = make().eval().requires_grad_(False)
    with torch.inference_mode():
        expected = module(frames)
    frames.requires_grad_()
    actual = module(frames)
    actual.sum().backward()
    assert torch.equal(actual, expected)
    assert frames.grad is not None


def test_module_made_in_inference_mode(frames: Tensor, policy: Tensor) -> None:
    with torch.inference_mode():
        module = make().eval()
        before = module(frames, policy, frames=FRAMES)
        module.weight.mul_(2)
        assert not torch.equal(before, module(frames, policy, frames=FRAMES))


def test_evaluation_is_differentiable(frames: Tensor, policy: Tensor) -> None:
    module = make("silu").double().eval()
    reference = copy.deepcopy(module)
    inputs = [frames.double().requires_grad_() for _ in range(2)]
    dense = F.silu(reference.norm(F.conv2d(inputs[0], reference.weight, reference.bias, padding=1)))
    weights = torch.randn_like(dense)
    (masked(dense, policy, FRAMES) * weights).sum().backward()
    (module(inputs[1], policy, frames=FRAMES) * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for actual, expected in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, frames: Tensor, policy: Tensor) -> None:
    module = make().eval()
    expected = module(frames, policy, frames=FRAMES)
    actual = module.to(dtype)(frames.to(dtype), policy, frames=FRAMES)
    assert actual.dtype == dtype
    # bfloat16 carries 8 bits; sums of 36 products of order one.
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


def test_channels_last_is_kept(frames: Tensor, policy: Tensor) -> None:
    module = make().eval()
    output = module(frames.to(memory_format=torch.channels_last), policy, frames=FRAMES)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, module(frames, policy, frames=FRAMES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_independent(
    clone: Callable[[nn.Module], nn.Module], frames: Tensor, policy: Tensor
) -> None:
    module = make().eval()
    with torch.no_grad():
        expected = module(frames, policy, frames=FRAMES)
        other = clone(module)
        assert torch.equal(other(frames, policy, frames=FRAMES), expected)
        other.weight.zero_()
        assert torch.equal(module(frames, policy, frames=FRAMES), expected)
        assert not torch.equal(other(frames, policy, frames=FRAMES), expected)


def test_pickle_does_not_grow_by_folded_weights(frames: Tensor) -> None:
    module = make().eval()
    size = len(pickle.dumps(module))
    with torch.no_grad():
        module(frames)
    assert len(pickle.dumps(module)) == size


def test_compiles_whole(frames: Tensor, policy: Tensor) -> None:
    module = make().eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = module(frames, policy, frames=FRAMES)
        torch.testing.assert_close(compiled(frames, policy, frames=FRAMES), expected)
        module.weight.mul_(2)
        torch.testing.assert_close(
            compiled(frames, policy, frames=FRAMES), module(frames, policy, frames=FRAMES)
        )


def test_exports(frames: Tensor, policy: Tensor) -> None:
    module = make().eval()
    program = torch.export.export(module, (frames, policy), {"frames": FRAMES})
    torch.testing.assert_close(
        program.module()(frames, policy, frames=FRAMES), module(frames, policy, frames=FRAMES)
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [27, 28, 56])
def test_large_pointwise_convolutions(stride: int, size: int) -> None:
    module = GatedConv2d(5, 9, 1, stride=stride, norm=batch_norm(9), activation="relu").eval()
    x = torch.randn(2, 5, size, size)
    with torch.no_grad():
        expected = F.relu(module.norm(F.conv2d(x, module.weight, module.bias, stride)))
        for layout in (torch.contiguous_format, torch.channels_last):
            actual = module(x.contiguous(memory_format=layout))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert module(x[:0]).shape == (0, *expected.shape[1:])


def test_norm_held_by_someone_else(frames: Tensor, policy: Tensor) -> None:
    owner = make().eval()
    conv = GatedConv2d.from_conv2d(owner)
    assert conv.weight is owner.weight and conv.norm is None and not conv.training
    with torch.no_grad():
        expected = owner(frames, policy, frames=FRAMES)
        for _ in range(2):
            actual = conv_norm_act(conv, owner.norm, "relu", frames, policy, frames=FRAMES)
            assert torch.equal(actual, expected)
