import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adakernels as ak
from adakernels.nn import SlimConv2d, SlimConv3d, SlimLinear
from adakernels.ops._onednn import has_onednn

WIDTH, SEGMENTS = 8, ((0, 8), (16, 24))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def batch_norm(channels: int) -> nn.BatchNorm3d:
    """A batch normalisation that has seen something."""
    norm = nn.BatchNorm3d(channels)
    for tensor in (norm.weight, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    for tensor in (norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    return norm


def make(norm: Any = batch_norm, **kwargs: Any) -> SlimConv3d:
    torch.manual_seed(0)
    arguments = {"padding": (0, 1, 1), "norm": norm, "activation": "relu"} | kwargs
    return SlimConv3d(24, 16, (1, 3, 3), **arguments)


def expected(conv: SlimConv3d, input: Tensor) -> Tensor:  # [B, 16, T, H, W]
    """The definition, in float64."""
    weight = torch.cat([conv.weight[:WIDTH, start:stop] for start, stop in SEGMENTS], 1).double()
    bias = None if conv.bias is None else conv.bias[:WIDTH].double()
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(input.double(), conv._reversed_padding_repeated_twice, mode=mode)
    output = F.conv3d(padded, weight, bias, conv.stride)
    norm = conv.norm
    if norm is not None:
        tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        first = [tensor[:WIDTH].double() for tensor in tensors]
        output = F.batch_norm(output, *first, eps=norm.eps)
    return {None: lambda x: x, "relu": F.relu, "silu": F.silu}[conv.activation](output)


def run(conv: SlimConv3d, input: Tensor) -> Tensor:
    return conv(input, out_channels=WIDTH, segments=SEGMENTS)


def check(conv: SlimConv3d, input: Tensor) -> None:
    torch.testing.assert_close(run(conv, input).double(), expected(conv, input), rtol=1e-4, atol=1e-4)


@pytest.fixture(params=FORMATS)
def clips(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 16, 3, 7, 5).contiguous(memory_format=FORMATS[request.param])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": 1, "groups": 2},
        {"padding": 1, "groups": 4},
    ],
)
def test_is_the_convolution_of_torch_when_called_with_its_input_alone(kwargs: dict[str, Any]) -> None:
    input = torch.randn(2, 4, 6, 5)
    conv, slim = nn.Conv2d(4, 8, 3, **kwargs), SlimConv2d(4, 8, 3, **kwargs)
    assert isinstance(slim, nn.Conv2d)
    assert list(slim.state_dict()) == list(conv.state_dict())
    slim.load_state_dict(conv.state_dict())
    torch.testing.assert_close(slim(input), conv(input))
    with torch.no_grad():
        torch.testing.assert_close(slim(input), conv(input))


