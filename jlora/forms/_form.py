"""What a variant of LoRA is: a record of its parts, and the registry of records."""

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jlora._arrays import AXES, Geometry, LoraArray

Factors = tuple[Float[Array, "in rank"], Float[Array, "rank out"]]
# A, B and what is left of the weight, for `base`.
Split = tuple[Float[Array, "in rank"], Float[Array, "rank out"], Float[Array, "in out"]]
Initializer = Callable[..., Factors | Split]
Begin = Callable[[LoraArray, tuple[int, ...], DTypeLike], Array]

_FIELDS = [field.name for field in dataclasses.fields(LoraArray)]


def zeros(node: LoraArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Begin a part as zeros.

    Args:
        node: not read.
        shape: of the part.
        dtype: of the part.

    Returns:
        An array.

    Example:
        >>> zeros(LoraArray(None, None, None, None, "io"), (2,), jnp.float32).tolist()
        [0.0, 0.0]
    """
    return jnp.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of an update.

    Args:
        axes: which of the base's axes it has, in groups: `s` stack, `i` inputs, `o` outputs, and
            `r` the rank. "s r r" is a matrix for each element of the stack, "so" has one number
            per output.
        begin: its first value, a function of the node so far (base, A, B and the parts before
            this one), of the shape and of the dtype.
        frozen: whether it does not train.
        shared: whether several weights may share it; see `jlora.tie`.

    Raises:
        ValueError: axes of other letters, or without the stack's in front.

    Example:
        >>> Part("s r r").frozen
        False
    """

    axes: str
    begin: Begin = zeros
    frozen: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.axes.startswith("s") or set(self.axes) - set("sior "):
            raise ValueError(
                f'`jlora.forms.Part({self.axes!r})`: the axes begin with the stack, "s"; the rest '
                'are "i" (inputs), "o" (outputs) and, apart, "r" (the rank): "si r".'
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """A variant of LoRA: its parts besides A and B, what trains, and the one A and B they make.

    Args:
        name: what `LoraSpec(form=...)` calls it.
        init: begins A and B where the spec has no `init`, as those of `jlora.initializers` do.
        frozen: which of "lora_a" and "lora_b" do not train.
        extra: the other parts, in the order in which they begin. At first they make the update
            zero, unless A and B do.
        factors: how the parts make one A, `(*stack, *in_dims, rank)`, and one B,
            `(*stack, rank, *out_dims)`; the rank may be another one than the node's. `None`: A and
            B are the update by themselves.
        refuses: what it cannot have, and why: "slices", and "residual", an initializer that takes
            A B out of the weight. Where there are `factors` it can have neither.

    Example:
        >>> Form("ours", init=lambda key, weight, rank, scaling, dtype: ...).is_product
        True
    """

    name: str
    init: Initializer
    frozen: tuple[str, ...] = ()
    extra: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    factors: Callable[[LoraArray, Geometry], tuple[Array, Array]] | None = None
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_product(self) -> bool:
        """Whether the update is `s · A B` of the node's own A and B."""
        return self.factors is None

    @property
    def parts(self) -> dict[str, Part]:
        """All parts of the update, A and B first."""
        factors = {
            name: Part(axes, frozen=name in self.frozen, shared=True) for name, axes in AXES.items()
        }
        return {**factors, **self.extra}

    def refusal(self, of: str) -> str | None:
        """Return why it cannot have slices or a residual; None if it can."""
        return self.refuses.get(of, None if self.is_product else _REFUSED[of])


_REFUSED = {
    "slices": "what stands between A and B is of the whole weight",
    "residual": "the update begins as zero whatever A and B are",
}
_FORMS: dict[str, Form] = {}


def register(form: Form) -> None:
    """Make a form known: to `LoraSpec(form=...)` and to all that takes its nodes.

    Args:
        form: of a name that is not registered yet.

    Returns:
        Nothing.

    Raises:
        ValueError: the name is registered already, a part has the name of a field of `LoraArray`,
            or `frozen` has other names than "lora_a" and "lora_b".

    Example:
        >>> from jlora import LoraSpec, initializers
        >>> register(Form("trains_a", initializers.a_zero, frozen=("lora_b",)))
        >>> LoraSpec(2, form="trains_a").form
        'trains_a'
    """
    call = f"jlora.forms.register(Form({form.name!r}, ...))"
    if form.name in _FORMS:
        raise ValueError(f"`{call}`: there is a form of this name already. Choose another name.")
    for name in form.extra:
        if name in _FIELDS:
            raise ValueError(
                f"`{call}`: a LoraArray has a field {name!r}, so no part of `extra` can have that "
                "name. Choose another one."
            )
    if not set(form.frozen) <= set(AXES):
        raise ValueError(
            f'`{call}`: frozen={form.frozen!r}; it takes "lora_a" and "lora_b". For a part of '
            "`extra` give `Part(..., frozen=True)`."
        )
    _FORMS[form.name] = form


def named(name: str, call: str = "jlora.forms.named(name)") -> Form:
    """Return the form of a name.

    Args:
        name: what it was registered as.
        call: what an error is said to come from.

    Returns:
        The record.

    Raises:
        ValueError: there is none of this name.

    Example:
        >>> named("lora_fa").frozen
        ('lora_a',)
    """
    if name not in _FORMS:
        raise ValueError(
            f"`{call}`: give one of {', '.join(map(repr, _FORMS))}; there is no form {name!r}. "
            "Register a form of your own first: `jlora.forms.register(form)`."
        )
    return _FORMS[name]


def shareable() -> tuple[str, ...]:
    """Return the names of all parts that weights can share, of any form.

    Args:
        None.

    Returns:
        The names, "lora_a" and "lora_b" first.

    Example:
        >>> shareable()[:3]
        ('lora_a', 'lora_b', 'core')
    """
    found = [(n, part) for form in _FORMS.values() for n, part in form.parts.items()]
    return tuple(dict.fromkeys(name for name, part in found if part.shared))
