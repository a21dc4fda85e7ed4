"""VA-RED² (Pan et al., ICLR 2021) on R(2+1)D-18 and X3D-M: gates choose what each convolution computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, cast, overload

from torch import Tensor, nn

from adakernels.models._layers import initialise, make_divisible
from adakernels.models.checkpoints import load_backbone
from adakernels.nn import DynamicConv3d, dynamic_conv_norm_act
from adakernels.policies import SoftModulationGate

Gates: TypeAlias = tuple[Tensor | None, Tensor | None]
# From a dynamic convolution's name, its gate module and its input to the weights of its levels.
GatesOf: TypeAlias = Callable[[str, SoftModulationGate, Tensor], Gates]

_STAGE_CHANNELS = (64, 128, 256, 512)


class DynamicNetwork(nn.Module):
    """A network for clips whose dynamic convolutions have gates.

    Args:
        frames: frames T per clip, which the gates pool to C * T numbers; None lets them pool over time too.
        temporal_levels, channel_levels: of every dynamic convolution, 1 to 3 ("search space" in the paper).
        filter_size: 1 or 3, of the kernels that make frames and channels.
        hidden: width of the gates' hidden layer.
    """

    def __init__(
        self,
        frames: int | None,
        *,
        temporal_levels: int = 2,
        channel_levels: int = 2,
        filter_size: int = 3,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        self.frames = frames
        self._levels: dict[str, Any] = {"temporal_levels": temporal_levels, "channel_levels": channel_levels}
        self._filter_size = filter_size
        self._hidden = hidden

    def dynamic(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        groups: int = 1,
    ) -> DynamicConv3d:
        """A dynamic convolution with the network's levels, padded to keep the size at stride 1."""
        return DynamicConv3d(
            in_channels,
            out_channels,
            kernel,
            stride,
            _around(kernel),
            groups=groups,
            bias=False,
            filter_size=self._filter_size,
            **self._levels,
        )

    def gate(self, channels: int, frames: int | None) -> SoftModulationGate:
        """A gate with the network's levels, for so many channels and frames."""
        return SoftModulationGate(channels, frames, hidden=self._hidden, **self._levels)

    def logits(self, input: Tensor, gates_of: GatesOf) -> Tensor:  # [B, 3, T, H, W]
        """What `forward` gives, with the weights of each dynamic convolution's levels from `gates_of`."""
        raise NotImplementedError

    @overload
    def forward(
        self,
        input: Tensor,
        gates: Mapping[str, Gates] | None = None,
        *,
        return_gates: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self, input: Tensor, gates: Mapping[str, Gates] | None = None, *, return_gates: bool
    ) -> Tensor | tuple[Tensor, dict[str, Gates]]: ...

    def forward(
        self,
        input: Tensor,  # [B, 3, T, H, W]
        gates: Mapping[str, Gates] | None = None,
        *,
        return_gates: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Gates]]:
        """Logits of each clip.

        Args:
            gates: weights of the temporal and the channel levels, [B, S_t] and [B, S_c] or None for level 0,
                by the name of the dynamic convolution (`dynamic_convs`), which is computed whole where it is
                left out. None lets the network's own gates decide.
            return_gates: return the weights, too.

        Returns:
            [B, num_classes]; with `return_gates` also a dictionary of all weights by name.

        Raises:
            ValueError: for an input of another shape, or gates for what is no dynamic convolution.
        """
        expected = f"[B, 3, {self.frames or 'T'}, H, W]"
        if input.dim() != 5 or input.shape[1] != 3 or self.frames not in (None, input.shape[2]):
            raise ValueError(
                f"{type(self).__name__}: expected input of shape {expected}, got {list(input.shape)}"
            )
        unknown = sorted(set(gates or ()) - {name for name, _ in self.dynamic_convs()})
        if unknown:
            raise ValueError(f"{type(self).__name__}: there are no dynamic convolutions {unknown}")
        taken: dict[str, Gates] = {}

        def gates_of(name: str, gate: SoftModulationGate, features: Tensor) -> Gates:
            taken[name] = gate(features) if gates is None else gates.get(name, (None, None))
            return taken[name]

        logits = self.logits(input, gates_of)
        return (logits, taken) if return_gates else logits

    def dynamic_convs(self) -> Iterator[tuple[str, DynamicConv3d]]:
        """The dynamic convolutions by name, in order."""
        for name, module in self.named_modules():
            if isinstance(module, DynamicConv3d) and (module.temporal_phi or module.channel_phi):
                yield name, module

    def load_backbone(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Loads a checkpoint of the plain network; gates and reconstruction stay as they are.

        A classifier of another width is left out.

        Returns:
            The keys of this model that `state_dict` did not provide.

        Raises:
            ValueError: if a key of the backbone is missing, or `state_dict` has one that the model lacks.
            RuntimeError: if a tensor has another shape.
        """
        return load_backbone(self, state_dict, heads=(".gate", "_phi."))


class Conv2Plus1d(nn.Sequential):
    """A dynamic 1 x k x k convolution, its normalisation, ReLU and a k x 1 x 1 convolution, with the keys of
    torchvision's."""

    def __init__(
        self,
        network: DynamicNetwork,
        in_channels: int,
        middle: int,
        out_channels: int,
        stride: int,
        frames: int | None,
    ) -> None:
        super().__init__(
            network.dynamic(in_channels, middle, (1, 3, 3), stride=(1, stride, stride)),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            _plain(middle, out_channels, (3, 1, 1), stride=(stride, 1, 1)),
        )
        self.gate = network.gate(in_channels, frames)


class R2Plus1dBlock(nn.Module):
    """torchvision's BasicBlock with Conv2Plus1D, down to the keys."""

    def __init__(
        self,
        network: DynamicNetwork,
        in_channels: int,
        channels: int,
        stride: int,
        frames: int | None,
        midplanes: str,
    ) -> None:
        super().__init__()
        middle = _middle(in_channels, channels)
        later = frames and -(-frames // stride)
        self.conv1 = nn.Sequential(
            Conv2Plus1d(network, in_channels, middle, channels, stride, frames),
            nn.BatchNorm3d(channels),
            nn.ReLU(inplace=True),
        )
        if midplanes == "formula":
            middle = _middle(channels, channels)
        self.conv2 = nn.Sequential(
            Conv2Plus1d(network, channels, middle, channels, 1, later), nn.BatchNorm3d(channels)
        )
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                _plain(in_channels, channels, 1, stride=stride), nn.BatchNorm3d(channels)
            )

    def forward(
        self,
        input: Tensor,  # [B, C_in, T, H, W]
        name: str,
        gates_of: GatesOf,
    ) -> Tensor:
        """The output of the block called `name`, [B, C_out, T', H', W']."""
        branch = input
        for part, activation in (("conv1", "relu"), ("conv2", None)):
            layers = getattr(self, part)
            pair = cast(Conv2Plus1d, layers[0])
            gates = gates_of(f"{name}.{part}.0.0", pair.gate, branch)
            branch = dynamic_conv_norm_act(_conv(pair[0]), pair[1], "relu", branch, *gates)
            branch = dynamic_conv_norm_act(_conv(pair[3]), layers[1], activation, branch)
        return branch.add_(_shortcut(self.downsample, input)).relu_()


class VARed2R2Plus1d(DynamicNetwork):
    """R(2+1)D-18 (Tran et al., CVPR 2018) with dynamic 1x3x3 convolutions in its residual blocks.

    Args:
        num_classes: width of the classifier.
        frames: as in `DynamicNetwork`; T halves from the second stage on, rounded up.
        midplanes: how many channels there are between the convolutions of a pair. "torchvision" has those
            of torchvision's checkpoints: both pairs of a block have what the first one needs to be as large
            as the 3D convolution that it stands for, and the stem has 45. "formula" gives each pair what it
            needs itself, the stem 83, which comes closest to the work that the paper reports.
        **keywords: those of `DynamicNetwork`.

    Raises:
        ValueError: for other `midplanes`.
    """

    def __init__(
        self,
        num_classes: int = 400,
        frames: int | None = 16,
        *,
        midplanes: str = "torchvision",
        **keywords: int,
    ) -> None:
        super().__init__(frames, **keywords)
        if midplanes not in ("torchvision", "formula"):
            raise ValueError(
                f"VARed2R2Plus1d: expected midplanes to be 'torchvision' or 'formula', got {midplanes!r}"
            )
        middle = 45 if midplanes == "torchvision" else _middle(3, 64, 7)
        self.stem = nn.Sequential(
            _plain(3, middle, (1, 7, 7), stride=(1, 2, 2)),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            _plain(middle, 64, (3, 1, 1)),
            nn.BatchNorm3d(64),
            nn.ReLU(inplace=True),
        )
        in_channels = 64
        for stage, channels in enumerate(_STAGE_CHANNELS, 1):
            stride = 1 if stage == 1 else 2
            blocks = [R2Plus1dBlock(self, in_channels, channels, stride, frames, midplanes)]
            frames = frames and -(-frames // stride)
            blocks.append(R2Plus1dBlock(self, channels, channels, 1, frames, midplanes))
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            in_channels = channels
        self.fc = nn.Linear(512, num_classes)
        initialise(self)

    def logits(self, input: Tensor, gates_of: GatesOf) -> Tensor:  # [B, 3, T, H, W]
        features = input
        for i in (0, 3):
            features = dynamic_conv_norm_act(_conv(self.stem[i]), self.stem[i + 1], "relu", features)
        for stage in range(1, 5):
            for i, block in getattr(self, f"layer{stage}").named_children():
                features = block(features, f"layer{stage}.{i}", gates_of)
        return self.fc(features.mean((2, 3, 4)))


class SqueezeExcitation(nn.Module):
    """Scales channels by what two layers, with swish between them, make of their means (Hu et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = make_divisible(channels / 16)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, input: Tensor) -> Tensor:  # [B, C, T, H, W]
        """The scaled features, [B, C, T, H, W]."""
        hidden = nn.functional.silu(self.fc1(input.mean((2, 3, 4))))
        return input * self.fc2(hidden).sigmoid()[..., None, None, None]


class X3dBlock(nn.Module):
    """Expansion, 3x3x3 depthwise convolution and projection, all dynamic, beside a shortcut."""

    def __init__(
        self,
        network: DynamicNetwork,
        in_channels: int,
        channels: int,
        stride: int,
        frames: int | None,
        squeeze: bool,
    ) -> None:
        super().__init__()
        inner = int(2.25 * channels)
        steps = (1, stride, stride)
        self.conv1 = network.dynamic(in_channels, inner, 1)
        self.bn1 = nn.BatchNorm3d(inner)
        self.gate1 = network.gate(in_channels, frames)
        self.conv2 = network.dynamic(inner, inner, 3, stride=steps, groups=inner)
        self.bn2 = nn.BatchNorm3d(inner)
        self.gate2 = network.gate(inner, frames)
        self.squeeze = SqueezeExcitation(inner) if squeeze else None
        self.conv3 = network.dynamic(inner, channels, 1)
        self.bn3 = nn.BatchNorm3d(channels)
        self.gate3 = network.gate(inner, frames)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                _plain(in_channels, channels, 1, stride=steps), nn.BatchNorm3d(channels)
            )

    def forward(
        self,
        input: Tensor,  # [B, C_in, T, H, W]
        name: str,
        gates_of: GatesOf,
    ) -> Tensor:
        """The output of the block called `name`, [B, C_out, T, H', W']."""
        gates = gates_of(f"{name}.conv1", self.gate1, input)
        branch = dynamic_conv_norm_act(self.conv1, self.bn1, "relu", input, *gates)
        gates = gates_of(f"{name}.conv2", self.gate2, branch)
        branch = dynamic_conv_norm_act(self.conv2, self.bn2, None, branch, *gates)
        if self.squeeze is not None:
            branch = self.squeeze(branch)
        gates = gates_of(f"{name}.conv3", self.gate3, branch)
        branch = dynamic_conv_norm_act(self.conv3, self.bn3, None, branch, *gates)
        return branch.add_(_shortcut(self.downsample, input)).relu_()


class VARed2X3d(DynamicNetwork):
    """X3D-M (Feichtenhofer, CVPR 2020) with dynamic pointwise and depthwise convolutions in its blocks.

    As in the VA-RED² paper there is no swish but in the squeeze-and-excitation layers, between their two
    fully connected ones; every other block, from the first on, has such a layer.

    Args:
        num_classes: width of the classifier.
        frames: as in `DynamicNetwork`.
        **keywords: those of `DynamicNetwork`.
    """

    def __init__(self, num_classes: int = 400, frames: int | None = 16, **keywords: int) -> None:
        super().__init__(frames, **keywords)
        self.stem = nn.Sequential(
            _plain(3, 24, (1, 3, 3), stride=(1, 2, 2)),
            _plain(24, 24, (5, 1, 1), groups=24),
            nn.BatchNorm3d(24),
        )
        in_channels = 24
        for stage, (channels, count) in enumerate(((24, 3), (48, 5), (96, 11), (192, 7)), 1):
            blocks = []
            for i in range(count):
                stride = 2 if i == 0 else 1
                blocks.append(X3dBlock(self, in_channels, channels, stride, frames, squeeze=i % 2 == 0))
                in_channels = channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.conv5 = _plain(192, 432, 1)
        self.bn5 = nn.BatchNorm3d(432)
        self.fc1 = nn.Linear(432, 2048, bias=False)
        self.fc = nn.Linear(2048, num_classes)
        initialise(self)

    def logits(self, input: Tensor, gates_of: GatesOf) -> Tensor:  # [B, 3, T, H, W]
        features = dynamic_conv_norm_act(_conv(self.stem[0]), None, None, input)
        features = dynamic_conv_norm_act(_conv(self.stem[1]), self.stem[2], "relu", features)
        for stage in range(1, 5):
            for i, block in getattr(self, f"layer{stage}").named_children():
                features = block(features, f"layer{stage}.{i}", gates_of)
        features = dynamic_conv_norm_act(self.conv5, self.bn5, "relu", features)
        return self.fc(self.fc1(features.mean((2, 3, 4))).relu())


def _plain(
    in_channels: int,
    out_channels: int,
    kernel: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] = 1,
    groups: int = 1,
) -> DynamicConv3d:
    """A convolution with one level, hence without reconstruction, padded to keep the size at stride 1."""
    return DynamicConv3d(
        in_channels,
        out_channels,
        kernel,
        stride,
        _around(kernel),
        groups=groups,
        bias=False,
        temporal_levels=1,
        channel_levels=1,
    )


def _around(kernel: int | tuple[int, int, int]) -> int | tuple[int, int, int]:
    """The padding that keeps the size at stride 1."""
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)


def _conv(module: nn.Module) -> DynamicConv3d:
    return cast(DynamicConv3d, module)


def _shortcut(
    downsample: nn.Sequential | None,
    input: Tensor,  # [B, C_in, T, H, W]
) -> Tensor:  # [B, C_out, T', H', W']
    if downsample is None:
        return input
    return dynamic_conv_norm_act(_conv(downsample[0]), downsample[1], None, input)


def _middle(in_channels: int, channels: int, size: int = 3) -> int:
    """Channels between convolutions 1 x k x k and 3 x 1 x 1 that make both as large as one of 3 x k x k."""
    return 3 * size**2 * in_channels * channels // (size**2 * in_channels + 3 * channels)


def vared2_r2plus1d_18(
    num_classes: int = 400, frames: int | None = 16, *, midplanes: str = "torchvision", **keywords: int
) -> VARed2R2Plus1d:
    """VA-RED² on R(2+1)D-18; see `VARed2R2Plus1d` for the arguments."""
    return VARed2R2Plus1d(num_classes, frames, midplanes=midplanes, **keywords)


def vared2_x3d_m(num_classes: int = 400, frames: int | None = 16, **keywords: int) -> VARed2X3d:
    """VA-RED² on X3D-M; see `VARed2X3d` for the arguments."""
    return VARed2X3d(num_classes, frames, **keywords)
