"""The 39 everyday programs that LoRA libraries for JAX are asked for: 38 factored, one that cannot.

Most are rows of the table of cases that all laws run over; the rest are made here. `i` and `j` are
not programs but properties: laws of test_laws.py, held here for one program each.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, w
from cases_weights import CASES
from flax import nnx
from helpers import adapted, close, coarse, equations, jlora_node, loss_of, transform
from jax import lax

import jlora

X = w(4, 11)


class Block(nn.Module):
    """One layer of a scanned stack."""

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return jnp.tanh(nn.Dense(11, use_bias=False)(x)), None


class Chosen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        one, two = nn.Dense(7), nn.Dense(7)
        both = lambda m, x: one(x) + two(x)
        if self.is_initializing():
            return both(self, x)
        return nn.cond(x[0, 0] > 0, lambda m, x: one(x), lambda m, x: two(x), self, x)


def stack(block: Any) -> nn.Module:
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()


def linen(module: nn.Module, *args: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    return module.apply, module.init(jax.random.key(1), *args), args


def from_nnx(model: Any, *args: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    graph, state = nnx.split(model)
    return lambda state, *args: nnx.merge(graph, state)(*args), state, args


def nnx_stack() -> tuple[Any, Any, tuple[Any, ...]]:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(11, 11, use_bias=False, rngs=rngs)

    graph, state = nnx.split(make(nnx.Rngs(0)))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer: nnx.Linear, x: Any) -> Any:
        return jnp.tanh(layer(x))

    return lambda state, x: forward(nnx.merge(graph, state), x), state, (X,)


def tied() -> tuple[Any, Any, tuple[Any, ...]]:
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            embed = nn.Embed(23, 11)
            return embed.attend(jnp.tanh(embed(tokens)))

    return linen(Tied(), jnp.array([[1, 22], [3, 0]]))


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


MADE = {
    "d2_embed_tied": tied,
    "e_scan": lambda: linen(stack(Block), X, None),
    "e2_scan_remat": lambda: linen(stack(nn.remat(Block, prevent_cse=False)), X, None),
    "f_remat": lambda: linen(nn.remat(Block)(), X, None),
    "c4_conv_dilated": lambda: linen(nn.Conv(6, (3, 3), kernel_dilation=(2, 1)), w(2, 9, 8, 4)),
    "g5_nnx_scan": nnx_stack,
    "h2_densegeneral_out3d": lambda: linen(nn.DenseGeneral((3, 5)), X),
    "h4_nnx_einsum": lambda: from_nnx(
        nnx.Einsum("bti,ihd->bthd", (11, 3, 5), rngs=rngs()), w(2, 4, 11)
    ),
    "h5_nnx_lineargeneral": lambda: from_nnx(nnx.LinearGeneral(11, (3, 5), rngs=rngs()), X),
    "l_cond": lambda: linen(Chosen(), X),
}
FROM_THE_TABLE = {
    "a_dense_mlp": "linen_dense",
    "b_mhdpa": "linen_attention",
    "c_conv": "conv_2d",
    "c2_conv_grouped": "linen_conv",
    "c3_conv_transpose": "linen_conv_transpose",
    "d_embed": "linen_embed",
    "f2_fn_checkpoint": "remat",
    "g_nnx_mlp": "nnx_linear",
    "g2_nnx_mha": "nnx_attention",
    "g3_nnx_embed": "nnx_embed",
    "g4_nnx_conv": "nnx_conv",
    "h_linen_einsum": "linen_einsum",
    "h3_densegeneral_in3d": "linen_general",
    "h6_moe_einsum_batched": "experts",
    "h7_ragged_dot": "ragged",
    "i_vmap_adapters": "vmap_inside",
    "j_grad_no_full_dW": "torch_layout",
    "k_bf16": "bfloat16",
    "k2_bf16_compute_f32_params": "linen_bf16_compute",
    "l2_fn_cond": "cond",
    "m_custom_vjp": "custom_vjp_weight",
    "m2_custom_jvp_act": "activations_with_rules",
    "n_shard_map": "shard_map_columns",
    "o_lstm_scan": "linen_lstm",
    "p_reshape_before_dot": "reshaped",
    "q_transpose_used": "weight_on_the_left",
    "r_weight_elementwise": "normalized",
    "s_plain_function": "matmul",
    "t_two_same_shape": "two_of_one_shape",
}
TABLE = {case.name: case for case in CASES}


def everyday(name: str) -> Case:
    if name in FROM_THE_TABLE:
        return TABLE[FROM_THE_TABLE[name]]
    fn, params, args = MADE[name]()
    return Case(name, fn, params, args)


NAMES = sorted(MADE | FROM_THE_TABLE)


def test_there_are_39_of_which_38_are_factored():
    materialized = [n for n in FROM_THE_TABLE if TABLE[FROM_THE_TABLE[n]].materialized]
    assert len(NAMES) == 39 and materialized == ["r_weight_elementwise"]


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", sorted(FROM_THE_TABLE))
def test_a_program_of_the_table_is_factored(name: str) -> None:
    """That it equals the merged model, in output and gradients, is held by the laws."""
    case = everyday(name)
    report = jlora.explain(case.fn, adapted(case), *case.args)
    assert report.materialized == case.materialized and not report.unused, f"\n{report}"


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", sorted(MADE))
def test_an_everyday_program(name: str) -> None:
    """Factored, and equal to the merged model in output and gradients."""
    case = everyday(name)
    params = adapted(case)
    report = jlora.explain(case.fn, params, *case.args)
    assert report.materialized == case.materialized and not report.unused, f"\n{report}"
    merged = jax.jit(case.fn)(jlora.merge(params), *case.args)
    close(jax.jit(transform(case))(params, *case.args), merged, coarse(case))
    trainable, frozen = jlora.partition(params)

    def gradient(fn: Any) -> Any:
        return jax.jit(jax.grad(lambda t: loss_of(case, fn)(jlora.combine(t, frozen), *case.args)))

    want = gradient(lambda p, *a: case.fn(jlora.merge(p), *a))(trainable)
    close(gradient(transform(case))(trainable), want, coarse(case))


def test_the_gradient_is_of_no_weights_shape():
    """`j`: neither forward nor backward makes an array of the kernel's shape."""
    case = everyday("a_dense_mlp")
    params = adapted(case)
    trainable, frozen = jlora.partition(params)
    shapes = {x.shape for x in jax.tree.leaves(params, is_leaf=jlora_node) if jlora_node(x)}

    def loss(t: Any) -> Any:
        return loss_of(case, transform(case))(jlora.combine(t, frozen), *case.args)

    program = jax.make_jaxpr(jax.grad(loss))(trainable)
    made = {v.aval.shape for e in equations(program.jaxpr) for v in e.outvars}
    assert not made & (shapes | {shape[::-1] for shape in shapes})


