"""Foreign models, one row each: those with a program (and which operations it has) and those refused (and how)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

Forward = Callable[..., Any]


class Written(nn.Module):
    """A forward given as a function of the input and of stored parameters."""

    def __init__(self, forward: Forward, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = forward
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(shape)) for shape in shapes])

    def forward(self, x: torch.Tensor) -> Any:
        """(B, ...) -> whatever the function gives."""
        return self.function(x, *self.parts)


class Mixer(nn.Module):
    """One block of an MLP-Mixer without LayerNorms, with a class for each of three answers."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.patches, self.act = nn.Conv2d(3, 6, 4, 4), activation
        self.token_in, self.token_out = nn.Linear(4, 5), nn.Linear(5, 4)
        self.channel_in, self.channel_out, self.head = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, 8, 8) -> (B, 3)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.token_out(self.act(self.token_in(x.transpose(1, 2)))).transpose(1, 2)
        return self.head((x + self.channel_out(self.act(self.channel_in(x)))).mean(1))


class Residual(nn.Module):
    """A basic block of a ResNet, with operations in place."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1, self.act = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.act(y)


class Answer:
    """An object with logits, as transformers gives."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def tiny_resnet() -> nn.Module:
    """Stem, two blocks, mean, linear head."""
    stem = (nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, Residual(4), Residual(4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@dataclass(frozen=True)
class Lowered:
    """A model that has a program: the input's sample shape, and how many nodes of some operations there are."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    counts: dict[str, int]


def _written(name: str, forward: Forward, shape: tuple[int, ...], *stored: tuple[int, ...], **counts: int) -> Lowered:
    return Lowered(name, lambda: Written(forward, *stored), shape, counts)


def _layers(name: str, *modules: nn.Module, shape: tuple[int, ...], **counts: int) -> Lowered:
    return Lowered(name, lambda: nn.Sequential(*modules), shape, counts)


_ACTIVATIONS = (
    (nn.ReLU, "relu"),
    (nn.LeakyReLU, "leaky_relu"),
    (nn.ELU, "elu"),
    (nn.CELU, "celu"),
    (nn.SELU, "selu"),
    (nn.Hardtanh, "hardtanh"),
    (nn.ReLU6, "hardtanh"),
    (nn.GELU, "gelu"),
    (lambda: nn.GELU("tanh"), "gelu"),
    (nn.SiLU, "silu"),
    (nn.Mish, "mish"),
    (nn.Tanh, "tanh"),
    (nn.Sigmoid, "sigmoid"),
    (nn.Hardsigmoid, "hardsigmoid"),
    (nn.Hardswish, "hardswish"),
    (nn.Softplus, "softplus"),
    (nn.LogSigmoid, "logsigmoid"),
    (nn.Softshrink, "softshrink"),
    (nn.PReLU, "prelu"),
    (lambda: nn.PReLU(4), "prelu"),
)

LOWERED: tuple[Lowered, ...] = (
    *(
        _layers(f"{op} {index}", nn.Linear(4, 4), make(), shape=(4,), input=1, linear=1, **{op: 1})
        for index, (make, op) in enumerate(_ACTIVATIONS)
    ),
    _layers("identity", nn.Identity(), shape=(4,), input=1),
    _layers("activation in place", nn.ReLU(inplace=True), shape=(4,), input=1, relu=1),
    _layers("mlp", nn.Linear(4, 5), nn.Dropout(), nn.BatchNorm1d(5), nn.Linear(5, 2), shape=(4,), linear=2, dropout=0),
    Lowered("mixer", lambda: Mixer(nn.GELU()), (3, 8, 8), {"patchify": 1, "linear": 5, "gelu": 2, "add": 2}),
    Lowered("mixer, tanh", lambda: Mixer(nn.GELU("tanh")), (3, 8, 8), {"gelu": 2, "mean_pool": 1}),
    Lowered("resnet", tiny_resnet, (3, 16, 16), {"convolution_batch_norm": 7, "add": 2, "batch_norm": 0, "linear": 1}),
    _layers(
        "cnn",
        *(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU(), nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(4, 4, 1, 2)),
        *(nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3, 1, 2, 2, 2), nn.Dropout2d(), nn.Flatten()),
        nn.Linear(100, 2),
        shape=(3, 16, 16),
        convolution=2,
        convolution_batch_norm=1,
        average_pool=1,
        flatten=1,
    ),
    _layers(
        "signals",
        *(nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Conv1d(4, 4, 3, dilation=2)),
        *(nn.PReLU(4), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)),
        shape=(3, 20),
        reshape=1,
        convolution_batch_norm=1,
        mean_pool=1,
    ),
    _layers("signals stay", nn.Conv1d(3, 4, 3), nn.Conv1d(4, 2, 3), shape=(3, 9), convolution=2, reshape=2),
    _layers("same, even", nn.Conv2d(3, 4, 4, padding="same"), shape=(3, 6, 6), pad=1, convolution=1),
    _layers(
        "circular folds",
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(4),
        shape=(3, 6, 6),
        pad=0,
        convolution_batch_norm=1,
    ),
    _layers("circular signal", nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), shape=(3, 6), pad=0),
    _layers("circular, wide", nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), shape=(3, 6, 6), pad=1),
    _layers("reflect", nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), shape=(3, 6, 6), pad=1, convolution=1),
    _layers("replicate", nn.ReplicationPad1d(2), shape=(3, 6), pad=1),
    _layers("zeros", nn.ZeroPad2d((1, 2, 3, 4)), shape=(3, 6, 6), pad=1),
    _layers("transposed", nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), shape=(3, 5, 5), transposed_convolution=1),
    _layers("shuffles", nn.PixelShuffle(2), nn.PixelUnshuffle(2), shape=(4, 4, 4), pixel_shuffle=1, pixel_unshuffle=1),
    _layers("windows", nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(1), shape=(3, 4, 4), average_pool=1, max_pool=1),
    _layers("channels", nn.Conv2d(3, 4, 3), nn.PReLU(4), shape=(3, 5, 5), prelu=1, reshape=0),
    _layers("tokens", nn.Linear(3, 4), nn.PReLU(5), shape=(5, 3), prelu=1, reshape=0),
    _layers("unflattened", nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.Flatten(), shape=(6,), linear=1),
    _written("residual", lambda x: F.relu(x) + x, (3, 4), relu=1, add=1),
    _written("scalars", lambda x, a, b: (a * x - 0.5 * x) / 2 - x / b.exp() + (1 - a.sigmoid()) * -x, (4, 5), (1,), ()),
    _written("offset of channels", lambda x, a: x - a, (4, 5), (5,), offset=1),
    _written("offset of tokens", lambda x, a: a.unsqueeze(-1) + x, (4, 5), (4,), offset=1),
    _written("offset of an image", lambda x, a: x + a.view(1, -1, 1, 1), (3, 4, 5), (3,), offset=1),
    _written("offset of entries", lambda x, a: x + a, (4, 5), (4, 5), offset=1),
    _written("offset minus x", lambda x, a: a - x, (4, 5), (5,), offset=1, scale=1),
    _written("products", lambda x, a, b, c: a @ x @ b @ c.t(), (4, 5), (3, 4), (5, 6), (2, 6), linear=3, permute=2),
    _written("mixing", lambda x, a: a @ x, (4, 5), (4, 4), token_mixing=1),
    _written("affine", lambda x, a, b: torch.addmm(b, x, a), (4,), (4, 3), (3,), linear=1),
    _written("batch merged", lambda x, a: F.linear(x.reshape(-1, 4), a).view(-1, 6, 4), (6, 4), (4, 4), reshape=0),
    _written("merged, no use", lambda x: 2 * x.reshape(1, -1).reshape(x.shape), (6,), scale=1, reshape=0),
    _written("there and back", lambda x: torch.relu(x.transpose(1, 2)).transpose(1, 2), (3, 5), relu=1, permute=0),
    _written("shuffled", lambda x: x.view(-1, 2, 3, 4, 4).transpose(1, 2).reshape(-1, 6, 4, 4), (6, 4, 4), permute=1),
    _written("channels last", lambda x, a: F.linear(x.permute(0, 2, 3, 1), a), (3, 4, 4), (2, 3), patchify=1),
    _written("parts", lambda x: torch.cat(x.chunk(3, 1)[::-1], 1), (6, 4), slice=3, concatenate=2),
    _written("indices", lambda x: x[:, 1:3, 0] - x[..., -1][:, :2], (5, 4), add=1),
    _written("stacked", lambda x: torch.stack(x.unbind(1)[:2], 2), (3, 4), concatenate=1),
    _written("sums", lambda x: x.sum((2, 3)) + x.mean((2, 3)), (3, 4, 4), mean_pool=2),
    _written("mean of channels", lambda x: x.mean(1, keepdim=True), (3, 4, 4), mean_pool=1),
    _written("mean of rows", lambda x: x.mean(2), (3, 4, 5), mean_pool=1),
    _written("mean of all", lambda x: x.mean((1, 2)), (3, 4), mean_pool=1),
    _written("one number", lambda x, a: F.linear(x, a).squeeze(-1), (6,), (1, 6), linear=1),
    _written("clamped", lambda x: x.clamp(-1, 2) + x.clamp(min=0) + x.abs(), (6,), hardtanh=1, relu=1, leaky_relu=1),
    _written("logits of an object", lambda x, a: Answer(F.linear(x, a)), (6,), (2, 6), linear=1),
    _written("a cast that casts nothing", lambda x, a: x.to(a.dtype) * a, (6,), (1,), scale=1),
    _written("layer norm", lambda x, a, b: F.layer_norm(x, (4,), a, b), (3, 4), (4,), (4,), layer_norm=1),
    _written("rms norm", lambda x, a: F.rms_norm(x, (4,), a, 1e-6), (3, 4), (4,), rms_norm=1),
)


@dataclass(frozen=True)
class Refused:
    """A model without program: what the sentence says, module and operation included."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    says: str


def _says(name: str, forward: Forward, shape: tuple[int, ...], *stored: tuple[int, ...], says: str) -> Refused:
    return Refused(name, lambda: nn.Sequential(nn.Identity(), Written(forward, *stored)), shape, says)


class Constant(nn.Module):
    """Adds a tensor that is no parameter, or a buffer that is not saved."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("shift", torch.ones(4), persistent=False)
        else:
            self.shift = torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 4) -> (B, 4)."""
        return x + self.shift


class Counting(nn.Module):
    """Changes a buffer each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 4) -> (B, 4)."""
        self.calls.add_(1)
        return x * self.calls


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def _seen(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x


REFUSED: tuple[Refused, ...] = (
    Refused(
        "attention",
        lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True),
        (4, 8),
        r"^self_attn \(MultiheadAttention\): scaled_dot_product_attention cannot be certified: softmax attention has "
        r"no Lipschitz bound unless .* grow with the square of the input; project each head's queries, keys and values "
        r"on balls as hf_lipschitz.nn.attention.BoundedAttention does, or mix tokens with a stored matrix$",
    ),
    _says("softmax", lambda x: x.softmax(-1) @ x, (4, 4), says=r"1 \(Written\): softmax .* on balls"),
    _says("gate", lambda x: x * x.sigmoid(), (4,), says=r"1 \(Written\): mul .* a product of two activations is not L"),
    _says("product", lambda x: x @ x, (4, 4), says=r"1 \(Written\): matmul .* a product of two activations"),
    _says("quotient", lambda x: x / (x * 2), (4,), says="the quotient by an activation is not Lipschitz near zero"),
    _says("square", lambda x: x**2, (4,), says=r"1 \(Written\): pow .* its slope is unbounded"),
    _says("layer scale", lambda x, a: x * a, (3, 4), (4,), says="mul .* a stored tensor of more than one number"),
    _says("a number", lambda x: x + 1.0, (4,), says="add .* adds a number that no file would hold; store it as"),
    _says(
        "a new tensor", lambda x: x + torch.ones(4), (4,), says=r"1 \(Written\): ones cannot be certified: it has no"
    ),
    _says("unknown", lambda x: x.sin(), (4,), says=r"^1 \(Written\): sin cannot be certified: it has no rule; replace"),
    _says("several", lambda x: x.sin().cos(), (4,), says=r"sin cannot .* \(without a rule are also: cos\)$"),
    _says("second result", lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (3, 4, 4), says="max_pool2d_with_ind"),
    _says("index of a maximum", lambda x: x.max(1)[0], (3, 4), says=r"1 \(Written\): max cannot be certified"),
    _says("dropout", lambda x: F.dropout(x), (4,), says="dropout .* random in evaluation mode too; pass training=self"),
    _says("noise", lambda x: x + torch.randn_like(x), (4,), says=r"1 \(Written\): randn_like cannot be certified"),
    _says("batch reversed", lambda x: x.flip(0), (4,), says="flip cannot be certified"),
    _says("batch centred", lambda x: x - x.mean(0), (4,), says="mean .* it combines the samples of a batch"),
    _says("batch joined", lambda x: torch.cat([x, x], 0), (4,), says="cat .* it makes the batch larger"),
    _says("batch cut", lambda x: x[:1] * 2, (4,), says="it takes some samples of the batch"),
    _says("batch moved", lambda x, a: F.linear(x.t(), a).t(), (4,), (2, 2), says="does not keep the batch as its lead"),
    _says("broadcast", lambda x: x + x.mean(1, keepdim=True), (3, 4), says="branches of shapes .* would be broadcast"),
    _says("every other", lambda x: x[:, ::2], (4,), says="takes every other entry; use a pool with kernel 1"),
    _says("class token", lambda x, a: torch.cat([a.expand(2, -1, -1), x], 1), (3, 4), (1, 1, 4), says="joins an activ"),
    _says("channels padded", lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), (3, 4, 4), says="pads channels, or crops"),
    _says("padded by one", lambda x: F.pad(x, (1, 1), value=1.0), (3, 4), says="pads with another number than zero"),
    _says("norm of images", lambda x: F.layer_norm(x, (3, 4)), (3, 4), says="normalises over 2 axes together"),
    _says("cast", lambda x: x.float() * 2, (4,), says="casts to float32 on the way"),
    _says("einsum", lambda x, a: torch.einsum("bi,ij->bj", x, a), (4,), (4, 4), says="einsum .* write it as a linear"),
    _says(
        "a pair", lambda x: (x, x), (4,), says="the model returns a tuple, neither a tensor nor an object with logits"
    ),
    _says(
        "data", _seen, (4,), says=r"^1 \(Written\), line \d+ of cases.py: the forward decides by values of its input"
    ),
    _says("failing", lambda x: x.view(3, 5), (4,), says=r"1 \(Written\), line \d+ .* cannot be traced .*RuntimeError"),
    _says(
        "computed weight", lambda x, a: F.linear(x, a * a), (4,), (4, 4), says="computes a weight from stored tensors"
    ),
    Refused(
        "group norm", lambda: nn.GroupNorm(2, 4), (4, 4, 4), r"^the model \(GroupNorm\): group_norm .* use a batch"
    ),
    Refused(
        "instance norm", lambda: nn.InstanceNorm2d(4), (4, 4, 4), "instance_norm .* a standard deviation of the inp"
    ),
    Refused("statistics", lambda: nn.BatchNorm2d(4, track_running_stats=False), (4, 4, 4), "statistics of the batch"),
    Refused("resizing", lambda: nn.Upsample(scale_factor=2), (3, 4, 4), "upsample_nearest2d .* resizing has no rule"),
    Refused(
        "overlap", lambda: nn.AdaptiveAvgPool2d(3), (3, 4, 4), r"windows overlap: \(3, 3\) does not divide \(4, 4\)"
    ),
    Refused("no batch", lambda: nn.Conv2d(2, 4, 3), (5, 5), "its input of shape .* has no batch axis"),
    Refused(
        "constant", lambda: nn.Sequential(Constant(False)), (4,), r"^0 \(Constant\): constant '0.shift' is no param"
    ),
    Refused("unsaved", lambda: nn.Sequential(Constant(True)), (4,), r"buffer '0.shift' is not saved with the weights"),
    Refused("counter", Counting, (4,), "buffer 'calls' changes in evaluation mode"),
    Refused("hook", _hooked, (4,), r"^1 \(ReLU\) has a forward hook, which no file would hold: remove it"),
    Refused("parametrized", lambda: parametrizations.orthogonal(nn.Linear(4, 4)), (4,), "remove_parametrizations"),
    Refused("unused", lambda: Written(lambda x, a: 2 * x, (3,)), (4,), "tensor 'parts.0' is stored but not covered"),
    Refused(
        "ids", lambda: nn.Embedding(4, 4), (4,), r"^the model \(Embedding\), line \d+ of sparse.py: the forward can"
    ),
)
