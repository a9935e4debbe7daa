"""Chat templates as strings between messages, found in Jinja's output and checked; others are refused with a reason."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest

from llamajax.chat.messages import Message
from llamajax.chat.role_strings import Render, RoleStrings, conversations, role_strings
from llamajax.errors import LlamaJaxError

# Published templates of SmolLM2-135M-Instruct, Llama-2-7b-chat, Llama-3-8B-Instruct, gemma-2b-it, gemma-3-1b-it (its
# parts for text), Mistral-7B-Instruct-v0.3 (without tools), DeepSeek-R1-Distill-Llama (without tools), zephyr-7b-beta.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = "
    "namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set "
    "ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message "
    "in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if "
    "message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}{% if "
    "'</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + "
    "content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}{% if add_generation_prompt %}"
    "{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


class Part(NamedTuple):
    """A rendered conversation as one part."""

    text: str
    is_content: bool = False


def renderer(template: str) -> Render:
    """Renders with Jinja and what transformers gives a template; a template's error becomes a LlamaJaxError."""
    jinja2 = pytest.importorskip("jinja2", reason="compares with Jinja: pip install jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)

    def refuse(reason: str) -> None:
        raise LlamaJaxError(f"the template refuses the messages: {reason}")

    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)

    def render(messages: Sequence[Message], reply: bool) -> list[Part]:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        return [Part(compiled.render(messages=plain, add_generation_prompt=reply, bos_token="<s>", eos_token="</s>"))]

    return render


