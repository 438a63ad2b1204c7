"""Chat templates: rendered and masked as transformers does, or refused with a reason."""

import json
from pathlib import Path
from typing import Any

import chat
import numpy as np
import pytest
import records
import transformers
from tiny_llama import byte_tokenizer

TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "[{{ m.content + '<|im_end|>' }}]{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = TURN.replace("[", "").replace("]", "")
MARKED = TURN.replace("[", "{% generation %}").replace("]", "{% endgeneration %}")
# What templates of models use: macros, namespaces, loop controls, JSON, special tokens, trimming.
RICH = """{{ bos_token }}{% macro head(m) %}<|im_start|>{{ m['role'] | trim }}
{% endmacro %}
{%- set seen = namespace(count=0) %}
{%- for m in messages %}
    {%- if m.role == 'note' %}{% continue %}{% endif %}
    {{- head(m) }}
    {%- generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
    {%- set seen.count = seen.count + 1 %}
{% endfor %}
{{- seen.count }} {{ tools | tojson }} {{ {"ä": "<&>"} | tojson(indent=2) }}
{%- if messages[0].role == 'bad' %}{{ raise_exception('no bad roles') }}{% endif %}"""
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4, é ✓"},
    {"role": "note", "content": "not shown by all"},
    {"role": "user", "content": "And\n3 + 3?"},
    {"role": "assistant", "content": "6"},
]
ENDS = ["<|im_end|>", "<|im_start|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = byte_tokenizer()
    found.add_special_tokens(ENDS)
    return found


def theirs(tokenizer: Any, template: str) -> Any:
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<end>"
    )
    made.chat_template = template
    return made


def ours(template: str) -> chat.Chat:
    return chat.Chat(template, {"bos_token": "<|im_start|>", "eos_token": "<end>"}, ENDS)


@pytest.mark.parametrize("template", [PLAIN, MARKED, RICH])
@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": True}, {"tools": [{"a": "é"}]}])
def test_chats_are_rendered_as_in_transformers(tokenizer: Any, template: str, more: Any) -> None:
    want = theirs(tokenizer, template).apply_chat_template(TALK, tokenize=False, **more)
    assert ours(template).render(TALK, **more)[0] == want


@pytest.mark.parametrize("template", [MARKED, RICH])
def test_masks_are_those_of_transformers(tokenizer: Any, template: str) -> None:
    want = theirs(tokenizer, template).apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    text, spans = ours(template).spoken(TALK)
    code = tokenizer.encode(text, add_special_tokens=False)
    assert code.ids == want["input_ids"]
    assert [*records.said(code.offsets, spans)] == want["assistant_masks"]


def test_a_template_without_marks_has_the_mask_of_the_marked_one() -> None:
    assert ours(PLAIN).spoken(TALK) == ours(MARKED).spoken(TALK)
    text, spans = ours(PLAIN).spoken(TALK)
    assert [text[a:b] for a, b in spans] == ["4, é ✓<|im_end|>", "6<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "match"),
    [
        # As Qwen3's: only the last turn shows what the model has thought.
        (
            PLAIN.replace("m.content +", "('(thinks) ' if loop.last else '') + m.content +"),
            TALK,
            "cannot be split into turns: .* turn 3",
        ),
        (RICH, [{"role": "bad", "content": ""}], "chat template .*no bad roles"),
        (PLAIN, [{"role": "assistant"}], "does not fit the model's chat template"),
        ("{{ ''.__class__.__mro__ }}", TALK, "chat template .*SecurityError"),
        ("{{ messages.append(1) }}", TALK, "chat template .*SecurityError"),
    ],
)
def test_chats_that_cannot_be_learned(template: str, messages: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ours(template).spoken(messages)


def test_where_a_template_is_found(tiny_path: Path, tmp_path: Path, tokenizer: Any) -> None:
    assert chat.chat_of(tiny_path, tokenizer) is None
    entries: dict[str, Any] = {"eos_token": {"content": "<end>"}, "bos_token": None}
    file = tmp_path / "tokenizer_config.json"
    say = lambda: chat.chat_of(tmp_path, tokenizer).render([])[0]
    file.write_text(json.dumps(entries | {"chat_template": "one {{ eos_token }}"}))
    assert say() == "one <end>"
    several = [{"name": n, "template": n} for n in ("tool_use", "default")]
    file.write_text(json.dumps(entries | {"chat_template": several}))
    assert say() == "default"
    (tmp_path / "chat_template.jinja").write_text("its own file")
    assert say() == "its own file"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match="its chat template is not a template of Jinja"):
        chat.chat_of(tmp_path, tokenizer)
    for wrong, match in (
        (b"{", "tokenizer_config.json is not JSON"),
        (b"\xff", "tokenizer_config.json is not JSON"),
        (b"[1]", "tokenizer_config.json is not a JSON object"),
        (b'{"chat_template": [1]}', "an entry for it has the wrong type"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"`--model .*{match}"):
            chat.chat_of(tmp_path, tokenizer)


def test_the_template_of_a_gguf_file(tmp_path: Path, tokenizer: Any) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list(["a", "<end>"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}{{ eos_token }}")
    writer.add_tensor("w", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = chat.chat_of(tmp_path / "m.gguf", tokenizer)
    assert found is not None and found.render(TALK)[0] == "Be brief.<end>"
