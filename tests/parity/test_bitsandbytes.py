"""NF4, int8, QLoRA's training and LoftQ against bitsandbytes and PEFT, live on a CPU."""

import dataclasses
import json
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import bitsandbytes.functional
import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft.utils.loftq_utils
import pytest
import torch
from live import quiet

import jlora
import jlora.bitsandbytes
from jlora import LoraSpec, quant
from jlora.quant.nf4 import LEVELS, SCALES

OI = {"w": "oi"}
NAME = "model.layers.0.self_attn.q_proj.weight"
RNG = np.random.default_rng(0)
WIDE = RNG.normal(size=(96, 320)).astype(np.float32) / 16


def ours(w: torch.Tensor, format: Any) -> quant.QuantArray:
    dtype = str(w.dtype).removeprefix("torch.")
    base = {"w": jnp.asarray(w.float().numpy()).astype(dtype)}
    return jlora.quantize(base, {"w": format}, layouts=OI)["w"]


def theirs(w: torch.Tensor, double: bool, block: int = 64) -> tuple[torch.Tensor, Any]:
    return bnb.functional.quantize_4bit(
        w, quant_type="nf4", blocksize=block, compress_statistics=double
    )


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().numpy()


def test_the_tables():
    np.testing.assert_array_equal(bnb.functional.create_dynamic_map().numpy(), SCALES)
    np.testing.assert_array_equal(bnb.functional.get_4bit_type("nf4", "cpu").numpy(), LEVELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [32, 64])
def test_nf4(dtype, block):
    """The same codes, scales and values. Scales of scales may differ where two are as near."""
    w = torch.tensor(WIDE).to(dtype)
    for double in (False, True):
        codes, state = theirs(w, double, block)
        made = ours(w, quant.NF4(block, double))
        np.testing.assert_array_equal(made.parts["codes"].reshape(-1), codes.numpy().reshape(-1))
        if not double:
            np.testing.assert_array_equal(made.parts["absmax"].reshape(-1), state.absmax.numpy())
            want = numpy(bnb.functional.dequantize_4bit(codes, state))
            np.testing.assert_array_equal(np.asarray(made.dequantize(), np.float32), want)
            continue
        np.testing.assert_allclose(made.parts["offset"], state.offset, rtol=1e-6)
        np.testing.assert_allclose(made.parts["nested_absmax"], state.state2.absmax, rtol=1e-5)
        scaled = numpy(theirs(w, False, block)[1].absmax - state.offset)
        scaled /= np.repeat(state.state2.absmax.numpy(), 256)[: scaled.size]
        chosen = np.asarray(made.parts["absmax"]).reshape(-1), state.absmax.numpy()
        # Ours are the nearest. Its kernel for CPUs compares in steps of about 2**-16.
        off = [np.abs(SCALES[c] - scaled) for c in chosen]
        assert (off[0] <= off[1] + 1e-6).all() and (off[1] <= off[0] + 2**-15).all()
        assert (chosen[0] == chosen[1]).mean() > 0.99


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_comes_in_and_goes_out_byte_for_byte(double, dtype, compare):
    w = torch.tensor(WIDE).to(dtype)
    codes, state = theirs(w, double)
    tensors = {NAME: codes, **{f"{NAME}.{k}": x for k, x in state.as_dict(packed=True).items()}}
    tensors = {key: x.numpy() for key, x in tensors.items()}
    made = jlora.bitsandbytes.from_tensors(tensors, NAME)
    assert made.shape == (96, 320) and made.format == quant.NF4(64, double)
    assert made.dtype == str(dtype).removeprefix("torch.")
    want = numpy(bnb.functional.dequantize_4bit(codes, state))
    most = 1e-6 if dtype == torch.float32 else 2**-8
    compare(made.dequantize(), want, "the weight", most=most)
    back = jlora.bitsandbytes.to_tensors(made.as_layout("io", (320, 96)), NAME)
    assert set(back) == set(tensors)
    for key, x in back.items():
        assert (x.dtype, x.shape) == (tensors[key].dtype, tensors[key].shape), key
        np.testing.assert_array_equal(x, tensors[key], key)


