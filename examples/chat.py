"""Chats as text: the model's own template, and which characters the assistant says.

A chat template is a program that comes with the model. It runs in Jinja's immutable sandbox, with
the options and the functions that transformers gives it.
"""

import datetime
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_directory import read_json
from tokenizers import Tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
# What `strftime_now` formats. With today's date, a run that is resumed tomorrow had other batches.
DATE = datetime.datetime(2025, 1, 1)

Spans = list[tuple[int, int]]


class Chat:
    """A chat template; `special` are its special tokens by name, `ends` all of the tokenizer's."""

    def __init__(self, template: str, special: Mapping[str, str], ends: Sequence[str] = ()) -> None:
        self.special, self.ends = dict(special), tuple(ends)
        self.marks = tuple(f"\ufdd0{secrets.token_hex(8)}{kind}" for kind in "<>")
        self.marked = "endgeneration" in template
        self.template = environment(self.marks).from_string(template)

    def render(self, messages: Sequence[Any], **more: Any) -> tuple[str, Spans]:
        """The text of a chat, and the spans of its {% generation %} blocks."""
        try:
            given = {"tools": None, "documents": None, "add_generation_prompt": False} | more
            text = self.template.render(messages=[*messages], **self.special | given)
        except Exception as error:  # the template is a program: it may raise anything
            raise ValueError(
                f"does not fit the model's chat template ({type(error).__name__}: {error})"
            ) from error
        opened, closed = self.marks
        plain, *blocks = text.split(opened)
        spans = []
        for block in blocks:
            inside, _, after = block.partition(closed)
            spans.append((len(plain), len(plain) + len(inside)))
            plain += inside + after
        return plain, spans

    def spoken(self, messages: Sequence[Any], **more: Any) -> tuple[str, Spans]:
        """The text of a chat, and the spans of what the assistant says, with its end token.

        Without {% generation %} in the template, a turn begins where the chat before it, with the
        generation prompt, ends. Raises ValueError if that is not how the chat itself begins.
        """
        text, spans = self.render(messages, **more)
        if self.marked:
            return text, spans
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self.render(messages[:n], **more, add_generation_prompt=True)
            until, _ = self.render(messages[: n + 1], **more)
            if not (text.startswith(until) and until.startswith(before)):
                raise ValueError(
                    f"cannot be split into turns: the chat template renders turn {n + 1}, or what "
                    "is before it, differently when more turns follow, and it has no "
                    "{% generation %} block. End the chat with that turn, or mark what the "
                    "assistant says in the template"
                )
            spans.append((len(before), len(before) + len(self.ended(until[len(before) :]))))
        return text, spans

    def ended(self, turn: str) -> str:
        """A turn up to its end token: white space after that is the template's."""
        stripped = turn.rstrip()
        return stripped if stripped.endswith(self.ends or ("\0",)) else turn


def environment(marks: tuple[str, str]) -> Any:
    """Jinja as transformers sets it up; {% generation %} puts its text between `marks`."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return caller().join(marks)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    return found


def chat_of(path: Path, tokenizer: Tokenizer) -> Chat | None:
    """The chat template of a Hugging Face directory or a GGUF file, if it has one."""
    try:
        template, special = of_directory(path) if path.is_dir() else of_gguf(path)
        if not isinstance(template, str):
            return None
        ends = [str(t) for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        return Chat(template, special, [*special.values(), *ends])
    except Exception as error:  # as in `weights.load`: a file of someone else
        if isinstance(error, ValueError | OSError) and str(path) in str(error):
            raise
        raise ValueError(
            f"`--model {path}`: its chat template is not a template of Jinja, or an entry for it "
            f"has the wrong type ({type(error).__name__}: {str(error)[:200]}). Download it again."
        ) from error


def of_directory(path: Path) -> tuple[Any, dict[str, str]]:
    """The template and the special tokens, as transformers finds them."""
    entries: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            entries |= read_json(path / name)
    template = entries.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t.get("name"): t.get("template") for t in template}.get("default")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    text = lambda token: token.get("content") if isinstance(token, dict) else token
    special = {name: text(entries[name]) for name in SPECIAL if entries.get(name)}
    return template, special


def of_gguf(path: Path) -> tuple[Any, dict[str, str]]:
    """The template and the special tokens in the metadata of a GGUF file."""
    from gguf_file import GGML, open_gguf

    fields, _ = open_gguf(path)
    tokens = fields.get(f"{GGML}.tokens", [])
    names = zip(SPECIAL, ("bos", "eos", "unknown", "seperator", "padding", "cls"), strict=True)
    ids = {special: fields.get(f"{GGML}.{name}_token_id") for special, name in names}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    return fields.get("tokenizer.chat_template"), special
