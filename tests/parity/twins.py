"""One layer twice, in PyTorch and in JAX, with the same weights: the parity suite's table."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from transformers.pytorch_utils import Conv1D

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Twin:
    """One model twice: `make()` in PyTorch, `fn(params(module), x)` in JAX.

    `moves` says for each leaf which PyTorch parameter it is and how that is turned around.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    fn: Callable[[Params, Any], Any]
    x: Callable[[np.random.Generator], np.ndarray]
    moves: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]
    targets: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    # A fault of PEFT's, repeated: in the forward pass, and in the gradients of some keys.
    as_peft: Callable[[Params], Params] = lambda params: params
    slopes: dict[str, float] = dataclasses.field(default_factory=dict)
    merges: bool = True  # whether PEFT can

    def __repr__(self) -> str:
        return self.name

    @property
    def names(self) -> dict[str, str]:
        return {path: name for path, (name, _) in self.moves.items()}

    def params(self, module: torch.nn.Module) -> Params:
        """The module's weights as a tree."""
        tensors, tree = dict(module.named_parameters()), Params()
        for path, (name, move) in self.moves.items():
            *parents, leaf = path.split("/")
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            value = tensors[name].detach()
            dtype = str(value.dtype).removeprefix("torch.")
            wide = value.float() if value.dtype == torch.bfloat16 else value
            node[leaf] = jnp.asarray(move(wide.numpy().copy()), dtype)
        return tree


def same(w: np.ndarray) -> np.ndarray:
    return w


def flip(w: np.ndarray) -> np.ndarray:
    return np.swapaxes(w, -1, -2)


def hwio(w: np.ndarray) -> np.ndarray:
    return np.moveaxis(w, (0, 1), (-1, -2))


def normal(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.normal(size=shape).astype(np.float32)


def integers(high: int, *shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.integers(0, high, shape).astype(np.int32)


class Holder(torch.nn.Module):
    """One layer in a module, because PEFT adapts what is inside one."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def dense(p: Params, x: Any) -> Any:
    return x @ p["kernel"] + p["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


DENSE = {"layer/kernel": ("layer.weight", flip), "layer/bias": ("layer.bias", same)}

linear = Twin(
    "linear",
    lambda: Holder(torch.nn.Linear(13, 7)),
    lambda p, x: dense(p["layer"], x),
    normal(2, 5, 13),
    DENSE,
    ("layer",),
)

conv1d_hf = Twin(
    "Conv1D",
    lambda: Holder(Conv1D(7, 13)),
    lambda p, x: dense(p["layer"], x),
    normal(2, 5, 13),
    {"layer/kernel": ("layer.weight", same), "layer/bias": ("layer.bias", same)},
    ("layer",),
    kinds={"layer/kernel": "Conv1D"},
    config={"fan_in_fan_out": True},
)

embedding = Twin(
    "embedding",
    lambda: Holder(torch.nn.Embedding(17, 6)),
    lambda p, x: jnp.take(p["layer"]["embedding"], x, axis=0),
    integers(17, 3, 5),
    {"layer/embedding": ("layer.weight", same)},
    ("layer",),
)


def conv(dims: int, stride: int, padding: int) -> Twin:
    """A convolution of `dims` spatial dimensions; channels last in JAX, first in PyTorch."""
    letters = "DHW"[3 - dims :]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def fn(p: Params, x: Any) -> Any:
        p, x = p["layer"], jnp.moveaxis(x, 1, -1)
        y = lax.conv_general_dilated(
            x, p["kernel"], (stride,) * dims, [(padding, padding)] * dims, dimension_numbers=numbers
        )
        return jnp.moveaxis(y + p["bias"].reshape((1,) * (dims + 1) + (-1,)), -1, 1)

    layer = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
    return Twin(
        f"Conv{dims}d",
        lambda: Holder(layer(5, 7, 3, stride=stride, padding=padding)),
        fn,
        normal(2, 5, *(9, 8, 7)[:dims]),
        {"layer/kernel": ("layer.weight", hwio), "layer/bias": ("layer.bias", same)},
        ("layer",),
        layouts={"layer/kernel": "i" * (dims + 1) + "o"},
        kinds={"layer/kernel": "conv"},
    )


class SelfAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = torch.nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


def attend(p: Params, x: Any) -> Any:
    batch, time, width = x.shape
    qkv = dense(p["in_proj"], x).reshape(batch, time, 3, 2, width // 2)
    q, k, v = (qkv[:, :, n] for n in range(3))
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / (width // 2) ** 0.5)
    y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, time, width)
    return dense(p["out_proj"], y)


def twice_out(params: Params) -> Params:
    """PEFT adds the update of MultiheadAttention's output projection twice, once without gradient.

    So its forward pass has 2·s where its gradients of A and B have s.
    """
    node = params["mha"]["out_proj"]["kernel"]
    node = dataclasses.replace(node, scaling=2 * node.scaling)
    return {"mha": {**params["mha"], "out_proj": {**params["mha"]["out_proj"], "kernel": node}}}


attention = Twin(
    "MultiheadAttention",
    SelfAttention,
    lambda p, x: attend(p["mha"], x),
    normal(2, 4, 6),
    {
        "mha/in_proj/kernel": ("mha.in_proj_weight", flip),
        "mha/in_proj/bias": ("mha.in_proj_bias", same),
        "mha/out_proj/kernel": ("mha.out_proj.weight", flip),
        "mha/out_proj/bias": ("mha.out_proj.bias", same),
    },
    ("mha",),
    as_peft=twice_out,
    slopes={"out_proj.lora": 0.5},
)


class Experts(torch.nn.Module):
    """Every token through every expert; `is_transposed` is how PEFT learns that W is (in, out)."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (4, 6, 10), (4, 10, 6)  # (experts, in, out)
        turn = (lambda s: s) if is_transposed else (lambda s: (s[0], s[2], s[1]))
        self.up = torch.nn.Parameter(torch.randn(turn(up)) / 3)
        self.down = torch.nn.Parameter(torch.randn(turn(down)) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = (lambda w: w) if self.is_transposed else (lambda w: w.transpose(1, 2))
        return torch.relu(x[None] @ turn(self.up)) @ turn(self.down)


def experts(is_transposed: bool) -> Twin:
    turn = same if is_transposed else flip

    def fn(p: Params, x: Any) -> Any:
        p = p["layer"]
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["up"]))
        return jnp.einsum("etf,efd->etd", h, p["down"])

    return Twin(
        "experts_in_out" if is_transposed else "experts_out_in",
        lambda: Holder(Experts(is_transposed)),
        fn,
        normal(5, 6),
        {"layer/down": ("layer.down", turn), "layer/up": ("layer.up", turn)},
        parameters=("layer.up", "layer.down"),
    )


class MLP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = torch.nn.Linear(6, 11), torch.nn.LayerNorm(11)
        self.down, self.head = torch.nn.Linear(11, 5), torch.nn.Linear(5, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.norm(torch.tanh(self.up(x)))))


