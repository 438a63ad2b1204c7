"""Nodes as checkpoints of version 1 have them: `frozen` and three fields in place of a form."""

from collections.abc import Iterable

from jlora.forms.adalora import VALUES

_FORMS: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[str, dict[str, str]]] = {
    # frozen, and the fields that stand for a form
    ((), ()): ("lora", {}),
    (("lora_a",), ()): ("lora_fa", {}),
    (("lora_b",), ()): ("mica", {}),
    (("lora_a", "lora_b"), ("core",)): ("lora_xs", {}),
    (("lora_a", "lora_b"), ("core", "lambda_b")): ("vera", {"core": "lambda_d"}),
    ((), ("core",)): ("adalora", {"core": VALUES}),
}


def from_version_1(frozen: Iterable[str], parts: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return the form, and the new names of those parts that have one.

    Args:
        frozen: the names of the parts that do not train.
        parts: the names of all parts.

    Returns:
        The form's name, and a mapping from old names to new ones.

    Raises:
        KeyError: no form freezes these of these parts.

    Example:
        >>> from_version_1((), ("lora_a", "lora_b", "core"))
        ('adalora', {'core': 'singular_values'})
    """
    fields = tuple(sorted(name for name in parts if name in ("core", "lambda_b")))
    return _FORMS[tuple(sorted(frozen)), fields]