@pytest.mark.parametrize("kind", [(SlimConv2d, nn.Conv2d), (SlimConv3d, nn.Conv3d)])
@pytest.mark.parametrize("grad", [False, True])
def test_takes_what_is_no_batch_when_called_with_its_input_alone(
    kind: tuple[type[nn.Module], type[nn.Module]], grad: bool
) -> None:
    slim, conv = kind[0](4, 8, 3, padding=1), kind[1](4, 8, 3, padding=1)
    slim.load_state_dict(conv.state_dict())
    rank = conv.weight.dim() - 2
    input = torch.randn(4, *(6, 5, 3)[:rank])
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(slim(input), conv(input))
        # Half of the channels, which torch does not take, and no image at all.
        for wrong in (input[:2], input[0, 0], input[None, None]):
            with pytest.raises(ValueError, match=f"slim_conv{rank}d: expected input of rank {rank + 2}"):
                slim(wrong)
        for wrong in (None, [1.0]):
            with pytest.raises(TypeError, match="expected input to be a Tensor, got"):
                slim(wrong)
    normed = kind[0](4, 8, 3, padding=1, norm=(nn.BatchNorm2d, nn.BatchNorm3d)[rank - 2], activation="relu")
    normed.load_state_dict(conv.state_dict(), strict=False)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(normed.train()(input[None]), F.relu(normed.norm(conv(input[None]))))
        want = F.relu(normed.eval().norm(conv(input[None])))[0]
        torch.testing.assert_close(normed(input), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_second_derivatives_when_called_with_its_input_alone(training: bool) -> None:
    conv = make(activation="silu").train(training)
    plain = nn.Conv3d(24, 16, (1, 3, 3), padding=(0, 1, 1))
    plain.load_state_dict(conv.state_dict(), strict=False)

    def second(run: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        torch.manual_seed(2)
        input = torch.randn(2, 24, 2, 3, 3, requires_grad=True)
        (grad,) = torch.autograd.grad(run(input).square().sum(), input, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    want = second(lambda input: F.silu(conv.norm(plain(input))), plain.weight)
    torch.testing.assert_close(second(conv, conv.weight), want, rtol=1e-3, atol=1e-3 * want.abs().max())


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("norm", [None, batch_norm])
def test_evaluation(activation: str | None, norm: Callable[..., nn.Module] | None, clips: Tensor) -> None:
    conv = make(norm, activation=activation).eval()
    check(conv, clips)
    with torch.no_grad():
        check(conv, clips)
        check(conv, clips)
    with torch.inference_mode():
        check(conv, clips)
    with torch.no_grad(), ak.use_backend("reference"):
        check(conv, clips)
    double = make(norm, activation=activation).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(run(double, clips.double()), expected(double, clips))


@pytest.mark.parametrize("bias", [False, True])
def test_padding_and_no_bias(bias: bool, clips: Tensor) -> None:
    with torch.no_grad():
        for kwargs in ({"padding": "same"}, {"padding": 1, "padding_mode": "circular"}, {"padding": "valid"}):
            conv = make(bias=bias, **kwargs).eval()
            plain = nn.Conv3d(24, 16, (1, 3, 3), bias=bias, **kwargs)
            plain.load_state_dict(conv.state_dict(), strict=False)
            full = torch.zeros(2, 24, *clips.shape[2:])
            full[:, :8], full[:, 16:] = clips[:, :8], clips[:, 8:]
            want = F.relu(conv.norm(plain(full)))[:, :WIDTH]
            torch.testing.assert_close(run(conv, clips), want, rtol=1e-4, atol=1e-4)


CHANGES: dict[str, Callable[[SlimConv3d], Any]] = {
    "in place": lambda conv: conv.weight.mul_(2),
    "one element": lambda conv: conv.weight[0, 0, 0, 1, 1].add_(3),
    "bias": lambda conv: conv.bias.add_(1),
    "optimiser": lambda conv: torch.optim.SGD(conv.parameters(), lr=1.0).step(),
    "load_state_dict": lambda conv: conv.load_state_dict(
        {name: tensor + 1 for name, tensor in conv.state_dict().items()}
    ),
    "new parameter": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight + 1)),
    "data": lambda conv: setattr(conv.weight, "data", conv.weight.detach() + 1),
    "norm's weight": lambda conv: conv.norm.weight.add_(1),
    "norm's statistics": lambda conv: conv.norm.running_var.add_(1),
    "norm's eps": lambda conv: setattr(conv.norm, "eps", 0.5),
    "statistics swapped": lambda conv: setattr(conv.norm, "running_mean", torch.ones(16)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_prepared_follows_every_change(change: str, clips: Tensor) -> None:
    conv = make().eval()
    for parameter in conv.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        before = run(conv, clips)
        assert conv._prepared._entry is not None
        CHANGES[change](conv)
        assert not torch.allclose(run(conv, clips), before, atol=1e-3)
        check(conv, clips)


def test_training_in_between_is_seen(clips: Tensor) -> None:
    conv = make().eval()
    with torch.no_grad():
        run(conv, clips)
    optimiser = torch.optim.SGD(conv.parameters(), lr=0.1)
    for _ in range(2):
        run(conv.train(), clips).square().mean().backward()
        optimiser.step()
    conv.eval()
    with torch.no_grad():
        check(conv, clips)


def test_a_width_is_prepared_once(clips: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = make().eval()
    module = __import__("adakernels.nn.slim_conv", fromlist=["prepare"])
    prepared, prepare = [], module.prepare
    monkeypatch.setattr(module, "prepare", lambda *args: prepared.append(args[3][1]) or prepare(*args))
    other = clips[:1]
    with torch.no_grad():
        for _ in range(3):
            run(conv, clips)
            run(conv, other)
        for _ in range(2):
            conv(clips, out_channels=16, segments=SEGMENTS)
            run(conv, clips)
        for _ in range(2):
            conv(clips, out_channels=4, segments=SEGMENTS)
            run(conv, clips)
        conv(clips, out_channels=16, segments=SEGMENTS)
    assert prepared == [WIDTH, 16, 4, WIDTH, 16]


@pytest.mark.parametrize("kind", [SlimConv2d, SlimConv3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_prepared_kernel_of_one_tap_is_a_product_of_matrices(
    kind: type[nn.Module], dtype: torch.dtype, activation: str | None, bias: bool
) -> None:
    conv = kind(24, 40, 1, bias=bias, activation=activation).to(dtype).eval()
    order = {SlimConv2d: torch.channels_last, SlimConv3d: torch.channels_last_3d}[kind]
    for batch, size in ((2, 3), (1, 5)):
        shape = (batch, 16, size, 4, 7)[: conv.weight.dim()]
        input = torch.randn(shape).to(dtype).contiguous(memory_format=order)
        for _ in range(2):
            with torch.no_grad():
                output = run(conv, input)
            with ak.use_backend("reference"), torch.no_grad():
                want = run(conv, input)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(output, want, rtol=tolerance, atol=tolerance)
            assert output.is_contiguous(memory_format=order)
    if has_onednn(dtype):
        assert {call.run.form for call in conv._prepared._entry[2].calls} == {("pixels", "linear")}


def test_calls_that_take_turns_are_each_validated_once(
    clips: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = make().eval()
    module = __import__("adakernels.nn.slim_conv", fromlist=["cpu_call"])
    validated, cpu_call = [], module.cpu_call
    monkeypatch.setattr(module, "cpu_call", lambda *args: validated.append(args[1]) or cpu_call(*args))
    turns = [clips, clips.transpose(3, 4).contiguous(), clips[:1]]
    with torch.no_grad():
        for _ in range(3):
            for input in turns:
                check(conv, input)
        assert [id(input) for input in validated] == [id(input) for input in turns]
        for width in (16, 4):
            conv(clips, out_channels=width, segments=SEGMENTS)
    prepared = conv._prepared._entry[2]
    kept = {id(weight) for weight, _ in prepared.widths.values()}
    assert {id(call.weight) for call in prepared.calls} == kept and len(kept) == module.PREPARED


def test_a_call_like_one_before_follows_what_is_not_like_it(clips: Tensor) -> None:
    conv = make().eval()
    segments = [[0, 8], [16, 24]]
    layouts = [clips, clips[:, :, :2], clips[..., 1:], clips.contiguous(), clips.transpose(3, 4), clips[:1]]
    with torch.no_grad():
        for input in layouts:
            check(conv, input)
        whole = conv(clips, out_channels=16, segments=segments)
        segments[1][:] = [8, 16]
        assert not torch.allclose(conv(clips, out_channels=16, segments=segments), whole, atol=1e-3)
        check(conv, clips)
        with torch.backends.mkldnn.flags(enabled=False):
            check(conv, clips)
        with ak.use_backend("reference"):
            check(conv, clips)
        check(conv, clips)
        conv.stride = (1, 2, 1)
        check(conv, clips)
        conv.activation = None
        check(conv, clips)
        conv.padding_mode = "replicate"
        check(conv, clips)


def test_transformed_kernels_are_those_of_the_stride_and_the_blocks() -> None:
    conv = ak.SlimConv2d(32, 48, 3, padding=1, activation="relu").eval()
    with torch.no_grad():
        for size, stride in ((14, 1), (7, 1), (22, 2), (14, 1), (7, 1)):
            conv.stride = (stride, stride)
            frames = torch.randn(3, 24, size, size)
            expected = F.conv2d(frames, conv.weight[:40, :24], conv.bias[:40], stride, 1).relu()
            for _ in range(2):
                torch.testing.assert_close(conv(frames, out_channels=40), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["weight", "norm"])
def test_parametrised_layers_prepare_nothing(
    which: str, clips: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__("adakernels.nn.slim_conv", fromlist=["prepare"])
    monkeypatch.setattr(module, "prepare", lambda *args: pytest.fail("prepared"))
    conv = make().eval()
    nn.utils.parametrizations.weight_norm(conv if which == "weight" else conv.norm, dim=None)
    with torch.no_grad():
        check(conv, clips)


@pytest.mark.parametrize(
    "arguments",
    [{"out_channels": True}, {"out_channels": 1.0}, {"segments": ((False, 8), (16, 24))}],
)
def test_bad_arguments_that_equal_good_ones_of_a_call_before(
    arguments: dict[str, Any], clips: Tensor
) -> None:
    conv = make().eval()
    good: dict[str, Any] = {"out_channels": 1, "segments": SEGMENTS}
    with torch.no_grad():
        for _ in range(2):
            conv(clips, **good)
        with pytest.raises(TypeError, match="to be an int, got"):
            conv(clips, **good | arguments)


@pytest.mark.parametrize("norm", [None, batch_norm])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_prepared_keeps_no_graph(mode: Callable[[], Any], norm: Any, clips: Tensor) -> None:
    conv = make(norm).eval()
    with mode():
        run(conv, clips)
    assert conv._prepared._entry is not None
    for tensors in conv._prepared._entry[2].widths.values():
        assert not any(tensor.requires_grad for tensor in tensors)


def test_other_threads_may_drop_a_width_in_use(clips: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = make().eval()
    module = __import__("adakernels.nn.slim_conv", fromlist=["record_work"])
    record_work = module.record_work

    def meanwhile(*args: Any) -> None:
        monkeypatch.setattr(module, "record_work", record_work)
        for width in (4, 16):
            conv(clips, out_channels=width, segments=SEGMENTS)

    with torch.no_grad():
        for _ in range(2):
            monkeypatch.setattr(module, "record_work", meanwhile)
            check(conv, clips)
            assert len(conv._prepared._entry[2].widths) == module.PREPARED


def test_copies_and_pickles(clips: Tensor) -> None:
    conv = make().eval()
    with torch.no_grad():
        run(conv, clips)
        for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
            other.weight.mul_(2)
            check(other, clips)
        check(conv, clips)


def test_training_statistics_are_those_of_the_first_channels(clips: Tensor) -> None:
    conv, norm = make().train(), batch_norm(WIDTH)
    norm.load_state_dict(
        {name: x if x.dim() == 0 else x[:WIDTH].clone() for name, x in conv.norm.state_dict().items()}
    )
    rest = [buffer[WIDTH:].clone() for buffer in (conv.norm.running_mean, conv.norm.running_var)]
    weight = torch.cat([conv.weight[:WIDTH, start:stop] for start, stop in SEGMENTS], 1)
    want = F.relu(norm.train()(F.conv3d(clips, weight, conv.bias[:WIDTH], padding=(0, 1, 1))))
    torch.testing.assert_close(run(conv, clips), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conv.norm.running_mean[:WIDTH], norm.running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conv.norm.running_var[:WIDTH], norm.running_var, rtol=1e-4, atol=1e-5)
    assert conv.norm.num_batches_tracked == 1
    assert torch.equal(conv.norm.running_mean[WIDTH:], rest[0])
    assert torch.equal(conv.norm.running_var[WIDTH:], rest[1])


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_zero_outside(training: bool, clips: Tensor) -> None:
    conv = make().train(training)
    run(conv, clips).sum().backward()
    used = torch.zeros_like(conv.weight, dtype=torch.bool)
    for start, stop in SEGMENTS:
        used[:WIDTH, start:stop] = True
    assert (conv.weight.grad[~used] == 0).all()
    assert (conv.weight.grad[used] != 0).any()
    assert (conv.norm.weight.grad[WIDTH:] == 0).all()
    assert (conv.norm.weight.grad[:WIDTH] != 0).any()


@pytest.mark.parametrize("training", [False, True])
def test_compiled(training: bool, clips: Tensor) -> None:
    conv = make().train(training)
    want = run(copy.deepcopy(conv), clips)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(clips, out_channels=WIDTH, segments=SEGMENTS), want)


def test_other_norms(clips: Tensor) -> None:
    conv = make(lambda channels: nn.GroupNorm(2, channels))
    assert conv(clips, segments=SEGMENTS).shape == (2, 16, 3, 7, 5)
    with pytest.raises(
        ValueError, match="expected a batch normalisation with 8 of 16 channels, got GroupNorm"
    ):
        run(conv, clips)


def test_bad_arguments(clips: Tensor) -> None:
    with pytest.raises(ValueError, match="SlimConv3d: expected activation to be one of None, 'relu'"):
        make(activation="gelu")
    for mode in (torch.no_grad(), torch.enable_grad()):
        with (
            mode,
            pytest.raises(ValueError, match="slim_conv3d: expected out_channels of at most C_out = 16"),
        ):
            make().eval()(clips, out_channels=17, segments=SEGMENTS)


@pytest.mark.parametrize("segments", [None, ((0, 4), (6, 8))])
def test_linear(segments: tuple[tuple[int, int], ...] | None) -> None:
    layer, input = SlimLinear(8, 3), torch.randn(5, 6)
    index = [0, 1, 2, 3, 4, 5] if segments is None else [0, 1, 2, 3, 6, 7]
    want = input @ layer.weight[:, index].T + layer.bias
    torch.testing.assert_close(layer(input, segments), want)
    count = ak.count_flops(layer, input, segments)
    assert (count.dense, count.actual.tolist()) == (24 / 1e9, [18 / 1e9] * 5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_flops(backend: str) -> None:
    conv, input = make().eval(), torch.randn(2, 24, 3, 7, 5)
    with ak.use_backend(backend):
        full = ak.count_flops(conv, input)
        half = ak.count_flops(_Half(conv), input[:, :12])
    assert full.dense == half.dense == 24 * 16 * 9 * 105 / 1e9
    assert full.actual.tolist() == [full.dense] * 2
    assert half.actual.tolist() == [full.dense / 4] * 2


class _Half(nn.Module):
    def __init__(self, conv: SlimConv3d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input, out_channels=8)
