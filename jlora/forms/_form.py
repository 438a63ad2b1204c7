"""`Form`, the description of a variant of LoRA, and the registry of forms."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jlora._arrays import AXES, Geometry, LoraArray
from jlora._paths import brief
from jlora.forms._initial import check_initializer

Factors = tuple[Float[Array, "in rank"], Float[Array, "rank out"]]
# A, B and the residual, which becomes `base`.
Split = tuple[Float[Array, "in rank"], Float[Array, "rank out"], Float[Array, "in out"]]
Initializer = Callable[..., Factors | Split]
Begin = Callable[[LoraArray, tuple[int, ...], DTypeLike], Array]

_FIELDS = [field.name for field in dataclasses.fields(LoraArray)]


def zeros(node: LoraArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Initialize a part to zeros.

    Args:
        node: not read.
        shape: the part's shape.
        dtype: the part's dtype.

    Returns:
        An array of zeros.

    Example:
        >>> zeros(LoraArray(None, None, None, None, "io"), (2,), jnp.float32).tolist()
        [0.0, 0.0]
    """
    return jnp.zeros(shape, dtype)


def _require(kind: str, checks: Iterable[tuple[str, object, bool, str]]) -> None:
    """Refuse an argument of the wrong kind. `checks` has its name, value, whether it is good, and
    what is wanted."""
    for name, value, good, wanted in checks:
        if not good:
            raise TypeError(f"`jlora.forms.{kind}({name}={brief(value)})`: give {wanted}.")


@dataclasses.dataclass(frozen=True)
class Part:
    """Describe one array of an update.

    Args:
        axes: its axes, in groups: the base's axes with role `s` (stack), `i` (input) or `o`
            (output), and `r`, the rank. "s r r" is one matrix per stack element, "so" one number
            per output.
        begin: its initial value, a function of the node so far (base, A, B and the parts before
            this one), the shape and the dtype.
        frozen: whether it is frozen.
        shared: whether several weights may share it; see `jlora.tie`.

    Raises:
        ValueError: `axes` has other letters, or does not begin with the stack.

    Example:
        >>> Part("s r r").frozen
        False
    """

    axes: str
    begin: Begin = zeros
    frozen: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        axes = self.axes if isinstance(self.axes, str) else ""
        if not axes.startswith("s") or set(axes) - set("sior "):
            raise ValueError(
                f'`jlora.forms.Part({brief(self.axes)})`: the axes begin with the stack, "s"; the '
                'rest are "i" (inputs), "o" (outputs) and, in a group, "r" (the rank): "si r".'
            )
        flag, function = "True or False", "a function `(node, shape, dtype) -> array`"
        checks = (
            ("begin", self.begin, callable(self.begin), function),
            ("frozen", self.frozen, isinstance(self.frozen, bool), flag),
            ("shared", self.shared, isinstance(self.shared, bool), flag),
        )
        _require("Part", checks)


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """Describe a variant of LoRA: its parts, which of them train, and how they form A and B.

    Args:
        name: its name in `LoraSpec(form=...)`.
        init: the default initializer of A and B, as in `jlora.initializers`.
        frozen: which of "lora_a" and "lora_b" are frozen.
        extra: the other parts, in the order of their initialization. Their initial values make the
            update zero, unless A and B do.
        factors: a function from the node to one A, `(*stack, *in_dims, rank)`, and one B,
            `(*stack, rank, *out_dims)`; the rank may differ from the node's. With `None` the update
            is the product of the node's own A and B.
        refuses: unsupported features and why: "slices", and "residual", an initializer that
            subtracts A B from the weight. With `factors` neither is supported.

    Raises:
        TypeError: a field has another type, or `init` cannot be called as an initializer.
        ValueError: `frozen` has names other than "lora_a" and "lora_b".

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

    def __post_init__(self) -> None:
        check_initializer(self.init, f"jlora.forms.Form(init={brief(self.init)})")
        extra, refuses, frozen = self.extra, self.refuses, self.frozen
        parts = isinstance(extra, Mapping) and all(isinstance(x, Part) for x in extra.values())
        reasons = isinstance(refuses, Mapping) and set(refuses) <= set(_REFUSED)
        names = not isinstance(frozen, str) and isinstance(frozen, Sequence)
        name, factors = isinstance(self.name, str), self.is_product or callable(self.factors)
        checks = (
            ("name", self.name, name, "the name in `LoraSpec(form=...)`, a string"),
            ("frozen", frozen, names, 'a tuple of names, e.g. `("lora_a",)`'),
            ("extra", extra, parts, 'a mapping from name to part, e.g. `{"core": Part("s r r")}`'),
            ("factors", self.factors, factors, "a function, or None"),
            ("refuses", refuses, reasons, 'a mapping from "slices" or "residual" to a reason'),
        )
        _require("Form", checks)
        if not set(frozen) <= set(AXES):
            raise ValueError(
                f'`jlora.forms.Form(frozen={brief(frozen)})`: it takes "lora_a" and "lora_b". For '
                "a part of `extra` use `Part(..., frozen=True)`."
            )

    @property
    def is_product(self) -> bool:
        """Whether the update is `s · A B` of the node's own A and B."""
        return self.factors is None

    @functools.cached_property
    def parts(self) -> Mapping[str, Part]:
        """All parts of the update, A and B first."""
        factors = {
            name: Part(axes, frozen=name in self.frozen, shared=True) for name, axes in AXES.items()
        }
        return types.MappingProxyType({**factors, **self.extra})

    def refusal(self, of: str) -> str | None:
        """Return why slices or a residual are not supported; None if they are."""
        return self.refuses.get(of, None if self.is_product else _REFUSED[of])


