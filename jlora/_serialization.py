"""Nodes in the formats of others: state dicts of Flax, and `jax.export`.

Pickle, `copy` and `json` of a `LoraSpec` need no code. Flax is not imported here: its table of
types is filled as soon as Flax is loaded and a node is made (see `register_with_flax`).
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import PyTree

from jlora._base import is_stored

STATIC = "static"
_KINDS: dict[type, tuple[str, ...]] = {}


def register(
    kind: type, static: Sequence[str] = (), decode: Callable[[Any], Any] = lambda values: values
) -> None:
    """Let `jax.export` and Flax serialize a dataclass that is a pytree node.

    Args:
        kind: the class.
        static: the fields that are no leaves, in the order of the node's auxiliary data.
        decode: makes the auxiliary data of what JSON keeps of it.
    """
    _KINDS[kind] = tuple(static)
    leaves = len(static) < len(dataclasses.fields(kind))

    def write(auxiliary: Any) -> bytes:
        values = auxiliary
        if isinstance(auxiliary, kind):  # a node without leaves is its own auxiliary data
            values = [getattr(auxiliary, name) for name in static]
        return json.dumps(values, default=_plain).encode()

    def read(data: bytes | bytearray) -> Any:
        values = decode(_tuples(json.loads(bytes(data))))
        return values if leaves else kind(*values)

    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"jlora.{kind.__name__}",
        serialize_auxdata=write,
        deserialize_auxdata=read,
    )
    register_with_flax()


def register_with_flax() -> None:
    """Add the nodes to the table of `flax.serialization`, if that is loaded.

    Every node calls this when it is made. Importing Flax would make `import jlora` slow for
    programs that do without it, and a hook on the import of modules would be global state.
    """
    flax: Any = sys.modules.get("flax.serialization")
    enter = getattr(flax, "register_serialization_state", None)  # None while Flax is loading
    # All are entered at once, so the newest one tells for all: thousands of nodes ask.
    if enter is not None and not flax.is_serializable(next(reversed(_KINDS))):
        for kind in [kind for kind in _KINDS if not flax.is_serializable(kind)]:
            enter(kind, _state_dict, _from_state_dict)


def _plain(format: Any) -> Any:
    """Return what JSON keeps of a storage format: see `jlora.quant.Format`."""
    return [format.name, format.settings]


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def _fields(node: Any) -> tuple[list[str], str]:
    """Return the names of the fields that are leaves, and the others as JSON."""
    static = _KINDS[type(node)]
    names = [f.name for f in dataclasses.fields(node) if f.name not in static]
    return names, json.dumps({name: getattr(node, name) for name in static}, default=_plain)


def _state_dict(node: Any) -> dict[str, Any]:
    """Return the parts by name; what is static is one string."""
    flax = sys.modules["flax.serialization"]
    names, static = _fields(node)

    def part(x: PyTree) -> Any:
        if is_stored(x) and type(x) not in _KINDS:
            return {str(k): leaf for k, leaf in enumerate(jax.tree.leaves(x))}
        return flax.to_state_dict(x)

    return {STATIC: static, **{name: part(getattr(node, name)) for name in names}}


def _from_state_dict(node: Any, state: Any) -> Any:
    """Return the node with the parts of a state dict; refuse those of another node."""
    flax = sys.modules["flax.serialization"]
    call = "flax.serialization.from_state_dict(target, state)"
    where, (names, static) = f'"{flax.current_path()}"', _fields(node)
    kind = type(node).__name__
    if not isinstance(state, dict) or set(state) != {STATIC, *names}:
        raise ValueError(
            f"`{call}`: {where} of `target` is a `{kind}`, but that of `state` is not. Build the "
            "target as when the state was saved: `jlora.attach` with the same rules."
        )
    if state[STATIC] != static:
        raise ValueError(
            f"`{call}`: {where} of `target` is a `{kind}` with {static}, but that of `state` has "
            f"{state[STATIC]}. Build the target with the same rules, `jlora.attach`."
        )

    def part(name: str) -> Any:
        like, saved = getattr(node, name), state[name]
        leaves, tree = jax.tree.flatten(like)
        if is_stored(like) and type(like) not in _KINDS and isinstance(saved, dict):
            saved = tree.unflatten([saved.get(str(k)) for k in range(len(leaves))])
        elif not isinstance(like, dict) or set(like) == set(saved):  # Flax drops what is not there
            saved = flax.from_state_dict(like, saved, name=name)
        want, got = _shapes(like), _shapes(saved)
        if want != got:
            raise ValueError(
                f"`{call}`: the {name} of {where} has {want} in `target` and {got} in `state`. "
                "The state is that of another model, or was saved with another rank or form."
            )
        return saved

    return dataclasses.replace(node, **{name: part(name) for name in names})


def _shapes(part: PyTree) -> Any:
    """Return the shapes of the leaves, as text."""
    leaves = jax.tree_util.tree_leaves_with_path(part)
    shapes = [(jax.tree_util.keystr(path), tuple(np.shape(x))) for path, x in leaves]
    return ", ".join(f"{path} {shape}".strip() for path, shape in shapes) or "nothing"