START, USER, MODEL = "<|start_header_id|>", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
ASKED, SYSTEM = (
    "<|im_end|>\n<|im_start|>assistant\n",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
HEADED = "<|eot_id|><|start_header_id|>{}<|end_header_id|>\n\n".format
# Read off the templates by hand: begin, system, behind_system, answer, next, reply, and what is done to contents.
EXPECTED = {
    "SmolLM2": (
        SMOLLM2,
        RoleStrings(
            begin=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
            system="<|im_start|>system\n",
            behind_system="<|im_end|>\n<|im_start|>user\n",
            answer=ASKED,
            next="<|im_end|>\n<|im_start|>user\n",
            reply=ASKED,
        ),
    ),
    "Llama 3": (
        LLAMA3,
        RoleStrings(
            begin=f"<s>{START}user<|end_header_id|>\n\n",
            system=f"<s>{START}system<|end_header_id|>\n\n",
            behind_system=HEADED("user"),
            answer=HEADED("assistant"),
            next=HEADED("user"),
            reply=HEADED("assistant"),
            trims_answers=True,
        ),
    ),
    "Gemma": (
        GEMMA,
        RoleStrings("<s>" + USER, None, None, MODEL, "<end_of_turn>\n" + USER, MODEL, True),
    ),
    "Gemma 3": (
        GEMMA3,
        RoleStrings("<s>" + USER, "<s>" + USER, "\n\n", MODEL, "<end_of_turn>\n" + USER, MODEL, True),
    ),
    "Llama 2": (
        LLAMA2,
        RoleStrings(
            begin="<s>[INST] ",
            system="<s>[INST] <<SYS>>\n",
            behind_system="\n<</SYS>>\n\n",
            answer=" [/INST] ",
            next=" </s><s>[INST] ",
            reply=" [/INST]",
            trims_answers=True,
        ),
    ),
    # The system message stands in the last user message, wherever that is.
    "Mistral": (
        MISTRAL,
        RoleStrings("<s>[INST] ", None, None, "[/INST] ", "</s>[INST] ", "[/INST]", True),
    ),
    "Zephyr": (
        ZEPHYR,
        RoleStrings(
            begin="<|user|>\n",
            system="<|system|>\n",
            behind_system="</s>\n<|user|>\n",
            answer="</s>\n<|assistant|>\n",
            next="</s>\n<|user|>\n",
            reply="</s>\n<|assistant|>\n",
        ),
    ),
    "R1": (
        R1,
        RoleStrings(
            begin="<s><｜User｜>",
            system="<s>",
            behind_system="<｜User｜>",
            answer="<｜Assistant｜>",
            next="<｜end▁of▁sentence｜><｜User｜>",
            reply="<｜Assistant｜><think>\n",
            thinking_end="</think>",
        ),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_strings_of_published_templates(name: str) -> None:
    template, expected = EXPECTED[name]
    assert role_strings(renderer(template)) == (expected, "")


def test_a_conversation_is_what_jinja_makes_of_it_and_contents_are_marked() -> None:
    render = renderer(LLAMA3)
    strings, _ = role_strings(render)
    messages = [
        Message("system", " <|eot_id|>\n"),
        Message("user", "a<|eot_id|>"),
        Message("assistant", ""),
        Message("user", "b"),
    ]
    assert strings is not None
    parts = strings.parts(messages)
    assert "".join(text for text, _ in parts) == render(messages, True)[0].text
    assert [text for text, is_content in parts if is_content] == ["<|eot_id|>", "a<|eot_id|>", "", "b"]


def changed(template: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in template
        template = template.replace(old, new)
    return template


UNUSUAL = {
    "a word left out": (SMOLLM2.replace("+ message['content'] +", "+"), "does not contain a message of the role user"),
    "contents twice": (
        changed(SMOLLM2, ("{% endfor %}", "{{ messages[0]['content'] }}{% endfor %}")),
        "does not contain",
    ),
    "numbered turns": (changed(LLAMA3, ("'<|eot_id|>'", "'<|eot_id|>' + loop.index0|string")), "depends on"),
    "cut at the left": (
        changed(LLAMA3, ("['content'] | trim", "['content'].lstrip()")),
        "white space around an answer is neither kept nor trimmed: it becomes 'kqwanswer",
    ),
    "long conversations": (changed(LLAMA3, ("{{ content }}", "{{ content if loop.index0 < 6 }}")), "depends on more"),
    "looks into contents": (
        changed(LLAMA3, ("{{ content }}", "{{ content if '[INST]' not in content else 'no' }}")),
        "it depends on more than roles: for 3 messages it writes 'no<|start_header_id|>user<|end_header",
    ),
    "thinking is kept in part": (
        changed(R1, ("content.split('</think>')[-1]", "content.replace('</think>', '')")),
        "an answer with </think> in it becomes '<think>kqwthought",
    ),
    "refuses everything": ("{{ raise_exception('never') }}", "the template refuses the messages: never"),
    "blank answers": (
        changed(LLAMA3, ("{{ content }}", "{{ content if message['content'] }}")),
        "depends on more than",
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_other_templates_have_none_and_it_is_said_why(name: str) -> None:
    template, message = UNUSUAL[name]
    strings, reason = role_strings(renderer(template))
    assert strings is None and message in reason, reason


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"], ["user", "system", "user"]]
)
def test_conversations_of_another_order(roles: list[str]) -> None:
    strings, _ = role_strings(renderer(LLAMA3))
    assert strings is not None
    with pytest.raises(LlamaJaxError, match="expected a system message or none, then messages of user and assistant"):
        strings.parts([Message(role, "x") for role in roles])


def test_a_system_message_where_there_is_none() -> None:
    strings, _ = role_strings(renderer(GEMMA))
    assert strings is not None
    with pytest.raises(LlamaJaxError, match="has no fixed place for a system message: write it into the user's"):
        strings.parts([Message("system", "x"), Message("user", "y")])


def test_the_checks_are_the_same_each_time_and_hold_what_templates_look_for() -> None:
    some = list(conversations(True))
    assert some == list(conversations(True)) and max(map(len, some)) >= 9
    assert any(message.content == "" for messages in some for message in messages)
    assert all(messages[0].role != "system" for messages in conversations(False))
    asked = [message.content for messages in some for message in messages if message.role != "assistant"]
    assert all(text and text == text.strip() for text in asked)
