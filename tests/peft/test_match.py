"""Names and layouts found by value: every leaf of trees written in many ways."""

import json
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora import LoraSpec, peft
from jlora._paths import leaves_with_paths

LAYERS, WIDTH, HIDDEN, VOCAB, HEADS = 3, 12, 20, 30, 4


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def decoder(tied: bool = False) -> dict[str, np.ndarray]:
    """Tensors of a small decoder as PyTorch names and orients them; many are square."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for k in range(LAYERS):
        at = f"model.layers.{k}"
        shapes |= {f"{at}.self_attn.{x}_proj.weight": (WIDTH, WIDTH) for x in "qkvo"}
        shapes |= {f"{at}.self_attn.{x}_proj.bias": (WIDTH,) for x in "qkv"}
        shapes |= {f"{at}.mlp.{x}_proj.weight": (HIDDEN, WIDTH) for x in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (WIDTH, HIDDEN), f"{at}.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    return {name: normal(rng, *shape) for name, shape in shapes.items()}


def linen(tensors: dict[str, np.ndarray], dtype: Any = jnp.float32) -> dict[str, Any]:
    """The tensors in Flax's orientation, attention in three dimensions."""

    def leaf(name: str, *shape: int) -> jax.Array:
        w = tensors[name]
        w = w if "embed" in name else w.T
        return jnp.asarray(w.reshape(shape) if shape else w, dtype)

    heads = WIDTH // HEADS
    tree: dict[str, Any] = {"embed": {"embedding": leaf("model.embed_tokens.weight")}}
    for k in range(LAYERS):
        at = f"model.layers.{k}"
        attention = {
            x: {
                "kernel": leaf(f"{at}.self_attn.{x}_proj.weight", WIDTH, HEADS, heads),
                "bias": leaf(f"{at}.self_attn.{x}_proj.bias", HEADS, heads),
            }
            for x in "qkv"
        }
        attention["o"] = {"kernel": leaf(f"{at}.self_attn.o_proj.weight", HEADS, heads, WIDTH)}
        mlp = {x: {"kernel": leaf(f"{at}.mlp.{x}_proj.weight")} for x in ("gate", "up", "down")}
        tree[f"layer_{k}"] = {"attn": attention, "mlp": mlp, "norm": leaf(f"{at}.norm.weight")}
    if "lm_head.weight" in tensors:
        tree["head"] = {"kernel": leaf("lm_head.weight")}
    return tree


def linen_name(path: str) -> str | None:
    if not path.startswith("layer_"):
        return {
            "embed/embedding": "model.embed_tokens.weight",
            "head/kernel": "lm_head.weight",
        }[path]
    layer, *rest = path.split("/")
    at = f"model.layers.{layer[6:]}"
    if rest == ["norm"]:
        return f"{at}.norm.weight"
    where, which, kind = rest
    where = {"attn": "self_attn", "mlp": "mlp"}[where]
    return f"{at}.{where}.{which}_proj.{'weight' if kind == 'kernel' else 'bias'}"


def paths(tree: Any) -> list[str]:
    return [path for path, _ in leaves_with_paths(tree)]


def test_every_leaf_of_a_linen_tree():
    tensors = decoder()
    params = linen(tensors)
    names, layouts = peft.match(params, tensors)
    assert names == {path: linen_name(path) for path in paths(params)}
    assert list(names) == paths(params)
    want = {"kernel": "io", "embedding": "io", "norm": None, "bias": None}
    for path in names:
        attention = {"q": "ioo", "k": "ioo", "v": "ioo", "o": "iio"}.get(path.split("/")[-2])
        ours = None if path.endswith("bias") else attention
        assert layouts.get(path) == (ours or want[path.rpartition("/")[2]]), path