def test_many_adapters_over_one_base():
    """`i`: `vmap` over adapters is a loop over adapters, the base is not copied for each."""
    case = everyday("a_dense_mlp")
    base, adapter = jlora.detach(adapted(case))
    both = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), adapter)
    run = transform(case)

    def many(adapters: Any) -> Any:
        return jax.vmap(lambda a: run(jlora.bind(base, a), *case.args))(adapters)

    got = jax.jit(many)(both)
    want = [
        run(jlora.bind(base, jax.tree.map(lambda a, n=n: a[n], both)), *case.args) for n in (0, 1)
    ]
    close(got, jnp.stack(want))
    shapes = {x.shape for x in jax.tree.leaves(base) if x.ndim == 2}
    made = {v.aval.shape for e in equations(jax.make_jaxpr(many)(both).jaxpr) for v in e.outvars}
    assert not made & {(2, *shape) for shape in shapes}


# What the other libraries stumble over.


def test_running_the_base_first_changes_nothing():
    case = everyday("a_dense_mlp")
    params, fn = adapted(case), jax.jit(case.fn)
    fn(case.params, *case.args)
    got = jlora.lora(fn, fallback="error")(params, *case.args)
    close(got, case.fn(jlora.merge(params), *case.args))
    assert not np.allclose(got, fn(case.params, *case.args))


@pytest.mark.parametrize("jitted", [False, True])
def test_an_activation_of_a_weights_shape_is_no_weight(jitted):
    """Two weights of one shape, and activations of that shape multiplied with one another."""

    def fn(p, x):
        y = x @ p["one"]["w"]
        return (y @ x) @ p["two"]["w"] + y @ y

    square = w(11, 11, seed=3)
    case = Case("square", fn, {"one": {"w": w(11, 11)}, "two": {"w": w(11, 11, seed=1)}}, (square,))
    params = adapted(case)
    run = transform(case)
    close((jax.jit(run) if jitted else run)(params, square), fn(jlora.merge(params), square))
    report = jlora.explain(fn, params, square)
    assert [use.name for use in report.uses] == ["one/w", "two/w"]
    inside = jlora.explain(jax.jit(fn), params, square)
    assert [use.name for use in inside.uses] == ["one/w", "two/w"]