def good() -> dict[str, Any]:
    w = jlora.quantize({"w": jnp.asarray(WIDE)}, {"w": "nf4"}, layouts=OI)["w"]
    return jlora.bitsandbytes.to_tensors(w, NAME)


STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
SAID = json.loads(bytes(good()[STATE]))


def said(**entries: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(SAID | entries).encode(), np.uint8)


BAD = {
    "missing": ({f"{NAME}.absmax": None}, KeyError, r'no tensor "model.*\.absmax"\. Closest'),
    "not JSON": ({STATE: np.zeros(4, np.uint8)}, ValueError, "quant_state is not what bitsandbyte"),
    "an entry": ({STATE: said(shape=None)}, ValueError, r"quant_state is not what .*damaged"),
    "fp4": ({STATE: said(quant_type="fp4")}, ValueError, r"quant_type 'fp4', shape .* in nf4 of"),
    "3-D": ({STATE: said(shape=[2, 48, 320])}, ValueError, "jlora reads 2-D weights in nf4"),
    "rows": ({STATE: said(shape=[320, 96])}, ValueError, r"blocks of 64 weights extend over rows"),
    "larger": (
        {STATE: said(shape=[97, 320])},
        ValueError,
        r"its absmax is .*finite uint8\[97, 5\]",
    ),
    "map": ({f"{NAME}.quant_map": -LEVELS}, ValueError, "its quant_map is not that of NF4"),
    "nested": ({f"{NAME}.nested_quant_map": SCALES[1:]}, ValueError, "its nested_quant_map is not"),
    "nan": (
        {f"{NAME}.nested_absmax": np.full(2, np.nan, np.float32)},
        *(ValueError, r"its nested_absmax is .*finite float32\[2\]\. The file is damaged"),
    ),
    "cut": ({NAME: np.zeros(7, np.uint8)}, ValueError, r"its codes is .*finite uint8\[96, 160\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_checkpoints(name):
    changes, kind, text = BAD[name]
    tensors = {key: x for key, x in (good() | changes).items() if x is not None}
    with pytest.raises(kind, match=rf"(?s)from_tensors\(tensors, .*{NAME}.*{text}"):
        jlora.bitsandbytes.from_tensors(tensors, NAME)


def test_what_is_no_checkpoint():
    stack = jlora.quantize({"w": jnp.ones((2, 4, 64))}, {"w": "nf4"}, layouts=OI)["w"]
    for wrong in (stack, ours(torch.tensor(WIDE), "int8")):
        with pytest.raises(ValueError, match=r"to_tensors\(weight, 'a'\).*stored as"):
            jlora.bitsandbytes.to_tensors(wrong, "a")


def test_int8(compare):
    w = torch.tensor(WIDE)
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(w.clone())
    made = ours(w, "int8")
    np.testing.assert_array_equal(made.parts["codes"], codes.numpy())
    compare(made.parts["scale"], scale / 127, "the scales", most=1e-6)
    want = bnb.functional.int8_vectorwise_dequant(codes, scale)
    compare(made.dequantize(), want, "the weight", most=1e-6)


class Net(torch.nn.Module):
    """Two layers whose weights bitsandbytes stores in NF4."""

    def __init__(self) -> None:
        super().__init__()
        kind: Any = bnb.nn.Linear4bit
        more = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4"}
        self.up, self.down = kind(64, 96, **more), kind(128, 32, **more)
        self.is_loaded_in_4bit = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        return self.down(torch.cat([hidden, hidden[:, :32]], dim=1))


def model(p: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ p["up"])
    return jnp.concatenate([hidden, hidden[:, :32]], axis=1) @ p["down"]


def test_trained_as_by_peft_and_bitsandbytes(compare):
    """Thirty steps over the same codes: losses; and gradients over the float32 weights."""
    torch.manual_seed(0)
    net = Net().to("cpu")  # quantizes
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"])
    net = quiet(peft.get_peft_model, net, config)
    assert type(net.base_model.model.up).__name__ == "Linear4bit"
    base, adapter = {}, {}
    for name in ("up", "down"):
        layer = getattr(net.base_model.model, name)
        tensors = {k: x.numpy() for k, x in layer.base_layer.state_dict().items()}
        stored = jlora.bitsandbytes.from_tensors(tensors, "weight")
        base[name] = stored.as_layout("io", stored.dims[::-1])
        adapter[name] = [getattr(layer, f"lora_{k}")["default"].weight for k in "AB"]
    params = jlora.attach(base, {".*": LoraSpec(4, alpha=8)}, key=jax.random.key(0))
    params = {
        name: dataclasses.replace(
            node,
            lora_a=jnp.asarray(numpy(adapter[name][0]).T),
            lora_b=jnp.asarray(numpy(adapter[name][1]).T),
        )
        for name, node in params.items()
    }
    trainable, frozen = jlora.partition(params)
    x, y = RNG.normal(size=(16, 64)).astype(np.float32), RNG.normal(size=(16, 32))
    y = y.astype(np.float32)

    def loss(t: Any, frozen: Any) -> Any:
        return ((jlora.lora(model)(jlora.combine(t, frozen), x) - y) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    plain = jlora.partition(jlora.dequantize(params))[1]
    for got, want in zip(
        *(jax.tree.leaves(step(trainable, f)) for f in (frozen, plain)), strict=True
    ):
        compare(got, want, "over the stored and the dense weights")
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    losses: list[tuple[float, float]] = []
    for _ in range(30):
        value, grads = step(trainable, frozen)
        trainable = jax.tree.map(lambda p, g: p - 0.5 * g, trainable, grads)
        optimizer.zero_grad()
        error = ((net(torch.tensor(x)) - torch.tensor(y)) ** 2).mean()
        quiet(error.backward)
        optimizer.step()
        losses.append((float(value), error.item()))
    got, want = np.transpose(losses)
    assert want[-1] < 0.9 * want[0]
    np.testing.assert_allclose(got, want, rtol=1e-4)


def on_cpu() -> Any:
    """PEFT's `loftq_init` asks for a GPU by its name; here its name means the CPU."""
    to, of_params = torch.Tensor.to, bnb.nn.Params4bit.to

    def moved(run: Any) -> Any:
        def redirected(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple("cpu" if x == "cuda" else x for x in args)
            kwargs = {
                k: "cpu" if isinstance(x, str) and x == "cuda" else x for k, x in kwargs.items()
            }
            return run(self, *args, **kwargs)

        return redirected

    patches = [
        mock.patch.object(torch.Tensor, "to", moved(to)),
        mock.patch.object(bnb.nn.Params4bit, "to", moved(of_params)),
        mock.patch.object(peft.utils.loftq_utils, "clear_device_cache", lambda: None),
    ]
    return patches


@pytest.mark.parametrize("steps", [1, 3])
def test_loftq(steps, compare):
    w = WIDE[:, :128]
    patches = on_cpu()
    for patch in patches:
        patch.start()
    try:
        q, a, b = peft.utils.loftq_utils.loftq_init(torch.tensor(w), 4, 8, num_iter=steps)
    finally:
        for patch in patches:
            patch.stop()
    params = jlora.quantize({"w": jnp.asarray(w)}, {"w": quant.NF4(double=False)}, layouts=OI)
    params = jlora.attach(params, {"w": LoraSpec(8, alpha=32, layout="oi")}, key=jax.random.key(0))
    before = np.linalg.norm(jlora.merge(params)["w"] - w)
    made = jlora.initializers.loftq(params, {"w": jnp.asarray(w)}, steps=steps)
    node = made["w"]
    update = 4 * (node.lora_a @ node.lora_b).T
    compare(update, numpy(b @ a), "A and B", most=1e-4)
    compare(node.base.dequantize(), numpy(q), "Q", most=1e-4)
    assert np.linalg.norm(jlora.merge(made)["w"] - w) < 0.95 * before
    assert node.residual == (steps > 1)