_REFUSED = {
    "slices": "the parts between A and B belong to all outputs together",
    "residual": "the update is initially zero for any A and B",
}
_FORMS: dict[str, Form] = {}


def check_node(node: object, call: str) -> None:
    """Refuse anything but a `LoraArray`."""
    if not isinstance(node, LoraArray):
        raise TypeError(
            f"`{call}`: `node` is {brief(node)}. Pass one `LoraArray`, a leaf of what "
            "`jlora.attach` returned: `jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, "
            "jlora.LoraArray))`."
        )


def register(form: Form) -> None:
    """Register a form for `LoraSpec(form=...)` and all functions of jlora.

    Args:
        form: a form whose name is not registered yet.

    Returns:
        None.

    Raises:
        ValueError: the name is already registered, or a part has the name of a field of
            `LoraArray`.
        TypeError: `form` is not a `Form`.

    Example:
        >>> from jlora import LoraSpec, initializers
        >>> register(Form("trains_a", initializers.a_zero, frozen=("lora_b",)))
        >>> LoraSpec(2, form="trains_a").form
        'trains_a'
    """
    if not isinstance(form, Form):
        raise TypeError(
            f"`jlora.forms.register({brief(form)})`: give a form: `jlora.forms.Form(name, init, "
            "...)`."
        )
    call = f"jlora.forms.register(Form({form.name!r}, ...))"
    if form.name in _FORMS:
        raise ValueError(
            f"`{call}`: a form of this name is already registered. Choose another name."
        )
    for name in form.extra:
        if name in _FIELDS:
            raise ValueError(
                f"`{call}`: LoraArray has a field {name!r}, so no part in `extra` can have that "
                "name. Choose another name."
            )
    _FORMS[form.name] = form


def named(name: str, call: str = "jlora.forms.named(name)") -> Form:
    """Return a registered form by name.

    Args:
        name: the name of the form.
        call: the call that error messages name.

    Returns:
        The form.

    Raises:
        ValueError: no form of this name is registered.

    Example:
        >>> named("lora_fa").frozen
        ('lora_a',)
    """
    if not isinstance(name, str) or name not in _FORMS:
        raise ValueError(
            f"`{call}`: give one of {', '.join(map(repr, _FORMS))}; there is no form "
            f"{brief(name)}. Register a form of your own first: `jlora.forms.register(form)`."
        )
    return _FORMS[name]


def shareable() -> tuple[str, ...]:
    """Return the names of all parts, of any form, that weights can share.

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
