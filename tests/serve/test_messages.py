"""The rule for tools in a chat's history."""

import pytest

from gpt2.data.chat_formats import check_messages
from gpt2.errors import UserError
from gpt2.serve.messages import plain_messages


def call(name="f", arguments="{}"):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


TEXT = {"type": "text", "text": "Let me see."}


@pytest.mark.parametrize(("message", "role", "text"), [
    ({"role": "tool", "tool_call_id": "1", "content": "22 °C"}, "user", "22 °C"),
    ({"role": "tool", "tool_call_id": "1", "content": [TEXT]}, "user", "Let me see."),
    ({"role": "function", "name": "f", "content": "22"}, "user", "22"),
    ({"role": "assistant", "content": None, "tool_calls": [call()]}, "assistant", "f({})"),
    ({"role": "assistant", "content": "", "tool_calls": [call()]}, "assistant", "f({})"),
    ({"role": "assistant", "tool_calls": [call(), call("g", "1")]}, "assistant", "f({})\ng(1)"),
    ({"role": "assistant", "content": "So:", "tool_calls": [call()]}, "assistant", "So:\nf({})"),
    ({"role": "assistant", "content": [TEXT], "tool_calls": [call()]}, "assistant",
     "Let me see.\nf({})"),
    ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
     "assistant", "f({})"),
    ({"role": "assistant", "content": None, "tool_calls": [{"type": "custom", "custom": {
        "name": "sql", "input": "SELECT 1"}}]}, "assistant", "sql(SELECT 1)"),
    ({"role": "assistant", "content": None, "refusal": "I cannot."}, "assistant", "I cannot."),
    ({"role": "assistant", "content": "Hi", "tool_calls": None}, "assistant", "Hi"),
    ({"role": "assistant", "content": "Hi", "refusal": None}, "assistant", "Hi"),
    ({"role": "assistant", "content": "Hi", "tool_calls": []}, "assistant", "Hi"),
])  # fmt: skip
def test_all_text_is_shown(message, role, text):
    assert check_messages(plain_messages([message])) == [{"role": role, "content": text}]


@pytest.mark.parametrize(("message", "said"), [
    ({"role": "assistant", "content": None, "tool_calls": [{}]}, "message 1: a tool call needs"),
    ({"role": "assistant", "content": None, "tool_calls": [5]}, "message 1: a tool call needs"),
    ({"role": "assistant", "content": None, "tool_calls": "f"}, "`tool_calls` is not a list"),
    ({"role": "assistant", "content": 5, "tool_calls": [call()]}, "content` is not a text"),
    ({"role": "assistant", "content": None}, "message 1: its `content` is not a text"),
    ({"role": "tool", "content": None}, "message 1: its `content` is not a text"),
    ({"role": "user", "content": None, "tool_calls": [call()]}, "its `content` is not a text"),
    (5, "message 1 is not an object"),
])  # fmt: skip
def test_what_is_no_message_is_refused(message, said):
    with pytest.raises(UserError, match=said):
        check_messages(plain_messages([message]))


def test_what_is_no_list_is_left_to_others():
    assert plain_messages("a") == "a"
