"""Damaged files, at random: they load right, or end in a ValueError."""

import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_cases import PREFIX, SMALL_NAMES, base, entries, load, tensors, write

from jlora import LoraArray, merge, peft


def good_files(folder: Path) -> tuple[bytes, str]:
    write(folder, tensors(), entries(target_modules=["q_proj", "k_proj"], alpha_pattern={"q.*": 5}))
    file, text = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    return file.read_bytes(), text.read_text()


edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 8)),
    max_size=4,
)


def damaged(content: bytes, edits, keep: float) -> bytes:
    for where, new, cut in edits:
        at = int(where * len(content))
        content = content[:at] + new + content[at + cut :]
    return content[: int(keep * len(content))]


@settings(max_examples=150, deadline=None)
@given(in_header=edits, in_config=edits, keep=st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5]))
def test_damaged_files_load_right_or_not_at_all(in_header, in_config, keep):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, config = good_files(folder)
        weights = damaged(weights, in_header, keep)
        config = damaged(config.encode(), in_config, 1.0)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_bytes(config)
        try:
            got = load(folder)
        except ValueError:
            return
        # What was read is what the files still say.
        found, says_ = safetensors.numpy.load(weights), json.loads(config)
        for leaf, module in (("q", "m.q_proj"), ("k", "m.k_proj")):
            node = got[leaf]["kernel"]
            if not isinstance(node, LoraArray):
                assert not any(module in key for key in found)
                continue
            a = np.asarray(node.lora_a)
            assert a.T.tobytes() == found[f"{PREFIX}{module}.lora_A.weight"].tobytes()
            alphas = {says_.get("lora_alpha", 8), *says_.get("alpha_pattern", {}).values()}
            scalings = {np.float32(x / node.rank) for x in alphas}
            scalings |= {np.float32(x / node.rank**0.5) for x in alphas}
            assert np.float32(node.scaling) in scalings


sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 18, 24]), min_size=0, max_size=5)
FORMS = {
    "conv": (("m.c.lora_A.weight", "m.c.lora_B.weight"), "m.c.weight", (3, 3, 4, 8)),
    "loralib_conv": (("m.c.lora_A", "m.c.lora_B"), "m.c.conv.weight", (3, 3, 2, 8)),
    "loralib": (("m.c.lora_A", "m.c.lora_B"), "m.c.weight", (4, 8)),
}
# Shapes that fit, for a mutation of one size to be near.
FITTING = {
    "conv": [((4, 4, 3, 3), (8, 4, 1, 1)), ((4, 4, 3, 3), (8, 2, 1, 1))],
    "loralib_conv": [((6, 6), (24, 6)), ((6, 12), (12, 6))],
    "loralib": [((2, 4), (8, 2)), ((4, 4), (8, 2))],
}


@st.composite
def two_shapes(draw):
    form = draw(st.sampled_from(sorted(FORMS)))
    if draw(st.booleans()):
        return form, *map(tuple, draw(st.tuples(sizes, sizes)))
    shapes = [list(x) for x in draw(st.sampled_from(FITTING[form]))]
    which = draw(st.sampled_from(shapes))
    which[draw(st.integers(0, len(which) - 1))] = draw(st.sampled_from([0, 1, 2, 4, 6, 12, 24]))
    return form, *map(tuple, shapes)


@settings(max_examples=150, deadline=None)
@given(two_shapes(), st.sampled_from([2, 4, 10**9]))
def test_any_shapes_are_read_or_refused(shapes, rank):
    form, a, b = shapes
    keys, name, shape = FORMS[form]
    with tempfile.TemporaryDirectory() as folder:
        file = {k: np.ones(x, np.float32) for k, x in zip(keys, (a, b), strict=True)}
        folder = write(Path(folder), {PREFIX + k: x for k, x in file.items()}, entries(r=rank))
        if form != "conv":
            (folder / "adapter_config.json").unlink()
        try:
            got = peft.load(folder, {"w": np.ones(shape, np.float32)}, names={"w": name}, alpha=1)
        except ValueError:
            return
        merged = np.asarray(merge(got)["w"])
        assert merged.shape == shape and np.isfinite(merged).all() and (merged > 1).any()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = (
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora target_modules target_parameters "
    "exclude_modules layers_to_transform layers_pattern modules_to_save bias init_lora_weights "
    "task_type use_dora anything"
).split()


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3))
def test_any_json_is_read_or_refused(changes):
    with tempfile.TemporaryDirectory() as name:
        config = entries(target_modules=["q_proj"]) | changes
        folder = write(Path(name), tensors(), config)
        for use in (lambda: load(folder), lambda: peft.rules(config, base(), names=SMALL_NAMES)):
            try:
                use()
            except ValueError:
                continue