def mlp_fn(p: Params, x: Any) -> Any:
    x = jnp.tanh(dense(p["up"], x))
    x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * p["norm"]["scale"][None] + p["norm"]["bias"][None]
    return dense(p["head"], dense(p["down"], x))


mlp = Twin(
    "mlp",
    MLP,
    mlp_fn,
    normal(4, 6),
    {
        f"{layer}/{leaf}": (f"{layer}.{name}", move)
        for layer in ("up", "down", "head")
        for leaf, name, move in (("kernel", "weight", flip), ("bias", "bias", same))
    }
    | {"norm/scale": ("norm.weight", same), "norm/bias": ("norm.bias", same)},
    ("up", "down"),
)


class Heads(torch.nn.Module):
    """Query, key and output projections as transformers have them, without the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (torch.nn.Linear(6, 8, bias=False) for _ in range(2))
        self.o = torch.nn.Linear(8, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.q(x)) * self.k(x))


def heads_fn(p: Params, x: Any) -> Any:
    q = jnp.tanh(jnp.einsum("btd,dnh->btnh", x, p["q"]))
    k = jnp.einsum("btd,ndh->btnh", x, p["k"])
    return jnp.einsum("btnh,nhd->btd", q * k, p["o"])


heads = Twin(
    "heads",
    Heads,
    heads_fn,
    normal(2, 5, 6),
    {
        "q": ("q.weight", lambda w: w.T.reshape(6, 2, 4)),
        "k": ("k.weight", lambda w: w.T.reshape(6, 2, 4).swapaxes(0, 1)),
        "o": ("o.weight", lambda w: w.T.reshape(2, 4, 6)),
    },
    ("q", "k", "o"),
    layouts={"q": "ioo", "k": "oio", "o": "iio"},
)

TWINS = [
    linear,
    conv1d_hf,
    embedding,
    conv(1, 2, 1),
    conv(2, 2, 1),
    conv(3, 1, 0),
    attention,
    heads,
    experts(False),
    experts(True),
    mlp,
]


D_IN, D_OUT = 8, 12


def dense_of_groups(w: np.ndarray, groups: int) -> np.ndarray:
    """A kernel (out, in/g, k...) with zeros between one group's inputs and another's outputs."""
    out, channels = w.shape[:2]
    whole = np.zeros((out, groups * channels, *w.shape[2:]), w.dtype)
    for g in range(groups):
        rows = slice(g * out // groups, (g + 1) * out // groups)
        whole[rows, g * channels : (g + 1) * channels] = w[rows]
    return hwio(whole)


def grouped(dims: int, groups: int, stride: int = 1, padding: int = 0) -> Twin:
    layer = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
    twin, options = conv(dims, stride, padding), dict(stride=stride, padding=padding)
    return dataclasses.replace(
        twin,
        name=f"Conv{dims}d_{groups}_groups",
        make=lambda: Holder(layer(D_IN, D_OUT, 3, groups=groups, **options)),
        x=lambda rng: rng.normal(size=(2, D_IN, *(9, 8, 7)[:dims])).astype(np.float32),
        moves=twin.moves | {"layer/kernel": ("layer.weight", lambda w: dense_of_groups(w, groups))},
        kinds={"layer/kernel": "grouped"},
        merges=False,
    )


GROUPED = [grouped(1, 2, 2, 1), grouped(1, 4), grouped(2, 2), grouped(2, 4, 2, 1), grouped(3, 2)]
