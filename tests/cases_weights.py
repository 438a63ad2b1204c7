"""Programs that do something to their weights first: join, choose, scale, shard, rule over them."""

import functools

import cases
import jax
import jax.numpy as jnp
from cases import Case, w
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

X = w(4, 11)
CASES = [*cases.CASES]
plain = functools.partial(cases.plain, into=CASES)


@plain("joined_outputs", {"w": w(11, 7), "v": {"w": w(11, 5)}}, X)
def _joined_outputs(p, x):
    fused = jnp.concatenate([p["w"], jnp.ones((11, 2)), p["v"]["w"]], axis=1)
    a, b = jnp.split(x @ fused, [7], axis=1)
    return a, jnp.tanh(b)


@plain("joined_inputs", {"w": w(11, 7), "v": {"w": w(5, 7)}}, X, w(4, 5))
def _joined_inputs(p, x, y):
    return jnp.concatenate([x, y], axis=1) @ jnp.concatenate([p["w"], p["v"]["w"]], axis=0)


@plain("stacked_at_call", {"w": w(11, 11), "v": {"w": w(11, 11, seed=1)}}, X)
def _stacked(p, x):
    stack = jnp.stack([p["w"], p["v"]["w"], jnp.eye(11)])
    return lax.scan(lambda x, k: (jnp.tanh(x @ k), x.sum()), x, stack)


@plain("joined_stacks", {"w": w(2, 11, 7), "v": {"w": w(1, 11, 7)}}, X)
def _joined_stacks(p, x):
    return jnp.einsum("ti,sio->tso", x, jnp.concatenate([p["w"], p["v"]["w"]]))


@plain("swapped_halves", {"w": w(11, 6)}, X)
def _swapped(p, x):
    return x @ jnp.concatenate([p["w"][:, 3:], p["w"][:, :3]], axis=1) + x @ jnp.roll(p["w"], 1, 1)


@plain("summed", {"w": w(11, 7), "v": {"w": w(11, 7, seed=1)}}, X)
def _summed(p, x):
    return x @ (p["w"] + p["v"]["w"]) + x @ (1.0 - p["w"]) + x @ (p["w"] + p["w"])


@plain("chosen_layer", {"w": w(3, 11, 7)}, X, jnp.array(1))
def _chosen_layer(p, x, n):
    one = jnp.where((jnp.arange(3) == n)[:, None, None], p["w"], 0.0).sum(0)
    return x @ one


@plain("chosen_outputs", {"w": w(11, 7), "v": {"w": w(11, 7, seed=1)}}, X)
def _chosen_outputs(p, x):
    even = jnp.arange(7) % 2 == 0
    return x @ jnp.where(even[None], p["w"], p["v"]["w"]) + x @ jnp.where(x[0, 0] > 0, p["w"], 1.0)


@plain("pruned_inputs", {"w": w(11, 7)}, X)
def _pruned(p, x):
    return x @ jnp.where((jnp.arange(11) % 3 == 0)[:, None], 0.0, p["w"])


@plain("padded", {"w": w(3, 11, 7)}, X)
def _padded(p, x):
    stack = jnp.pad(p["w"], ((0, 1), (0, 0), (0, 2)))
    return jnp.einsum("ti,sio->tso", x, stack)


@plain("scaled_columns", {"w": w(11, 7)}, X, jnp.arange(1.0, 8.0))
def _scaled_columns(p, x, s):
    return x @ (p["w"] * s[None]) + x @ (p["w"] / jnp.broadcast_to(s, (11, 7)))


@plain("repeated_heads", {"w": w(11, 3, 5)}, X)
def _repeated(p, x):
    return jnp.einsum("ti,ihd->thd", x, jnp.repeat(p["w"], 2, axis=1) + jnp.tile(p["w"], (1, 2, 1)))


@plain("column_sums", {"w": w(3, 11, 7)}, X)
def _sums(p, x):
    return x @ p["w"].sum(0) + p["w"].sum((0, 1))[None]


@plain("running_sum_of_a_stack", {"w": w(5, 11, 7)}, X)
def _associative(p, x):
    return jnp.einsum("ti,sio->sto", x, lax.associative_scan(jnp.add, p["w"]))


