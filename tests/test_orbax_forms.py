"""Adapted trees that Orbax itself saves and restores: exact, or refused in another form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jlora
from jlora import LoraSpec

SPECS = {
    "plain": LoraSpec(2, init=jlora.initializers.uniform),
    "dora": LoraSpec(2, init=jlora.initializers.uniform, dora=True),
    "lora_xs": LoraSpec(2, form="lora_xs"),
    "vera": LoraSpec(2, form="vera"),
}


def tree(name, seed):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    return jlora.attach({"w": weight}, {"w": SPECS[name]}, key=jax.random.key(seed))


def restored(folder, saved, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "x", saved)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "x", target)


@pytest.mark.parametrize("name", SPECS)
def test_orbax_restores_the_same_form(name, tmp_path):
    saved = tree(name, 0)
    got = restored(tmp_path, saved, tree(name, 1))
    assert jax.tree.structure(got) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, got, saved)


@pytest.mark.parametrize(("saved", "target"), list(itertools.permutations(SPECS, 2)))
def test_orbax_refuses_another_form(saved, target, tmp_path):
    """No part is left out in silence: a magnitude, say, that the target does not have."""
    with pytest.raises(ValueError, match="structures do not match"):
        restored(tmp_path, tree(saved, 0), tree(target, 1))
