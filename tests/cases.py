"""The table of programs that the laws run over: each a model of its own kind, small and odd-shaped.

Sizes are primes or otherwise unlike one another, so that no activation has a weight's shape.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jlora


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    name: str
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    rules: str = r".*(w|kernel|embedding)"
    materialized: int = 0
    dora: bool = False
    form: Any = "lora"
    stored: bool | str = False  # over int8 rows, or a format of `jlora.quant`: see stored.py

    def __repr__(self) -> str:
        how = "stored" if self.stored is True else self.stored
        return f"{how}_{self.name}" if how else self.name

    def layouts(self, params: Any) -> dict[str, str]:
        """Infer the layouts. The weights are called "w", which does not tell heads from experts."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`jlora.layouts`: the first axis of")
            return jlora.layouts(self.fn, params, *self.args)


# Each file of cases has its own list, which begins with that of the file before it, so what a test
# runs over does not depend on which files were imported.
CASES: list[Case] = []


def w(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    # NumPy's numbers: `jax.random` would compile a program for each shape.
    rng = np.random.default_rng(seed + sum(n * 31**k for k, n in enumerate(shape)))
    return jnp.asarray((rng.normal(size=shape) / max(shape) ** 0.5).astype(dtype))


def numbers(shapes: Any) -> Any:
    """Draw what a module would initialize, which would compile a program for each operation."""
    rng = np.random.default_rng(1)
    draw = lambda x: (rng.normal(size=x.shape) / max(x.shape, default=1) ** 0.5).astype(x.dtype)
    return jax.tree.map(lambda x: jnp.asarray(draw(x)), shapes)


def plain(
    name: str,
    params: Any,
    *args: Any,
    rules: str = Case.rules,
    materialized: int = 0,
    into: list[Case] = CASES,
) -> Callable[[Any], Any]:
    """Make a case of the decorated function."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        into.append(Case(name, fn, params, args, rules, materialized))
        return fn

    return register


def linen(name: str, module: nn.Module, *args: Any, **kw: Any) -> None:
    """Make a case of a Linen module."""
    variables = numbers(jax.eval_shape(module.init, jax.random.key(1), *args))
    CASES.append(Case(name, module.apply, variables, args, **kw))


def nnx_model(name: str, model: Any, *args: Any) -> None:
    """Make a case of an NNX module through split and merge."""
    graph, state = nnx.split(model)

    def run(state: Any, *args: Any) -> Any:
        return nnx.merge(graph, state)(*args)

    CASES.append(Case(name, run, state, args))


# Plain functions: dot_general in every arrangement.
@plain("matmul", {"w": w(11, 7)}, w(5, 3, 11))
def _matmul(p, x):
    return x @ p["w"]


@plain("weight_on_the_left", {"w": w(11, 7)}, w(11, 5))
def _left(p, x):
    return p["w"].T @ x


@plain("torch_layout", {"w": w(7, 11)}, w(5, 11))
def _torch(p, x):
    return x @ p["w"].T


@plain("tied", {"embedding": w(23, 11)}, jnp.array([[1, 5, 22], [0, 3, 3]]))
def _tied(p, tokens):
    return jnp.tanh(p["embedding"][tokens]) @ p["embedding"].T


@plain("attention_kernels", {"q": {"w": w(11, 3, 5)}, "o": {"w": w(3, 5, 11)}}, w(2, 4, 11))
def _heads(p, x):
    q = jnp.einsum("bti,ihd->bhtd", x, p["q"]["w"])
    return jnp.einsum("bhtd,hdo->bto", jnp.tanh(q), p["o"]["w"])


@plain("gemma_ndh", {"q": {"w": w(3, 11, 5)}}, w(2, 4, 11))
def _ndh(p, x):
    return jnp.einsum("BTD,NDH->BTNH", x, p["q"]["w"])


@plain("experts", {"w": w(4, 11, 7), "v": {"w": w(4, 7, 11)}}, w(4, 6, 11))
def _experts(p, x):
    return jnp.einsum("ecf,efd->ecd", jnp.tanh(jnp.einsum("ecd,edf->ecf", x, p["w"])), p["v"]["w"])


@plain("per_head_input", {"w": w(3, 11, 5)}, w(2, 3, 11))
def _per_head(p, x):
    return jnp.einsum("bhi,hid->bhd", x, p["w"])


@plain("odd_einsum", {"w": w(3, 2, 13, 5, 1)}, w(2, 3, 4, 5))
def _odd(p, x):
    return jnp.einsum("bjir,jbmrk->bimk", x, p["w"])


@plain("several_contracted", {"w": w(3, 5, 2, 7)}, w(4, 3, 5, 2), rules="w")
def _several(p, x):
    return lax.dot_general(x, p["w"], (((1, 2, 3), (0, 1, 2)), ((), ())))


@plain("two_of_one_shape", {"w": w(11, 11), "v": {"w": w(11, 11, seed=1)}}, w(11, 11, seed=2))
def _same_shape(p, x):
    return x @ x @ p["w"] @ p["v"]["w"]


@plain("vector_input", {"w": w(11, 7)}, w(11))
def _vector(p, x):
    return x @ p["w"]


# Weights that are rearranged first.
@plain("reshaped", {"w": w(11, 15)}, w(4, 11))
def _reshaped(p, x):
    return jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(11, 3, 5))


@plain("cast", {"w": w(11, 7)}, w(4, 11, dtype=jnp.bfloat16))
def _cast(p, x):
    return x @ p["w"].astype(jnp.bfloat16)


@plain("squeezed", {"w": w(1, 11, 7)}, w(4, 11), rules="w")
def _squeezed(p, x):
    return x @ p["w"][0] + x @ jnp.squeeze(p["w"], 0)


@plain("fused_qkv", {"w": w(11, 21)}, w(4, 11))
def _fused(p, x):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return (x @ q) * (x @ k) + x @ v


@plain("rows", {"w": w(13, 7)}, w(4, 5))
def _rows(p, x):
    return x @ p["w"][2:12:2] + x @ jnp.flip(p["w"], 0)[1:6]


@plain("scaled", {"w": w(11, 7)}, w(4, 11))
def _scaled(p, x):
    return x @ (p["w"] * 0.5) + x @ -(p["w"] / 3.0)


@plain("unrolled_stack", {"w": w(3, 11, 11)}, w(4, 11))
def _stack(p, x):
    for n in range(3):
        x = jnp.tanh(x @ p["w"][n])
    return x


@plain("traced_index", {"w": w(3, 11, 7)}, w(4, 11), jnp.array(1))
def _index(p, x, n):
    return x @ p["w"][n] + x @ lax.dynamic_index_in_dim(p["w"], n, keepdims=False)


@plain("expert_per_token", {"w": w(3, 11, 7)}, w(5, 11), jnp.array([0, 2, 2, 1, 0]))
def _routed(p, x, e):
    return jnp.einsum("ti,tio->to", x, p["w"][e])


@plain("one_row", {"w": w(13, 7)}, jnp.array(4))
def _one_row(p, n):
    return jnp.tanh(p["w"][n])


@plain("broadcast", {"w": w(11, 7)}, w(5, 4, 11))
def _broadcast(p, x):
    return jnp.einsum("bti,bio->bto", x, jnp.broadcast_to(p["w"], (5, 11, 7)))


@plain("barrier", {"w": w(11, 7)}, w(4, 11))
def _barrier(p, x):
    weight, x = lax.optimization_barrier((p["w"], x))
    return x @ weight


# Control flow.
@plain("jit", {"w": w(11, 7)}, w(4, 11))
@jax.jit
def _jit(p, x):
    return jax.jit(lambda x: jnp.tanh(x) @ p["w"])(x)


@plain("remat", {"w": w(11, 7)}, w(4, 11))
def _remat(p, x):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(lambda p, x: jnp.sin(x @ p["w"]), policy=policy)(p, x)


@plain("scan_stacked", {"w": w(3, 11, 11), "b": w(3, 11)}, w(4, 11))
def _scan(p, x):
    def step(x, p):
        return jnp.tanh(x @ p["w"] + p["b"][None]), x.sum()

    return lax.scan(step, x, p)


@plain("scan_closed_over", {"w": w(11, 11)}, w(4, 11))
def _scan_closed(p, x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, length=3, reverse=True)[0]


@plain("scan_remat", {"w": w(3, 11, 11)}, w(4, 11))
def _scan_remat(p, x):
    return lax.scan(jax.checkpoint(lambda x, k: (jnp.tanh(x @ k), None)), x, p["w"])[0]


@plain("scan_carried", {"w": w(11, 11)}, w(4, 11))
def _carried(p, x):
    return lax.fori_loop(0, 3, lambda n, c: (c[0], jnp.tanh(c[1] @ c[0]["w"])), (p, x))[1]


@plain("scan_rows", {"w": w(6, 11)}, w(11))
def _scan_rows(p, x):
    return lax.scan(lambda c, row: (jnp.tanh(c + row @ x), row.sum()), jnp.zeros(()), p["w"])


@plain("cond", {"w": w(11, 7), "v": {"w": w(11, 7, seed=1)}}, w(4, 11))
def _cond(p, x):
    return lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x @ p["v"]["w"])


@plain("switch", {"w": w(11, 7)}, w(4, 11), jnp.array(2))
def _switch(p, x, n):
    return lax.switch(n, [lambda s=s: s * (x @ p["w"]) for s in (1.0, 2.0, 3.0)])


@plain("activations_with_rules", {"w": w(11, 7)}, w(4, 11))
def _rules(p, x):
    @jax.custom_vjp
    def clip(x):
        return x

    clip.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -0.1, 0.1),))
    return jax.nn.relu(clip(jax.nn.silu(x) @ p["w"]))


@plain("vmap_inside", {"w": w(3, 11, 7)}, w(3, 4, 11))
def _vmap(p, x):
    return jax.vmap(lambda k, x: x @ k)(p["w"], x)


@plain("grad_inside", {"w": w(11, 7)}, w(4, 11))
def _grad(p, x):
    return jax.grad(lambda x: jnp.sin(x @ p["w"]).sum())(x)


@plain("ragged", {"w": w(3, 11, 7)}, w(10, 11), jnp.array([4, 1, 5]))
def _ragged(p, x, sizes):
    return lax.ragged_dot(x, p["w"], sizes)


@plain("bfloat16", {"w": w(11, 7, dtype=jnp.bfloat16)}, w(4, 11, dtype=jnp.bfloat16))
def _bfloat16(p, x):
    return x @ p["w"]


# Where W + s·A·B is truly needed: right, and reported.
@plain("normalized", {"w": w(11, 7)}, w(4, 11), materialized=1)
def _normalized(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))


@plain("custom_vjp_weight", {"w": w(11, 7)}, w(4, 11))
def _custom_vjp(p, x):
    @jax.custom_vjp
    def dense(x, k):
        return x @ k

    dense.defvjp(lambda x, k: (x @ k, (x, k)), lambda r, ct: (ct @ r[1].T, r[0].T @ ct))
    return dense(x, p["w"])


@plain("custom_jvp_weight", {"w": w(11, 7)}, w(4, 11))
def _custom_jvp(p, x):
    @jax.custom_jvp
    def dense(x, k):
        return x @ k

    dense.defjvp(lambda p, t: (dense(*p), t[0] @ p[1] + p[0] @ t[1]))
    return dense(x, p["w"])


def conv(name: str, kernel: tuple[int, ...], x: tuple[int, ...], **kw: Any) -> None:
    """Make a case of one convolution."""
    spatial = "HWD"[: len(kernel) - 2]
    dn = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    strides = kw.pop("strides", (1,) * len(spatial))

    def run(p, x):
        return lax.conv_general_dilated(
            x,
            p["w"],
            strides,
            kw.get("padding", "SAME"),
            dimension_numbers=dn,
            **{k: v for k, v in kw.items() if k != "padding"},
        )

    CASES.append(Case(name, run, {"w": w(*kernel)}, (w(*x),)))


conv("conv_1d", (3, 4, 7), (2, 9, 4))
conv("conv_2d", (3, 2, 4, 7), (2, 9, 8, 4), strides=(2, 1))
conv("conv_3d", (2, 2, 3, 4, 7), (2, 5, 6, 4, 4))
conv("conv_dilated", (3, 3, 4, 7), (2, 9, 8, 4), rhs_dilation=(2, 1), padding="VALID")
conv("conv_grouped", (3, 3, 2, 6), (2, 9, 8, 6), feature_group_count=3)
conv("conv_1x1", (1, 1, 4, 7), (2, 5, 6, 4))
conv("conv_lhs_dilated", (3, 3, 4, 7), (2, 5, 6, 4), lhs_dilation=(2, 2), padding=((1, 1), (0, 2)))


@plain("conv_transpose", {"w": w(3, 3, 7, 4)}, w(2, 5, 6, 4))
def _conv_transpose(p, x):
    return lax.conv_transpose(
        x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
    )


linen("linen_dense", nn.Sequential([nn.Dense(7), jnp.tanh, nn.Dense(5)]), w(4, 11))
linen("linen_bf16_compute", nn.Dense(7, dtype=jnp.bfloat16), w(4, 11))
linen("linen_general", nn.DenseGeneral((3, 5), axis=(-2, -1)), w(2, 4, 11))
linen("linen_attention", nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=10), w(2, 3, 11))
linen("linen_conv", nn.Conv(6, (3, 3), feature_group_count=2), w(2, 7, 5, 4))
linen("linen_conv_transpose", nn.ConvTranspose(6, (3, 3), strides=(2, 2)), w(2, 7, 5, 4))
linen("linen_embed", nn.Embed(23, 11), jnp.array([[1, 22], [3, 0]]))
linen("linen_lstm", nn.RNN(nn.LSTMCell(7)), w(2, 5, 11))
linen("linen_einsum", nn.Einsum((11, 3, 5), "bti,ihd->bthd"), w(2, 4, 11))
nnx_model("nnx_linear", nnx.Linear(11, 7, rngs=nnx.Rngs(0)), w(4, 11))
nnx_model(
    "nnx_attention",
    nnx.MultiHeadAttention(2, 11, 10, decode=False, rngs=nnx.Rngs(0)),
    w(2, 3, 11),
)
nnx_model("nnx_conv", nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)), w(2, 7, 5, 4))
nnx_model("nnx_embed", nnx.Embed(23, 11, rngs=nnx.Rngs(0)), jnp.array([[1, 22], [3, 0]]))
