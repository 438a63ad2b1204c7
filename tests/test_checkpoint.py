"""Adapters on disk: exact, self-describing, refused where they do not fit, never half-written."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jlora
from jlora import _disk, checkpoint


def base(d: int = 11):
    return {
        "dense": {"kernel": jnp.arange(float(d * 7)).reshape(d, 7), "bias": jnp.arange(7.0)},
        "stack": jnp.ones((3, 5, 4), jnp.bfloat16),
    }


def adapted(d: int = 11, rank: int = 2):
    rules = {
        r"dense/kernel": jlora.LoraSpec(rank, init=jlora.initializers.gaussian),
        "dense/bias": "full",
        "stack": jlora.LoraSpec(2, alpha=5, layout="oi", dtype=jnp.bfloat16),
    }
    return jlora.attach(base(d), rules, key=jax.random.key(3))


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, x in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(g, np.float64), np.asarray(x, np.float64))


def test_save_and_restore_are_exact(tmp_path):
    params = adapted()
    checkpoint.save(tmp_path / "a", params)
    weights = base()
    got = checkpoint.restore(tmp_path / "a", weights)
    same(got, params)
    assert got["dense"]["kernel"].base is weights["dense"]["kernel"]


def test_a_detached_adapter_saves_the_same(tmp_path):
    params = adapted()
    checkpoint.save(tmp_path / "a", jlora.detach(params)[1])
    same(checkpoint.restore(tmp_path / "a", params), params)


def test_saving_again_replaces_and_leaves_nothing_beside(tmp_path):
    checkpoint.save(tmp_path / "a", adapted(rank=1))
    checkpoint.save(tmp_path / "a", adapted(rank=3))
    assert checkpoint.restore(tmp_path / "a", base())["dense"]["kernel"].rank == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_base_is_not_in_the_files(tmp_path):
    big = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
    checkpoint.save(
        tmp_path / "a", jlora.attach(big, {"w": jlora.LoraSpec(1)}, key=jax.random.key(0))
    )
    size = sum(p.stat().st_size for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert size < 100_000 < 512 * 512 * 4


def test_a_new_checkpoint_has_the_permissions_of_any_new_folder(tmp_path):
    checkpoint.save(tmp_path / "a", adapted())
    (tmp_path / "b").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(("half", "name"), [(0, "scaling"), (1, "lora_a")])
def test_half_of_an_adapter_is_refused(tmp_path, half, name):
    part = jlora.partition(adapted())[half]["stack"]
    with pytest.raises(ValueError, match=rf'the {name} of "w" is missing.*jlora.combine'):
        checkpoint.save(tmp_path / "a", {"w": part})
    with pytest.raises(ValueError, match=r'the value of "w" is missing'):
        checkpoint.save(tmp_path / "a", {"w": jlora.FullArray(jnp.ones(3), None)})
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a", adapted())

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(_disk, "_exchange", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path / "a", adapted(rank=3))
    assert checkpoint.restore(tmp_path / "a", base())["dense"]["kernel"].rank == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failure_between_the_renames_puts_the_old_one_back(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a", adapted())
    rename, calls = pathlib.Path.rename, []

    def broken(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", broken)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path / "a", adapted(rank=3))
    assert checkpoint.restore(tmp_path / "a", base())["dense"]["kernel"].rank == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_stays_one(tmp_path):
    checkpoint.save(tmp_path / "run5", adapted())
    (tmp_path / "latest").symlink_to(tmp_path / "run5")
    checkpoint.save(tmp_path / "latest", adapted(rank=3))
    assert (tmp_path / "latest").is_symlink()
    assert checkpoint.restore(tmp_path / "run5", base())["dense"]["kernel"].rank == 3


def test_a_file_and_the_current_folder_are_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="this is a file"):
        checkpoint.save(tmp_path / "file", adapted())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="this is the current directory"):
        checkpoint.save(".", adapted())
    assert (tmp_path / "file").read_text() == "mine" and pathlib.Path.cwd().exists()


def test_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing in `params` is adapted"):
        checkpoint.save(tmp_path / "a", base())
    with pytest.raises(FileNotFoundError, match=r"this is not a checkpoint of jlora"):
        checkpoint.restore(tmp_path / "a", base())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"contains other files"):
        checkpoint.save(tmp_path / "mine", adapted())
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a", adapted())
    with pytest.raises(ValueError, match=r'do not fit "dense/kernel" float32\[13,7\]'):
        checkpoint.restore(tmp_path / "a", base(13))
    other = {"dense_0": base()["dense"], "stack": base()["stack"]}
    with pytest.raises(ValueError, match=r'the first "dense/bias".*Closest: "dense_0/bias"'):
        checkpoint.restore(tmp_path / "a", other)


@pytest.mark.parametrize("text", ["", "[]", '{"leaves": 3}', '{"leaves": {"w": {"kind": "x"}}}'])
def test_a_damaged_index_is_refused(tmp_path, text):
    checkpoint.save(tmp_path / "a", adapted())
    (tmp_path / "a" / "jlora.json").write_text(text)
    with pytest.raises(ValueError, match=r"jlora.json is not what `jlora.checkpoint.save` writes"):
        checkpoint.restore(tmp_path / "a", base())


def test_damaged_arrays_are_refused(tmp_path):
    checkpoint.save(tmp_path / "a", adapted())
    for file in (tmp_path / "a" / "arrays").rglob("*"):
        if file.is_file() and file.name != "_CHECKPOINT_METADATA":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"the arrays cannot be read"):
        checkpoint.restore(tmp_path / "a", base())


def test_missing_arrays_are_refused(tmp_path):
    checkpoint.save(tmp_path / "a", adapted())
    index = tmp_path / "a" / "jlora.json"
    content = json.loads(index.read_text().replace('"leaf": "1"', '"leaf": "9"'))
    del content["sha256"], content["arrays"]  # as an index had none at first
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r'the arrays of "dense/kernel" are missing'):
        checkpoint.restore(tmp_path / "a", base())


def version_1(folder, parts, frozen=(), tied=None, **entry):
    """Write one node as version 1 did: `frozen` in the index, and fields that forms have since."""
    entry = {"kind": "lora", "layout": "io", "slices": None, "residual": False, **entry}
    entry |= {"frozen": list(frozen), "tied": tied or {}, "leaf": "0"}
    folder.mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / "arrays", {"0": parts})
    index = {"version": 1, "leaves": {"w": entry}}
    (folder / "jlora.json").write_text(json.dumps(index, indent=2))


def drawn(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


BOTH = ("lora_a", "lora_b")
OLD = {
    "lora": ((), {}, {}),
    "lora_fa": (("lora_a",), {}, {}),
    "mica": (("lora_b",), {}, {}),
    "lora_xs": (BOTH, {"core": drawn(2, 2)}, {"core": "core"}),
    "vera": (
        BOTH,
        {"core": drawn(2), "lambda_b": drawn(7)},
        {"core": "lambda_d", "lambda_b": "lambda_b"},
    ),
    "adalora": ((), {"core": drawn(2)}, {"core": "singular_values"}),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("form", OLD)
def test_a_checkpoint_of_version_1(tmp_path, form, dora):
    """What was saved before forms had names restores exactly, and is saved as it is now."""
    frozen, parts, now = OLD[form]
    parts = {**parts, **({"magnitude": drawn(7) ** 2} if dora else {})}
    factors = {"lora_a": drawn(11, 2), "lora_b": drawn(2, 7), "scaling": jnp.float32(1.5)}
    version_1(tmp_path / "old", {**factors, **parts}, frozen)
    weights = {"w": drawn(11, 7)}
    got = checkpoint.restore(tmp_path / "old", weights)
    assert got["w"].form == form and jlora.merge(got)["w"].shape == (11, 7)
    assert set(got["w"].extra) == {*now.values(), *(["magnitude"] if dora else [])}
    for name, x in parts.items():
        np.testing.assert_array_equal(got["w"].extra[now.get(name, name)], x)
    for name, x in factors.items():
        np.testing.assert_array_equal(getattr(got["w"], name), x)
    words = jlora.labels(got)["w"].parts
    assert {name for name, word in words.items() if word == "frozen"} == {*frozen}
    checkpoint.save(tmp_path / "new", got)
    assert json.loads((tmp_path / "new" / "jlora.json").read_text())["version"] == 2
    same(checkpoint.restore(tmp_path / "new", weights), got)


def test_a_checkpoint_of_version_1_over_a_residual_in_slices(tmp_path):
    parts = {"lora_a": drawn(11, 4), "lora_b": drawn(2, 5), "scaling": jnp.float32(1.5)}
    version_1(tmp_path / "a", parts, slices=[[0, 3], [4, 6]], residual=True)
    weights = jlora.attach(
        {"w": drawn(11, 7)},
        {"w": jlora.LoraSpec(2, init=jlora.initializers.pissa)},
        key=jax.random.key(0),
    )
    got = checkpoint.restore(tmp_path / "a", weights)["w"]
    assert got.slices == ((0, 3), (4, 6)) and got.residual and got.form == "lora"
    np.testing.assert_array_equal(got.lora_b, parts["lora_b"])


def test_what_no_form_freezes_is_refused(tmp_path):
    parts = {"lora_a": drawn(11, 2), "lora_b": drawn(2, 7), "scaling": jnp.float32(1.5)}
    version_1(tmp_path / "a", parts, BOTH)
    with pytest.raises(ValueError, match=r"no form freezes \('lora_a', 'lora_b'\) of \"w\""):
        checkpoint.restore(tmp_path / "a", {"w": drawn(11, 7)})


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('"form": "lora"', '"form": "elsewhere"', r"restore.*there is no form 'elsewhere'"),
        ('"form": "lora"', '"form": "vera"', r'the arrays of "dense/kernel" are missing'),
        ('"version": 2', '"version": 3', r"jlora.json is not what .* writes \('version 3'\)"),
    ],
)
def test_another_form_or_version_is_refused(tmp_path, old, new, match):
    checkpoint.save(tmp_path / "a", adapted())
    index = tmp_path / "a" / "jlora.json"
    content = json.loads(index.read_text().replace(old, new))
    del content["sha256"]
    index.write_text(_disk.seal(content))  # as another release would write it
    with pytest.raises(ValueError, match=match):
        checkpoint.restore(tmp_path / "a", base())
