"""Files of data, read from any place on: lines of JSON and plain text become tokens.

What is read at a place depends on the files and the place alone, so a run can stop anywhere and
read on, and no more than what was asked for is in memory.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chat import Chat
from data import Example, encode, spoken
from tokenizers import Tokenizer

LINES, PIECE = 64, 1 << 16  # lines of JSON, or bytes of text, that are read at once
WINDOW = 128  # tokens of plain text that are one example, without --length
WRITE = '{"prompt": "2 + 2 =", "completion": " 4"}, or one with "messages" or "text"'


class Place(NamedTuple):
    """Where to read on: a byte and a line of every file, and the number of examples before."""

    offsets: tuple[int, ...]
    lines: tuple[int, ...]
    index: int = 0


class Chats(NamedTuple):
    """A line with messages: the text, what the assistant says of it, and its last answer."""

    text: str
    spans: list[tuple[int, int]]
    prompt: str
    completion: str


class Reader:
    """The examples of `paths`. Text is cut into windows of `length` tokens."""

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        stop: int,
        context: int,
        length: int | None = None,
        chat: Chat | None = None,
    ) -> None:
        self.paths = [Path(path) for path in paths]
        for path in self.paths:
            check_file(path)
        self.sizes = [path.stat().st_size for path in self.paths]
        self.tokenizer, self.stop, self.chat = tokenizer, stop, chat
        self.limit = context if length is None else None  # longer examples are an error
        self.window = min(length or WINDOW, context)

    def begin(self) -> Place:
        none = (0,) * len(self.paths)
        return Place(none, none)

    def ended(self, at: Place) -> bool:
        return all(offset >= size for offset, size in zip(at.offsets, self.sizes, strict=True))

    def read(self, at: Place, count: int) -> tuple[list[Example], Place]:
        """`count` examples or a few more, fewer at the end, and the place after them.

        The files are mixed: what comes next is of the one of which the smallest part was read.
        """
        found: list[Example] = []
        while len(found) < count and not self.ended(at):
            parts = [o / max(s, 1) for o, s in zip(at.offsets, self.sizes, strict=True)]
            parts = [2.0 if s == 0 else p for p, s in zip(parts, self.sizes, strict=True)]
            file = parts.index(min(parts))
            read = self.text if self.paths[file].suffix == ".txt" else self.lines
            examples, offset, line = read(self.paths[file], at.offsets[file], at.lines[file])
            replaced = lambda old, new, n=file: (*old[:n], new, *old[n + 1 :])
            found += examples
            at = Place(
                replaced(at.offsets, offset), replaced(at.lines, line), at.index + len(examples)
            )
        return found, at

    def text(self, path: Path, offset: int, line: int) -> tuple[list[Example], int, int]:
        """Read about 64 KiB of plain text, to the end of a line if there is one."""
        size = self.sizes[self.paths.index(path)]
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read(min(PIECE, size - offset))
            raw += file.readline(min(PIECE, size - offset - len(raw)))
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            # A line without an end may be cut within a character.
            if error.end < len(raw) or offset + len(raw) == size or len(raw) - error.start > 3:
                raise not_text(path, error) from error
            raw = raw[: error.start]
            text = raw.decode()
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not raw:
            raise ValueError(f"`--data {path}`: the file has become shorter while it was read.")
        return self.windows(ids), offset + len(raw), line

    def windows(self, ids: Sequence[int]) -> list[Example]:
        """Plain text as windows of tokens; a last one of one token has nothing to learn from."""
        size, shown = self.window, min(16, self.window - 1)
        cut = [[*ids[i : i + size]] for i in range(0, len(ids) - 1, size)]
        read = self.tokenizer.decode
        return [Example(read(w[:shown]), read(w[shown : 2 * shown]), w, 1, shown) for w in cut]

    def lines(self, path: Path, offset: int, line: int) -> tuple[list[Example], int, int]:
        """Read the next lines of JSON."""
        records = []
        for number, raw in numbered(path, offset, line, self.sizes[self.paths.index(path)]):
            offset, line = offset + len(raw), number
            try:
                records.append(self.record(decoded(path, raw)))
            except ValueError as error:
                if str(error).startswith("`--data"):
                    raise
                raise ValueError(
                    f"`--data {path}`: line {number} {error}. Write a line as {WRITE}."
                ) from error
        found = self.examples(records)
        for number, examples in enumerate(found, line - len(records) + 1):
            size = max((len(e.tokens) for e in examples), default=0)
            if self.limit is not None and size > self.limit:
                raise ValueError(
                    f"`--data {path}`: line {number} has {size} tokens with its end "
                    f"token, more than the model's context of {self.limit}. Shorten it, split it "
                    "up, or give --length, which truncates."
                )
        return [e for examples in found for e in examples], offset, line

    def record(self, line: str) -> tuple[str, str] | Chats | str:
        """What a line has: a prompt and its completion, a chat, or text."""
        if not line.strip():
            raise ValueError("is empty")
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from error
        record = record if isinstance(record, dict) else {}
        if "messages" in record:
            return self.talk(record)
        if isinstance(record.get("text"), str) and record["text"]:
            return record["text"]
        prompt, completion = (record.get(key) for key in ("prompt", "completion"))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError("lacks a string for `prompt` or for `completion`")
        if not completion:
            raise ValueError("has an empty completion, so there is nothing to learn")
        return prompt, completion

    def talk(self, record: dict[str, Any]) -> Chats:
        """The chat of a line in the model's template."""
        messages = record["messages"]
        roles = [m.get("role") if isinstance(m, dict) else None for m in messages or [None]]
        if not isinstance(messages, list) or not all(isinstance(role, str) for role in roles):
            raise ValueError("has `messages` that are not a list of objects with a `role`")
        if "assistant" not in roles:
            raise ValueError("has no message of the assistant, so there is nothing to learn")
        if self.chat is None:
            raise ValueError(
                "has messages, and the model has no chat template (a chat_template.jinja, or an "
                "entry in tokenizer_config.json or in the GGUF file)"
            )
        more = {name: record[name] for name in ("tools", "documents") if record.get(name)}
        text, spans = self.chat.spoken(messages, **more)
        if not any(begin < end for begin, end in spans):
            raise ValueError("has nothing that the assistant says, so there is nothing to learn")
        last = len(roles) - 1 - roles[::-1].index("assistant")
        asked = messages[last - 1].get("content") if last else ""
        return Chats(text, spans, f"{asked} ", str(messages[last].get("content")))

    def examples(self, records: Sequence[Any]) -> list[list[Example]]:
        """The records as tokens, encoded together."""
        kinds = {kind: [r for r in records if isinstance(r, kind)] for kind in (Chats, str)}
        pairs = [r for r in records if isinstance(r, tuple) and not isinstance(r, Chats)]
        of_pairs = iter(encode(pairs, self.tokenizer, self.stop) if pairs else ())
        plain = {"add_special_tokens": False}
        chats = iter(self.tokenizer.encode_batch([c.text for c in kinds[Chats]], **plain))
        texts = iter(self.tokenizer.encode_batch_fast(kinds[str], **plain))

        def tokens(record: Any) -> list[Example]:
            if isinstance(record, str):
                return self.windows([*next(texts).ids, self.stop])
            if not isinstance(record, Chats):
                return [next(of_pairs)]
            code = next(chats)
            mask = said(code.offsets, record.spans)
            found = spoken(record.prompt, record.completion, code.ids, mask)
            return [] if found is None else [found]

        return [tokens(record) for record in records]


def said(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> bytes:
    """1 for each token that has characters in a span."""
    return bytes(any(a < end and b > begin for begin, end in spans) for a, b in offsets)


def numbered(path: Path, offset: int, line: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The next lines of a file, as bytes, with their numbers from 1."""
    with path.open("rb") as file:
        file.seek(offset)
        for number in range(line + 1, line + 1 + LINES):
            raw = file.readline(size - offset)
            if not raw:
                raise ValueError(f"`--data {path}`: the file has become shorter while it was read.")
            offset += len(raw)
            yield number, raw
            if offset >= size:
                return


def decoded(path: Path, raw: bytes) -> str:
    """A line without its end and, where the file begins with one, without a byte order mark."""
    try:
        return raw.decode().removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise not_text(path, error) from error


def not_text(path: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"`--data {path}`: this is not UTF-8 text ({error}). Save it as UTF-8.")


def check_file(path: Path) -> None:
    """Raise if there is no such file, or its kind is unknown."""
    if not path.is_file():
        raise FileNotFoundError(f"`--data {path}`: there is no such file.")
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(
            f"`--data {path}`: its name should end in .jsonl, with an object a line: {WRITE}; "
            "or in .txt, plain text."
        )
