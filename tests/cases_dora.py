"""Programs over DoRA's weights, m · V / ‖V‖: its gain at one end of each product, or a fallback."""

import cases_weights
import flax.linen as nn
import jax
import jax.numpy as jnp
from cases import Case, numbers, w
from cases_weights import sharded
from jax import lax
from jax.sharding import PartitionSpec as P

X = w(4, 11)
CASES = [*cases_weights.CASES]


def dora(name, params, *args, materialized=0):
    """Make a case of the decorated function, whose weights have magnitudes."""

    def register(fn):
        CASES.append(Case(f"dora_{name}", fn, params, args, Case.rules, materialized, dora=True))
        return fn

    return register


def linen(name, module, *args):
    variables = numbers(jax.eval_shape(module.init, jax.random.key(1), *args))
    CASES.append(Case(f"dora_{name}", module.apply, variables, args, dora=True))


@dora("io", {"w": w(11, 7)}, w(5, 3, 11))
def _io(p, x):
    return x @ p["w"]


@dora("oi", {"w": w(7, 11)}, w(5, 11))
def _oi(p, x):
    return x @ p["w"].T


@dora("attention", {"q": {"w": w(11, 3, 5)}, "o": {"w": w(3, 5, 11)}}, w(2, 4, 11))
def _attention(p, x):
    q = jnp.einsum("bti,ihd->bhtd", x, p["q"]["w"])
    return jnp.einsum("bhtd,hdo->bto", jnp.tanh(q), p["o"]["w"])


@dora("tied", {"embedding": w(23, 11)}, jnp.array([[1, 5, 22], [0, 3, 3]]))
def _tied(p, tokens):
    return jnp.tanh(p["embedding"][tokens]) @ p["embedding"].T


@dora("scanned", {"w": w(3, 11, 11), "b": w(3, 11)}, X)
def _scanned(p, x):
    def step(x, p):
        return jnp.tanh(x @ p["w"] + p["b"][None]), x.sum()

    return lax.scan(jax.checkpoint(step), x, p)


@dora("experts", {"w": w(4, 11, 7), "v": {"w": w(4, 7, 11)}}, w(4, 6, 11))
def _experts(p, x):
    return jnp.einsum("ecf,efd->ecd", jnp.tanh(jnp.einsum("ecd,edf->ecf", x, p["w"])), p["v"]["w"])


@dora("expert_per_token", {"w": w(3, 11, 7)}, w(5, 11), jnp.array([0, 2, 2, 1, 0]))
def _routed(p, x, e):
    return jnp.einsum("ti,tio->to", x, p["w"][e])


@dora("ragged", {"w": w(3, 11, 7), "v": {"w": w(3, 5, 7)}}, w(10, 11), jnp.array([4, 1, 5]))
def _ragged(p, x, sizes):
    h = jnp.tanh(lax.ragged_dot(x, p["w"], sizes))
    return lax.ragged_dot(h, p["v"]["w"].transpose(0, 2, 1), sizes)


@dora("bfloat16", {"w": w(11, 7, dtype=jnp.bfloat16)}, w(4, 11, dtype=jnp.bfloat16))
def _bfloat16(p, x):
    return x @ p["w"]


@dora("rearranged", {"w": w(11, 15)}, X)
def _rearranged(p, x):
    a, b, c = jnp.split(p["w"], 3, axis=1)
    y = jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(11, 3, 5) * 0.5)
    return y, (x @ a) * (x @ -b) + x @ jnp.flip(c, 1)[:, ::1] + x[:, 2:9] @ p["w"][2:9, 5:10]


@dora("traced_index", {"w": w(3, 11, 7)}, X, jnp.array(1))
def _index(p, x, n):
    return x @ p["w"][n] + x @ lax.dynamic_index_in_dim(p["w"], n, keepdims=False)


@dora("heads_merged", {"w": w(11, 3, 5)}, X)
def _merged(p, x):
    return jax.vmap(lambda k: x @ k, 1)(p["w"]), x @ p["w"].reshape(11, 15)


@dora("broadcast", {"w": w(11, 7)}, w(5, 4, 11))
def _broadcast(p, x):
    return jnp.einsum("bti,bio->bto", x, jnp.broadcast_to(p["w"], (5, 11, 7)))


@dora("shard_map", {"w": w(12, 6), "v": {"w": w(6, 12)}}, w(4, 12))
def _shard_map(p, x):
    def body(x, k, v):
        return lax.psum(jnp.tanh(x @ k) @ v, "model")

    specs = (P("data"), P(None, "model"), P("model"))
    return sharded(body, specs, P("data"))(x, p["w"], p["v"]["w"])


@dora("conv", {"w": w(3, 2, 4, 7)}, w(2, 9, 8, 4))
def _conv(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["w"], (2, 1), "SAME", dimension_numbers=numbers)


@dora("conv_transpose", {"w": w(3, 3, 7, 4)}, w(2, 5, 6, 4))
def _conv_transpose(p, x):
    return lax.conv_transpose(
        x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
    )


@dora("depthwise", {"w": w(3, 3, 4, 3)}, w(2, 5, 6, 4))
def _depthwise(p, x):
    kernel = p["w"].reshape(3, 3, 1, 12)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
    )


@dora("short_axes", {"w": w(1, 11, 7, 1)}, X, w(5, 7))
def _short_axes(p, x, y):
    one = p["w"].reshape(11, 7)
    return jnp.einsum("ti,aiob->to", x, p["w"]), y @ one.T


linen("grouped_conv", nn.Conv(6, (3, 3), feature_group_count=2), w(2, 7, 5, 4))
linen("linen_attention", nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=10), w(2, 3, 11))


# Where a gain has no place: right, and reported.
@dora("summed", {"w": w(11, 7), "v": {"w": w(11, 7, seed=1)}}, X, materialized=2)
def _summed(p, x):
    return x @ (p["w"] + p["v"]["w"])


@dora("joined", {"w": w(11, 7), "v": {"w": w(5, 7)}}, X, w(4, 5), materialized=2)
def _joined(p, x, y):
    return jnp.concatenate([x, y], axis=1) @ jnp.concatenate([p["w"], p["v"]["w"]], axis=0)


@dora("contracted_stack", {"w": w(3, 11, 7)}, w(4, 3, 11), materialized=2)
def _contracted_stack(p, x):
    y = jnp.einsum("tsi,sio->tso", x, p["w"])
    z = x.reshape(4, 33) @ p["w"].reshape(33, 7)
    return y, z * jnp.einsum("tsi,sio->to", x, p["w"])


@dora("branch_of_weights", {"w": w(11, 7), "v": {"w": w(7, 11)}}, X, materialized=2)
def _branch(p, x):
    return x @ lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: p["v"]["w"].T)


@dora("padded", {"w": w(11, 7)}, X, materialized=1)
def _padded(p, x):
    return x @ jnp.pad(p["w"], ((0, 0), (0, 2)))


@dora("sums", {"w": w(11, 7)}, X, materialized=1)
def _sums(p, x):
    return x[:, :1] * p["w"].sum(0)[None], x * p["w"].sum(1)[None]


@dora("product", {"w": w(11, 7), "v": {"w": w(7, 5)}}, X, materialized=1)
def _product(p, x):
    return x @ (p["w"] @ p["v"]["w"])


@dora("custom_vjp", {"w": w(11, 7)}, X, materialized=1)
def _custom_vjp(p, x):
    @jax.custom_vjp
    def dense(x, k):
        return x @ k

    dense.defvjp(lambda x, k: (x @ k, (x, k)), lambda r, ct: (ct @ r[1].T, r[0].T @ ct))
    return dense(x, p["w"])