@plain("product_of_weights", {"w": w(11, 7), "v": {"w": w(7, 5)}}, X)
def _product(p, x):
    return x @ (p["w"] @ p["v"]["w"])


@plain("gram", {"w": w(11, 7)}, X)
def _gram(p, x):
    return x @ (p["w"] @ p["w"].T)


@plain("stopped", {"w": w(11, 7)}, X)
def _stopped(p, x):
    return x @ lax.stop_gradient(p["w"]) + jnp.sin(x @ p["w"])


@plain("branch_of_weights", {"w": w(11, 7), "v": {"w": w(7, 11)}}, X)
def _branch(p, x):
    return x @ lax.cond(x[0, 0] > 0, lambda: p["w"], lambda: p["v"]["w"].T)


@plain("scan_makes_weights", {"w": w(3, 11, 7)}, X)
def _made(p, x):
    _, doubled = lax.scan(lambda c, k: (c, jax.checkpoint(lambda k: k.T * 2.0)(k)), 0.0, p["w"])
    return jnp.einsum("ti,soi->tso", x, doubled)


@plain("carried_and_scaled", {"w": w(11, 11)}, X)
def _carried(p, x):
    def step(c, _):
        k, x = c
        return (k * 0.9 + 0.01, jnp.tanh(x @ k)), x.sum()

    (_, x), sums = lax.scan(step, (p["w"], x), length=3)
    return x, sums


@plain("depthwise", {"w": w(3, 3, 4, 3)}, w(2, 5, 6, 4))
def _depthwise(p, x):
    kernel = p["w"].reshape(3, 3, 1, 12)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
    )


@plain("ensemble_of_convolutions", {"w": w(4, 3, 3, 5)}, w(4, 2, 9, 3))
def _ensemble(p, x):
    def one(k, x):
        return lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

    return jax.vmap(one)(p["w"], x)


@plain("lookup_under_vmap", {"w": w(13, 7)}, jnp.array([1, 12, 4]))
def _lookup(p, tokens):
    return jax.vmap(lambda n: p["w"][n])(tokens)


@plain("custom_vjp_of_three", {"w": w(3, 11, 5)}, w(2, 4, 11))
def _custom_three(p, x):
    @jax.custom_vjp
    def heads(x, k):
        return jnp.einsum("bti,hio->btho", x, k)

    def backward(saved, ct):
        x, k = saved
        dx = jnp.einsum("btho,hio->bti", ct, k) * 2.0
        return dx, 3.0 * jnp.einsum("bti,btho->hio", x, ct)

    heads.defvjp(lambda x, k: (heads(x, k), (x, k)), backward)
    return heads(jnp.sin(x), p["w"])


def sharded(fn, specs, out):
    """Map over a mesh of 2 x 2."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out)


@plain("shard_map_columns", {"w": w(12, 6)}, w(4, 12))
def _columns(p, x):
    specs = (P("data"), P(None, "model"))
    return sharded(lambda x, k: jnp.tanh(x) @ k, specs, P("data", "model"))(x, p["w"])


@plain("shard_map_rows", {"w": w(12, 6)}, w(4, 12))
def _rows(p, x):
    specs = (P("data", "model"), P("model"))
    return sharded(lambda x, k: lax.psum(x @ k, "model"), specs, P("data"))(x, p["w"])


@plain("shard_map_gathered", {"w": w(12, 10)}, w(4, 12))
def _gathered(p, x):
    def body(x, k):
        whole = lax.all_gather(k, "data", axis=0, tiled=True)
        stack = lax.all_gather(k, "data", axis=0)
        return x @ whole + x @ stack.reshape(12, 5)

    return sharded(body, (P("data"), P("data", "model")), P("data", "model"))(x, p["w"])


@plain("shard_map_closed_over", {"w": w(12, 6)}, w(4, 12))
def _closed_over(p, x):
    return sharded(lambda x: x @ p["w"], P("data"), P("data"))(x)


@functools.partial(jax.jit, static_argnums=2)
def _deep(x, k, n):
    return x if n == 0 else _deep(jax.checkpoint(lambda x, k: jnp.tanh(x @ k))(x, k), k, n - 1)


CASES.append(Case("jit_in_jit", lambda p, x: _deep(x, p["w"], 3), {"w": w(11, 11)}, (X,)))