def test_every_expert_has_its_own_a_and_b():
    case = everyday("h6_moe_einsum_batched")
    node = adapted(case)["w"]
    experts, d_in, d_out = node.shape
    assert node.layout == "io"
    assert node.lora_a.shape == (experts, d_in, 2) and node.lora_b.shape == (experts, 2, d_out)
    assert len({a.tobytes() for a in np.asarray(node.lora_a)}) == experts


@pytest.mark.parametrize("name", ["k_bf16", "k2_bf16_compute_f32_params"])
def test_a_bfloat16_model_stays_bfloat16(name):
    case = everyday(name)
    params = adapted(case)
    out = transform(case)(params, *case.args)
    assert out.dtype == case.fn(case.params, *case.args).dtype == jnp.bfloat16
    nodes = [x for x in jax.tree.leaves(params, is_leaf=jlora_node) if jlora_node(x)]
    assert all(x.lora_a.dtype == jnp.float32 for x in nodes)


def test_a_rank_above_the_smaller_side_is_taken_with_a_warning():
    base = {"w": w(24, 2), "v": w(2, 24)}
    for form in ("lora", "lora_fa", "vera", "adalora"):
        rules = {"[wv]": jlora.LoraSpec(3, form=form)}
        with pytest.warns(UserWarning, match=r"rank 3 is above .* for 1 more leaves"):
            params = jlora.attach(base, rules, key=jax.random.key(0))
        assert params["w"].lora_a.shape == (24, 3) and params["w"].lora_b.shape == (3, 2)
        merged = jlora.merge(params)
        assert all(bool((merged[k] == base[k]).all()) for k in base)
    rules = {"w": jlora.LoraSpec(3, form="lora_xs")}
    with pytest.raises(ValueError, match="initializer computes A and B from the weight"):
        jlora.attach(base, rules, key=jax.random.key(0))


def test_a_materialized_weight_is_right_and_says_where():
    case = everyday("r_weight_elementwise")
    params = adapted(case)
    with pytest.warns(UserWarning, match=r'"w" float32\[11,7\].*cases.py:\d+.*_normalized'):
        got = jlora.lora(case.fn)(params, *case.args)
    close(got, case.fn(jlora.merge(params), *case.args))
    with pytest.raises(ValueError, match=r'"w" float32\[11,7\].*Ways out'):
        jlora.lora(case.fn, fallback="error")(params, *case.args)


@pytest.mark.nightly
def test_associative_scans_and_loops_in_loops():
    def fn(p, x):
        decay = lax.associative_scan(lambda a, b: jnp.tanh(a @ p["w"]) + b, x)
        return lax.fori_loop(0, 2, lambda _, c: c @ p["w"], decay)

    case = Case("associative", fn, {"w": w(5, 5)}, (w(6, 4, 5),))
    params = adapted(case)
    assert jlora.explain(fn, params, *case.args).materialized == 0
    close(jax.jit(transform(case))(params, *case.args), fn(jlora.merge(params), *case.args))


@pytest.mark.filterwarnings("ignore:.*materialized:UserWarning")
@pytest.mark.parametrize(
    "read",
    [
        jax.checkpoint(lambda w: jnp.max(w, axis=0)),
        lambda w: jnp.kron(w, jnp.array([[1.0, -2.0]])),
        lambda w: jnp.linalg.qr(w)[1],
    ],
    ids=["checkpoint_of_max", "kron", "qr"],
)
def test_what_is_read_of_a_built_weight_has_the_merged_models_derivatives(read):
    """In both modes: what is recomputed must be the very array of the first time."""
    params = jlora.attach({"w": w(11, 7)}, {"w": jlora.LoraSpec(2)}, key=jax.random.key(0))
    trainable, frozen = jlora.partition(params)
    trainable = jax.tree.map(
        lambda x: jnp.asarray(np.cos(np.arange(x.size).reshape(x.shape), dtype=x.dtype)), trainable
    )
    program = lambda p: read(p["w"])
    tangent = jax.tree.map(lambda x: x[::-1], trainable)

    @jax.jit
    def derivatives(trainable, tangent):
        def both(fn):
            of = lambda t: fn(jlora.combine(t, frozen))
            loss = lambda t: (
                of(t) * np.arange(1.0, 1 + of(t).size, dtype=np.float32).reshape(of(t).shape)
            ).sum()
            return (
                of(trainable),
                jax.grad(loss)(trainable),
                jax.jvp(of, (trainable,), (tangent,))[1],
            )

        return both(jlora.lora(program)), both(lambda p: program(jlora.merge(p)))

    got, want = derivatives(trainable, tangent)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(want))
    close(got, want)
