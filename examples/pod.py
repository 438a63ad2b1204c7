"""Train an adapter on a mesh: one file for a CPU, virtual devices, several processes and pods.

python examples/pod.py                                      # one device
JAX_NUM_CPU_DEVICES=8 python examples/pod.py --tp 2         # eight virtual devices
JAX_NUM_CPU_DEVICES=4 python examples/pod.py --processes 2 --index 0 &  # two processes, four
JAX_NUM_CPU_DEVICES=4 python examples/pod.py --processes 2 --index 1    # devices each
python examples/pod.py --pod --tp 4                         # on every host of a pod
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import checkpoint

SHAPES = {"up": (4, 64, 256), "down": (4, 256, 64)}  # four layers, stacked for `scan`
SPECS = {"up": P(None, "fsdp", "tp"), "down": P(None, "tp", "fsdp")}
RULES = {"up|down": jlora.LoraSpec(rank=8, layout="io")}


def model(weights, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(jax.checkpoint(layer), x, weights)[0]


def main(options):
    if options.pod or options.processes > 1:
        own = (f"localhost:{options.port}", options.processes, options.index)
        jax.distributed.initialize(*(() if options.pod else own))
    shape = (jax.device_count() // options.tp, options.tp)
    mesh = jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)

    def weights():
        keys = dict(zip(SHAPES, jax.random.split(jax.random.key(0)), strict=True))
        return {name: jax.random.normal(keys[name], SHAPES[name]) / 16 for name in SHAPES}

    # A checkpoint of your own is loaded into these shardings; no device has all of a weight.
    base = jax.jit(weights, out_shardings={k: NamedSharding(mesh, SPECS[k]) for k in SPECS})()
    split = ("fsdp",)  # the batch is split along it
    params = jlora.attach(base, RULES, key=jax.random.key(1), replicate=split)
    tx = jlora.freeze(optax.adam(1e-3))
    state = jax.eval_shape(tx.init, params)
    at = jlora.shardings(params, split), jlora.shardings(state, split, of=params)
    state = jax.jit(tx.init, out_shardings=at[1])(params)

    def step(params, state, x):
        def loss(p):
            return ((jlora.lora(model)(p, x) - jnp.roll(x, 1, -1)) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*at, None))
    batch = jax.jit(
        lambda n: jax.random.normal(jax.random.fold_in(jax.random.key(2), n), (64, 64)),
        out_shardings=NamedSharding(mesh, P("fsdp")),
    )
    for n in range(options.steps):
        params, state, value = step(params, state, batch(n))
        if jax.process_index() == 0 and n % 10 == 9:
            print(f"step {n + 1}  loss {float(value):.4f}", flush=True)
    checkpoint.save(options.out, params)  # every process calls it, one writes


PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--pod", action="store_true", help="the cluster tells who is who")
for _name, _default in {"tp": 1, "processes": 1, "index": 0, "port": 12355, "steps": 50}.items():
    PARSER.add_argument(f"--{_name}", type=int, default=_default, help="%(default)s")
PARSER.add_argument("--out", type=Path, default="adapter", help="where the adapter is saved")

if __name__ == "__main__":
    main(PARSER.parse_args())
