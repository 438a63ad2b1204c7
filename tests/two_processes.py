"""One process of a program of several, on loopback: `python two_processes.py INDEX PORT FOLDER`.

It trains an adapter, saves it, restores it, resumes, and is killed inside another save.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraSpec, _disk, checkpoint, peft
from jlora._processes import gathered

SHAPES = {"up": (8, 16), "down": (16, 8), "bias": (8,)}
SPECS = {"up": P("x", "y"), "down": P("y", "x"), "bias": P("x")}
RULES = {"up|down": LoraSpec(2), "bias": "full"}
NAMES = {"up": "up.weight", "down": "down.weight", "bias": "down.bias"}
TX = jlora.freeze(optax.adam(1e-2))


def mesh_of(*shape):
    return jax.make_mesh(shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def put(value, sharding):
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def inputs(mesh):
    x = np.random.default_rng(9).normal(size=(16, 8)).astype(np.float32)
    return put(x, NamedSharding(mesh, P("x")))


def base_on(mesh):
    def draw(n, name):
        value = np.random.default_rng(n).normal(size=SHAPES[name]).astype(np.float32) / 3
        return put(value, NamedSharding(mesh, SPECS[name]))

    return {name: draw(n, name) for n, name in enumerate(SHAPES)}


def model(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"][None]


def step(params, state, x):
    run = jlora.lora(model, fallback="error")
    loss, grads = jax.value_and_grad(lambda p: ((run(p, x) - x) ** 2).mean())(params)
    updates, state = TX.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def started(params):
    """The state of the optimizer, and a step that keeps all shardings."""
    state = jax.eval_shape(TX.init, params)
    at = jlora.shardings(params), jlora.shardings(state, of=params)
    state = jax.jit(TX.init, out_shardings=at[1])(params)
    return state, jax.jit(step, out_shardings=(*at, None))


def trained(step, params, state, x):
    """Parameters, the optimizer's state and the losses after ten steps."""
    losses = []
    for _ in range(10):
        params, state, loss = step(params, state, x)
        losses.append(float(loss))
    return params, state, losses


def state_on(params):
    """What Orbax restores the state of the optimizer into."""
    state = jax.eval_shape(TX.init, params)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        state,
        jlora.shardings(state, of=params),
    )


def same(one, other):
    """Whether the shards that this process has are equal, bit for bit, and placed alike."""
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)


def main(index, port, folder):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    mesh = mesh_of(4, 2)
    base, x = base_on(mesh), inputs(mesh)
    params = jlora.attach(base, RULES, key=jax.random.key(0))
    state, run = started(params)
    half, moments, first = trained(run, params, state, x)
    checkpoint.save(folder / "run", half)
    peft.save(folder / "peft", half, names=NAMES)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", moments)
    second = trained(run, half, moments, x)[2]

    restored = checkpoint.restore(folder / "run", base)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder / "state", state_on(restored))
    same((restored, state), (half, moments))
    same(peft.load(folder / "peft", base, names=NAMES), half)
    assert trained(run, restored, state, x)[2] == second, "the resumed run is another"
    refuses(folder, half, "other files" if index == 0 else "process 0, which writes")

    leaves = jax.tree.leaves(gathered((jlora.detach(half)[1], moments)))
    if index == 0:
        np.savez(folder / "leaves", *leaves, losses=[*first, *second])
        _disk._exchange = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    print("saving", flush=True)
    checkpoint.save(folder / "run", params)


def refuses(folder, params, why):
    try:
        checkpoint.save(folder, params)  # which has other files in it
    except (ValueError, RuntimeError) as error:
        assert why in str(error), error
    else:
        raise AssertionError("it replaced a folder of other files")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
