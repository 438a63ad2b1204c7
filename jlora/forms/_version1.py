"""Nodes in checkpoints of version 1, which have `frozen` and three fields instead of a form."""

from collections.abc import Iterable

from jlora.forms.adalora import VALUES

_FORMS: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[str, dict[str, str]]] = {
    # frozen, and the fields that identify a form
    ((), ()): ("lora", {}),
    (("lora_a",), ()): ("lora_fa", {}),
    (("lora_b",), ()): ("mica", {}),
    (("lora_a", "lora_b"), ("core",)): ("lora_xs", {}),
    (("lora_a", "lora_b"), ("core", "lambda_b")): ("vera", {"core": "lambda_d"}),
    ((), ("core",)): ("adalora", {"core": VALUES}),
}


def from_version_1(frozen: Iterable[str], parts: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return the form, and the new names of renamed parts.

    Args:
        frozen: the names of the frozen parts.
        parts: the names of all parts.

    Returns:
        The form's name, and a mapping from old names to new ones.

    Raises:
        KeyError: no form has these parts with these frozen.

    Example:
        >>> from_version_1((), ("lora_a", "lora_b", "core"))
        ('adalora', {'core': 'singular_values'})
    """
    fields = tuple(sorted(name for name in parts if name in ("core", "lambda_b")))
    return _FORMS[tuple(sorted(frozen)), fields]