@pytest.mark.parametrize("loaded", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_values_that_were_cast_on_loading(stored, loaded):
    tensors = {k: np.asarray(jnp.asarray(x, stored)) for k, x in decoder().items()}
    params = linen(tensors, jnp.dtype(loaded))
    names, layouts = peft.match(params, tensors)
    assert names == {path: linen_name(path) for path in paths(params)} and len(layouts) == 23


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    tree = linen(tensors)
    layers = [tree.pop(f"layer_{k}") for k in range(LAYERS)]
    return tree | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def test_layers_in_a_stack_have_a_pattern():
    tensors = decoder()
    params = stacked(tensors)
    names, layouts = peft.match(params, tensors)
    assert set(names) == set(paths(params))
    assert names["layers/attn/q/kernel"] == "model.layers.{}.self_attn.q_proj.weight"
    assert names["layers/attn/q/bias"] == "model.layers.{}.self_attn.q_proj.bias"
    assert layouts["layers/attn/q/kernel"] == "ioo" and layouts["layers/mlp/down/kernel"] == "io"


def test_experts_and_fused_weights_are_compared_index_by_index():
    rng, experts, heads = np.random.default_rng(1), 3, WIDTH // HEADS
    gates = normal(rng, LAYERS, experts, HIDDEN, WIDTH)
    keys, values = normal(rng, 2, LAYERS, WIDTH, WIDTH)
    qkv = normal(rng, 3 * WIDTH, WIDTH)
    tensors = {"h.qkv_proj.weight": qkv}
    for k in range(LAYERS):
        tensors |= {f"h.{k}.experts.{e}.gate.weight": gates[k, e] for e in range(experts)}
        tensors |= {f"h.{k}.k.weight": keys[k], f"h.{k}.v.weight": values[k]}
    # Gemma's (2, K, D, H): keys and values in one einsum's weight.
    kv = [
        np.stack([w.reshape(HEADS, heads, WIDTH).swapaxes(1, 2) for w in pair])
        for pair in zip(keys, values, strict=True)
    ]
    params = {
        "gates": jnp.asarray(gates.swapaxes(2, 3)),
        "kv": {str(k): jnp.asarray(w) for k, w in enumerate(kv)},
        "qkv": jnp.asarray(qkv.T),
        "heads": jnp.asarray(qkv.T.reshape(WIDTH, 3, HEADS, heads)),
    }
    with pytest.warns(UserWarning, match='2 of 6 leaves have no name. "heads": other leaves'):
        peft.match(params, tensors)
    names, layouts = peft.match(params, tensors, names={"heads": None})
    assert names["gates"] == "h.{}.experts.{}.gate.weight" and layouts["gates"] == "io"
    assert names["kv/1"] == ["h.1.k.weight", "h.1.v.weight"] and layouts["kv/1"] == "oio"
    assert names["qkv"] == "h.qkv_proj.weight" and layouts["qkv"] == "io"
    del params["qkv"]
    assert peft.match(params, tensors)[1]["heads"] == "iooo"


def test_experts_in_one_parameter_have_a_name_and_no_layout():
    rng = np.random.default_rng(2)
    up, down = normal(rng, 3, 2 * HIDDEN, WIDTH), normal(rng, 3, WIDTH, HIDDEN)
    tensors = {"mlp.experts.gate_up_proj": up, "mlp.experts.down_proj": down}
    params = {"up": jnp.asarray(up.swapaxes(1, 2)), "down": jnp.asarray(down)}
    names, layouts = peft.match(params, tensors)
    want = {"up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}
    assert names == want and layouts == {}


def test_equinox_has_outputs_first():
    model = eqx.nn.MLP(12, 12, 12, 2, key=jax.random.key(0))
    tensors = {}
    for k, layer in enumerate(model.layers):
        tensors[f"fc.{k}.weight"] = np.asarray(layer.weight)
        tensors[f"fc.{k}.bias"] = np.asarray(layer.bias)
    names, layouts = peft.match(model, tensors)
    weights = [f"layers/{k}/weight" for k in range(3)]
    assert names == {f"layers/{k}/{x}": f"fc.{k}.{x}" for k in range(3) for x in ("weight", "bias")}
    assert layouts == dict.fromkeys(weights, "oi")


def test_convolutions_in_both_orientations():
    rng = np.random.default_rng(3)
    tensors = {"c.weight": normal(rng, 6, 6, 3, 3), "d.weight": normal(rng, 6, 6, 3)}
    c, d = tensors.values()
    params = {
        "hwio": jnp.asarray(c.transpose(2, 3, 1, 0)),
        "wio": jnp.asarray(d.transpose(2, 1, 0)),
    }
    names, layouts = peft.match(params, tensors)
    assert names == {"hwio": "c.weight", "wio": "d.weight"}
    assert layouts == {"hwio": "iiio", "wio": "iio"}
    assert peft.match({"c": c, "d": d}, tensors)[1] == {"c": "oiii", "d": "oii"}


def test_gpt2_stores_its_matrices_inputs_first():
    """transformers' Conv1D: a square one is told by those of its name that are not."""
    rng = np.random.default_rng(4)
    tensors = {"wte.weight": normal(rng, VOCAB, WIDTH), "wpe.weight": normal(rng, WIDTH, WIDTH)}
    shapes = {"attn.c_attn": (WIDTH, 3 * WIDTH), "attn.c_proj": (WIDTH, WIDTH)}
    shapes |= {"mlp.c_fc": (WIDTH, HIDDEN), "mlp.c_proj": (HIDDEN, WIDTH)}
    for name, shape in shapes.items():
        tensors |= {f"h.0.{name}.weight": normal(rng, *shape)}
        tensors |= {f"h.0.{name}.bias": normal(rng, shape[1])}
    params = {name.replace(".", "/"): jnp.asarray(x) for name, x in tensors.items()}
    names, layouts = peft.match(params, tensors)
    assert names == {name.replace(".", "/"): name for name in tensors}
    assert set(layouts.values()) == {"io"} and len(layouts) == 6
    turned = {path: x.T for path, x in params.items()}
    assert set(peft.match(turned, tensors)[1].values()) == {"oi"}


def test_a_tied_head():
    tensors = decoder(tied=True)
    params = linen(tensors)
    names, _ = peft.match(params, tensors)
    assert names["embed/embedding"] == "model.embed_tokens.weight"
    both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert peft.match(params, both)[0] == names  # the file has both, the tree one
    params["head"] = {"kernel": params["embed"]["embedding"].T}
    found = peft.match(params, both)[0]  # and here the tree has both
    assert found == names | {"head/kernel": "lm_head.weight"}
    with pytest.warns(UserWarning, match='"head/kernel": other leaves or tensors have the same'):
        assert peft.match(params, tensors)[0] == names
    given = peft.match(params, tensors, names={"head/kernel": "lm_head.weight"})[0]
    assert given == found


def test_what_values_do_not_tell_is_listed_and_may_be_given():
    tensors = decoder()
    for k in range(LAYERS):
        tensors[f"model.layers.{k}.norm.weight"] = np.ones(WIDTH, np.float32)
        for x in "qkv":
            tensors[f"model.layers.{k}.self_attn.{x}_proj.bias"] = np.zeros(WIDTH, np.float32)
    params = linen(tensors)
    query = params["layer_0"]["attn"]["q"]
    params["layer_1"]["mlp"]["up"]["kernel"] *= 2  # scaled on loading
    head = np.asarray(params["head"]["kernel"])
    params["head"]["kernel"] = jnp.asarray(head[:, np.random.default_rng(0).permutation(VOCAB)])
    with pytest.warns(UserWarning, match="5 of 35 leaves have no name") as caught:
        names, layouts = peft.match(params, tensors)
    said = str(caught[0].message)
    assert said.count("/norm") == 3 and '"layer_1/mlp/up/kernel": no tensor has its values' in said
    assert '"head/kernel": it has the values of "lm_head.weight", in an order that no' in said
    # A bias of zeros is named after the weight that is next to it.
    assert names["layer_2/attn/v/bias"] == "model.layers.2.self_attn.v_proj.bias"
    odd = [path for path in paths(params) if path not in names]
    rest = {path: linen_name(path) for path in odd} | {"layer_0/norm": None}
    given, also = peft.match(params, tensors, names=rest)
    assert given == {p: linen_name(p) for p in paths(params) if p != "layer_0/norm"}
    assert also == layouts and query is params["layer_0"]["attn"]["q"]


def test_a_square_weight_that_is_its_own_transpose_is_not_guessed():
    w = normal(np.random.default_rng(5), 6, 6)
    tensors = {"a.weight": w + w.T, "b.weight": w}
    params = {"a": jnp.asarray(w + w.T), "b": jnp.asarray(w.T)}
    with pytest.warns(UserWarning, match='"a": it has the values of "a.weight", two layouts fit'):
        names, layouts = peft.match(params, tensors)
    assert names == {"b": "b.weight"} and layouts == {"b": "io"}


def test_layers_that_lie_differently_are_not_one_leaf():
    a, b = normal(np.random.default_rng(6), 2, 6, 6)
    with pytest.warns(UserWarning, match=r"\"w\": its layers have the layouts \['io', 'oi'\]"):
        peft.match(
            {"w": jnp.stack([a, b.T]), "x": jnp.ones((2, 3)) * a[0, 0]},
            {"l.0.weight": a, "l.1.weight": b, "x.weight": np.full((3, 2), a[0, 0])},
        )


def test_another_checkpoint_is_an_error():
    other = {name: x + 1 for name, x in decoder().items()}
    with pytest.raises(ValueError, match=r"none of the 32 weights.*has the values.*embed_tokens"):
        peft.match(linen(decoder()), other)


class Files:
    """A checkpoint on disk: in one file, in several, and alone."""

    def __init__(self, folder: Path, tensors: dict[str, np.ndarray]) -> None:
        self.single, self.sharded = folder / "single", folder / "sharded"
        self.single.mkdir()
        self.sharded.mkdir()
        save_file(tensors, self.single / "model.safetensors")
        items, where = list(tensors.items()), {}
        for n in range(2):
            name = f"model-{n}.safetensors"
            save_file(dict(items[n::2]), self.sharded / name)
            where |= {key: name for key, _ in items[n::2]}
        index = {"weight_map": where}
        (self.sharded / "model.safetensors.index.json").write_text(json.dumps(index))


def test_checkpoints_on_disk(tmp_path):
    tensors = {k: np.asarray(jnp.asarray(x, jnp.bfloat16)) for k, x in decoder().items()}
    params, want = linen(tensors), peft.match(linen(tensors), tensors)
    files = Files(tmp_path, tensors | {"position_ids": np.arange(5)})
    save_file({"other": np.ones(3)}, files.single / "consolidated.safetensors")
    for place in (files.single, str(files.sharded), files.single / "model.safetensors"):
        assert peft.match(params, place) == want
    (files.single / "model.safetensors").rename(files.single / "weights.safetensors")
    assert peft.match(params, files.single) == want


def test_one_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    tensors = decoder()
    files = Files(tmp_path, tensors)
    reads: list[int] = []
    own = np.fromfile
    monkeypatch.setattr(
        np, "fromfile", lambda f, t, n, **k: (reads.append(n), own(f, t, n, **k))[1]
    )
    peft.match(linen(tensors), files.sharded)
    assert len(reads) == 2 * len(tensors) and max(reads) == 4 * VOCAB * WIDTH


def damaged(folder: Path) -> dict[str, tuple[Path, Any, str]]:
    whole = (folder / "single" / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")

    def write(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    def header(entry: dict[str, Any]) -> bytes:
        text = json.dumps({"a": entry}).encode()
        return len(text).to_bytes(8, "little") + text + bytes(16)

    huge = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}
    index = folder / "bad"
    index.mkdir()
    (index / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    gone = folder / "gone"
    gone.mkdir()
    (gone / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    pickle = folder / "pickle"
    pickle.mkdir()
    (pickle / "pytorch_model.bin").write_bytes(b"")
    far = {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}
    return {
        "cut": (write("cut", whole[: length // 2]), ValueError, "a header of"),
        "short": (write("short", whole[:-4]), ValueError, "reaches beyond the file"),
        "huge": (write("huge", header(huge)), ValueError, "16 bytes for"),
        "negative": (
            write("neg", header(huge | {"shape": [-1, -4]})),
            ValueError,
            "reaches beyond",
        ),
        "far": (write("far", header(far)), ValueError, "reaches beyond the file"),
        "no_json": (
            write("json", b"\3" + bytes(7) + b"abc"),
            ValueError,
            "not a complete safetensors",
        ),
        "list": (write("list", b"\2" + bytes(7) + b"[]"), ValueError, "not a complete safetensors"),
        "index": (index, ValueError, "index.json cannot be read: a file outside"),
        "gone": (gone, FileNotFoundError, 'names "x.safetensors", which does not exist'),
        "none": (folder / "nowhere", FileNotFoundError, "there is no model.safetensors"),
        "pickle": (pickle, FileNotFoundError, "pytorch_model.bin is a pickle"),
    }


@pytest.mark.parametrize(
    "case", "cut short huge negative far no_json list index gone none pickle".split()
)
def test_damaged_checkpoints(case, tmp_path):
    Files(tmp_path, decoder())
    place, kind, said = damaged(tmp_path)[case]
    with pytest.raises(kind, match=said):
        peft.match(linen(decoder()), place)


def test_arguments_of_another_type():
    params, tensors = linen(decoder()), decoder()
    with pytest.raises(TypeError, match="the checkpoint is a list"):
        peft.match(params, list(tensors))
    with pytest.raises(TypeError, match='"a" of the checkpoint is a str'):
        peft.match(params, {"a": "b"})
    with pytest.raises(TypeError, match="is a shape without values"):
        peft.match(jax.eval_shape(lambda: params), tensors)
    with pytest.raises(KeyError, match='`names` has "embed", which is no parameter'):
        peft.match(params, tensors, names={"embed": None})


@pytest.mark.sample(2)
@pytest.mark.parametrize("make", [linen, stacked])
def test_an_adapter_loads_by_what_is_found(make, tmp_path):
    """As by names written by hand; saved, it has PEFT's names."""
    tensors = decoder()
    params = make(tensors)
    names, layouts = peft.match(params, tensors)
    rules = {r".*/(q|o|up|down)/kernel": LoraSpec(2, alpha=3)}
    adapted = jlora.attach(params, rules, key=jax.random.key(0), layouts=layouts)
    adapted = jax.tree.map(lambda x: x + 0.1, adapted)  # B is no longer zero, nor is the base W
    base = jlora.detach(adapted)[0]
    assert peft.match(jlora.attach(params, rules, key=jax.random.key(0), layouts=layouts), tensors)
    peft.save(tmp_path, adapted, names=names)
    loaded = peft.load(tmp_path, base, names=names, layouts=layouts)
    jax.tree.map(np.testing.assert_array_equal, jlora.merge(loaded), jlora.merge(adapted))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 4 * LAYERS
    chosen = peft.rules(tmp_path, params, names=names, layouts=layouts)
    assert len(chosen) == (4 if make is stacked else 4 * LAYERS)


def test_a_flax_module(tmp_path):
    model = nn.Sequential([nn.Dense(7), nn.Conv(5, (3, 3)), nn.Dense(6)])
    params = model.init(jax.random.key(0), jnp.ones((1, 4, 4, 6)))["params"]
    dense = [np.asarray(params[f"layers_{k}"]["kernel"]) for k in (0, 1, 2)]
    tensors = {
        "0.weight": dense[0].T.copy(),
        "1.weight": dense[1].transpose(3, 2, 0, 1).copy(),
        "2.weight": dense[2].T.copy(),
    }
    tensors |= {f"{k}.bias": np.zeros(n, np.float32) for k, n in ((0, 7), (1, 5), (2, 6))}
    save_file(tensors, tmp_path / "model.safetensors")
    names, layouts = peft.match(params, tmp_path)
    assert names == {
        f"layers_{k}/{ours}": f"{k}.{theirs}"
        for k in range(3)
        for ours, theirs in (("bias", "bias"), ("kernel", "weight"))
    }
    assert list(layouts.values()) == ["io", "iiio", "io"]
