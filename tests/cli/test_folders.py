"""The verbs on PEFT folders: combine, resize, inspect; read back as PEFT's files."""

import functools
import json

import matplotlib.image
import numpy as np
import pytest
from checkpoints import (
    TARGETS,
    UP,
    VOCAB,
    D,
    adapter,
    checkpoint,
    drawn,
    pair,
    q_and_up,
    read,
    run,
    tensors_of,
    update,
)

Q = "model.layers.1.self_attn.q_proj"


def delta(folder, module, embedding=False):
    """What a folder adds, by its own files, in PyTorch's orientation."""
    tensors = read(folder)
    said = json.loads((folder / "adapter_config.json").read_text())
    kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
    a, b = (np.float64(tensors[f"base_model.model.{module}.{kind.format(x)}"]) for x in "AB")
    r = said.get("rank_pattern", {}).get(module, said["r"])
    assert r == len(a)
    s = said.get("alpha_pattern", {}).get(module, said["lora_alpha"]) / r
    return s * b.reshape(len(b), -1) @ a.reshape(len(a), -1)


def far(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.fixture
def two(tmp_path):
    """One of q and up; another of up and an embedding, with rsLoRA and other ranks."""
    one = adapter(tmp_path / "one", q_and_up(), base_model_name_or_path="smol", **TARGETS)
    lora = pair(UP, 12, D, 3, seed=5)
    lora["model.embed_tokens.lora_embedding_A"] = drawn((3, VOCAB), seed=6)
    lora["model.embed_tokens.lora_embedding_B"] = drawn((D, 3), seed=7)
    said = {"r": 3, "use_rslora": True, "target_modules": ["layers.0.mlp.up_proj", "embed_tokens"]}
    return one, adapter(tmp_path / "other", lora, **said)


def wanted():
    """The sum 0.5 one - 2 other, of three weights."""
    other = pair(UP, 12, D, 3, seed=5)
    embedding = np.float64(drawn((D, 3), seed=7)) @ np.float64(drawn((3, VOCAB), seed=6))
    s = 6 / np.sqrt(3)
    up = 0.5 * 3 * np.float64(update(q_and_up(), UP, 1.0)) - 2 * s * update(other, UP, 1.0)
    return {UP: up, Q: 1.5 * np.float64(update(q_and_up(), Q, 1.0)), "e": -2 * s * embedding}


def test_combine_adds(tmp_path, two, capsys):
    one, other = two
    run("combine", f"{one}=0.5", f"{other}=-2", tmp_path / "sum", "--json")
    want = wanted()
    assert far(delta(tmp_path / "sum", UP), want[UP]) < 1e-6
    assert far(delta(tmp_path / "sum", Q), want[Q]) < 1e-6
    assert far(delta(tmp_path / "sum", "model.embed_tokens", True), want["e"]) < 1e-6
    said = json.loads((tmp_path / "sum/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "smol" and not said["use_rslora"]
    report = json.loads(capsys.readouterr().out)
    assert report["weights"] == 5 and report["ranks"].endswith("-> 2 to 5 (mean 2.8)")
    # The sum merges to what both merge to.
    base = checkpoint(tmp_path / "base", tensors_of(dtype=np.float32))
    run("merge", base, tmp_path / "sum", tmp_path / "once")
    run("merge", base, f"{one}=0.5", f"{other}=-2", tmp_path / "both")
    once, both = read(tmp_path / "once"), read(tmp_path / "both")
    for name, x in both.items():
        np.testing.assert_allclose(once[name], x, atol=1e-5)


night = functools.partial(pytest.param, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    "words",
    [
        ["add", "--rank", "2"],
        ["ties", "--density", "1", "--rank", "4"],
        night(["dare", "--density", "0.9", "--rank", "4", "--seed", "3", "--elect"]),
        night(["magnitude", "--density", "1", "--rank", "8"]),
        night(["della", "--density", "0.5", "--epsilon", "0.1", "--rank", "4"]),
        night(["breadcrumbs", "--density", "0.5", "--outliers", "0.1", "--rank", "4"]),
        night(["knots", "--density", "0.5"]),
    ],
    ids=lambda words: words[0],
)
def test_methods(tmp_path, words):
    said = {"target_modules": ["up_proj"]}
    one = adapter(tmp_path / "one", pair(UP, 12, D), **said)
    other = adapter(tmp_path / "other", pair(UP, 12, D, 3, seed=5), r=3, use_rslora=True, **said)
    run("combine", f"{one}=0.5", f"{other}=-2", tmp_path / "out", "--method", *words)
    got = delta(tmp_path / "out", UP)
    assert got.shape == (12, D) and np.linalg.norm(got) > 0
    want = 0.5 * delta(one, UP) - 2 * np.sqrt(3) * delta(other, UP)  # of which r is read as r
    if words[0] == "magnitude":
        assert far(got, want) < 1e-5
    if words[0] == "add":
        u, s, vt = np.linalg.svd(want)
        assert far(got, (u[:, :2] * s[:2]) @ vt[:2]) < 1e-5


@pytest.mark.nightly
def test_sce_and_slerp_choose_the_weights(tmp_path, two):
    run("combine", *two, tmp_path / "sce", "--method", "sce", "--rank", "4")
    assert np.linalg.norm(delta(tmp_path / "sce", UP)) > 0
    run("combine", f"{two[0]}=0.7", f"{two[1]}=0.3", tmp_path / "arc", "--method", "slerp")
    want = 0.7 * 3 * np.float64(update(q_and_up(), Q, 1.0))
    assert far(delta(tmp_path / "arc", Q), want) < 1e-6


def test_resize(tmp_path, capsys):
    lora = pair(UP, 12, D, 4) | {
        "conv.lora_A.weight": drawn((4, 3, 3, 3)),
        "conv.lora_B.weight": drawn((6, 4, 1, 1)),
        "model.norm.weight": drawn(D),
    }
    said = {"r": 4, "target_modules": ["up_proj", "conv"], "modules_to_save": ["norm"]}
    path = adapter(tmp_path / "lora", lora, **said)
    run("resize", path, tmp_path / "small", "--rank", 2)
    for module in (UP, "conv"):
        full = (
            1.5
            * lora[f"{module}.lora_B.weight"].reshape(-1, 4)
            @ lora[f"{module}.lora_A.weight"].reshape(4, -1)
        )
        u, s, vt = np.linalg.svd(np.float64(full), full_matrices=False)
        assert far(delta(tmp_path / "small", module), (u[:, :2] * s[:2]) @ vt[:2]) < 1e-5
    got = read(tmp_path / "small")
    assert got["base_model.model.conv.lora_A.weight"].shape == (2, 3, 3, 3)
    norm = got["base_model.model.model.norm.weight"]
    np.testing.assert_array_equal(norm, lora["model.norm.weight"])
    assert "ranks: 4 -> 2" in capsys.readouterr().out
    run("resize", path, tmp_path / "exact", "--energy", 1.0, "--dtype", "float16", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["norm kept"] == {f"{UP}.weight": 1.0, "conv.weight": 1.0}
    assert {x.dtype for x in read(tmp_path / "exact").values()} == {np.dtype(np.float16)}


def test_inspect(tmp_path, two, capsys):
    base = tensors_of()
    folder = checkpoint(tmp_path / "base", base)
    run("inspect", two[1], "--base", folder, "--json")
    rows = json.loads(capsys.readouterr().out)["weights"]
    up = rows[f"{UP}.weight"]
    s = 6 / np.sqrt(3)
    full = s * np.float64(update(pair(UP, 12, D, 3, seed=5), UP, 1.0))
    norm = np.linalg.norm(full)
    w = np.linalg.norm(np.float64(np.float32(base[f"{UP}.weight"])))
    np.testing.assert_allclose([up["norm"], up["relative"]], [norm, norm / w], rtol=1e-5)
    values = np.linalg.svd(full, compute_uv=False)[:3]
    np.testing.assert_allclose(up["singular_values"], values, rtol=1e-5)
    assert up["rank"] == 3 and up["intruders"] >= 0
    run("inspect", two[0])
    text = capsys.readouterr().out
    assert "effective_rank" in text and "relative" not in text and "4 weights, norm" in text


def test_inspect_a_conv1d(tmp_path, capsys):
    """Its weight is (in, out), square or not."""
    base = tensors_of({"h.0.c_attn.weight": (D, 3 * D), "h.0.c_proj.weight": (D, D)}, np.float32)
    lora = pair("transformer.h.0.c_attn", 3 * D, D) | pair("transformer.h.0.c_proj", D, D)
    said = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}
    path = adapter(tmp_path / "lora", lora, **said)
    folder = checkpoint(tmp_path / "base", base)
    run("inspect", path, "--base", folder, "--json", "--top", 3, "--threshold", 0.95)
    rows = json.loads(capsys.readouterr().out)["weights"]
    for name in ("c_attn", "c_proj"):
        w = np.float64(base[f"h.0.{name}.weight"]).T
        new = w + update(lora, f"transformer.h.0.{name}")
        old, ours = (np.linalg.svd(x, full_matrices=False)[0] for x in (w, new))
        want = (np.abs(ours[:, :3].T @ old).max(1) < 0.95).sum()
        assert rows[f"transformer.h.0.{name}.weight"]["intruders"] == want


def test_whole_tensors_are_listed(tmp_path, capsys):
    path = adapter(tmp_path / "a", {"model.norm.weight": drawn(D)}, modules_to_save=["norm"])
    run("inspect", path)
    assert "model.norm.weight" in capsys.readouterr().out
    folder = checkpoint(tmp_path / "base", {"model.norm.weight": drawn(D, seed=1)})
    run("inspect", path, "--base", folder)
    assert "relative" in capsys.readouterr().out


def tokens(tmp_path):
    tensors = {"model.embed_tokens.token_adapter.trainable_tokens_delta": drawn((1, D))}
    return adapter(tmp_path / "t", tensors, trainable_token_indices=[3])


REFUSED = {
    "tokens": (lambda t, one: ["resize", tokens(t), t / "o", "--rank", 1], "has trainable tokens"),
    "needs": (
        lambda t, one: ["combine", one, one, t / "o", "--method", "ties", "--rank", 1],
        "--method ties needs `--density`",
    ),
    "unused": (
        lambda t, one: ["combine", one, one, t / "o", "--density", 0.5],
        "--method add does not use `--density`",
    ),
    "slerp": (
        lambda t, one: ["combine", one, f"{another(t)}=0.5", t / "o", "--method", "slerp"],
        "two adapters whose weights add up to 1",
    ),
    "sce": (
        lambda t, one: [
            *("combine", one, f"{another(t)}=0.5", t / "o"),
            *("--method", "sce", "--rank", 1),
        ],
        "sce computes the weights itself",
    ),
    "whole": (
        lambda t, one: [
            "combine",
            one,
            adapter(t / "w", {"model.norm.weight": drawn(D)}, modules_to_save=["norm"]),
            t / "o",
        ],
        'w has "model.norm.weight" whole',
    ),
    "base": (
        lambda t, one: [
            "inspect",
            one,
            "--base",
            checkpoint(t / "b", {f"{UP}.weight": drawn((12, D))}),
        ],
        'the weights of "model.layers.0.self_attn.q_proj.weight" cannot be read from BASE: there',
    ),
    "codes": (
        lambda t, one: [
            "inspect",
            one,
            "--base",
            checkpoint(t / "b", {k: np.ones(x.shape, np.int8) for k, x in tensors_of().items()}),
        ],
        "cannot be read from BASE: they are I8, quantized",
    ),
    "twice": (
        lambda t, one: ["combine", one, f"{one}=0.5", t / "o"],
        "is given twice. Give it once, with the sum of its weights",
    ),
    "nan": (
        lambda t, one: [
            *("resize", adapter(t / "w", {"a.lora_A.weight": np.full(D, np.inf, np.float32)})),
            *(t / "o", "--rank", 1),
        ],
        '"base_model.model.a.lora_A.weight" in w has values that are not finite',
    ),
    "file": (
        lambda t, one: ["inspect", one / "adapter_model.safetensors"],
        "is a file. Pass its folder",
    ),
}


def another(folder):
    return adapter(folder / "another", q_and_up(), **TARGETS)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, two, capsys, case):
    words, said = REFUSED[case]
    run(*words(tmp_path, two[0]), code=2)
    assert said in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.mark.parametrize("verb", ["combine", "resize", "extract"])
def test_dry_runs_write_nothing(tmp_path, two, capsys, verb):
    base = checkpoint(tmp_path / "base", tensors_of())
    moved = {k: x + x for k, x in tensors_of().items()}
    words = {
        "combine": [*two, tmp_path / "out"],
        "resize": [two[0], tmp_path / "out", "--rank", 1],
        "extract": [base, checkpoint(tmp_path / "tuned", moved), tmp_path / "out", "--rank", 1],
    }
    before = sorted(tmp_path.rglob("*"))
    run(verb, *words[verb], "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["written"] == "nothing (--dry-run)"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture(tmp_path, two, capsys):
    """A PNG of all updates, relative to the weights or not."""
    folder = checkpoint(tmp_path / "base", tensors_of())
    for n, more in enumerate(([], ["--base", folder])):
        run("inspect", two[1], *more, "--plot", tmp_path / f"plots/{n}.png", "--json")
        assert json.loads(capsys.readouterr().out)["weights"]
        image = matplotlib.image.imread(tmp_path / f"plots/{n}.png")
        assert image.shape[0] > 300 and image.shape[1] > 1000 and image[..., :3].std() > 0.05
    run("inspect", two[1], "--plot", tmp_path / "a.txt", code=2)
    assert "is no name of a .png file" in capsys.readouterr().err
