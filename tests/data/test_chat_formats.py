"""Conversations in the forms in which people publish them."""

import json

import pytest

from gpt2.data.chat_formats import FORMS, messages_of, unread_keys
from gpt2.data.chat_template import encode_conversation
from gpt2.data.conversations import open_conversations
from gpt2.errors import UserError
from gpt2.tokenizer import gpt2_tokenizer


def write_jsonl(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
EQUAL = {
    "OpenAI": {"messages": [QUESTION, ANSWER]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "ShareGPT with OpenAI's keys": {"conversations": [QUESTION, ANSWER]},
    "Alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "LLaMA-Factory": {"instruction": "Q", "input": None, "output": "A", "history": []},
    "Dolly": {"instruction": "Q", "context": "", "response": "A"},
    "prompt and completion": {"prompt": "Q", "completion": "A"},
    "messages as prompt": {"prompt": [QUESTION], "completion": [ANSWER]},
}


@pytest.mark.parametrize("name", EQUAL)
def test_forms_are_equal_messages(name):
    item = EQUAL[name]
    assert messages_of(item) == [QUESTION, ANSWER]
    assert messages_of(item | {"system": "S"}) == [SYSTEM, QUESTION, ANSWER]
    assert messages_of(item | {"system": ""}) == [QUESTION, ANSWER]
    assert not unread_keys(item | {"system": "S"})
    assert unread_keys(item | {"id": 7, "tags": []}) == {"id"}


def test_every_form_has_a_case():
    assert {next(key for key in FORMS if key in item) for item in EQUAL.values()} == set(FORMS)


@pytest.mark.parametrize("name", EQUAL)
def test_columns_of_other_forms_may_be_null(name):
    """As in a parquet file that was joined of several."""
    columns = {key for _, keys in FORMS.values() for key in keys} - {"completion", "conversations"}
    item = dict.fromkeys([*FORMS, *columns]) | EQUAL[name]
    assert messages_of(item) == [QUESTION, ANSWER]
    assert not unread_keys(item)


def test_a_history_comes_first():
    item = {"instruction": "Q2", "output": "A2", "history": [["Q", "A"]], "system": "S"}
    texts = [m["content"] for m in messages_of(item)]
    assert texts == ["S", "Q", "A", "Q2", "A2"]


def test_context_follows_the_instruction():
    item = {"instruction": "Q", "context": "C", "response": "A"}
    assert messages_of(item)[0]["content"] == "Q\n\nC"


def test_an_answer_of_weight_0_is_not_learned():
    bad = ANSWER | {"content": "bad", "weight": 0}
    ids, learned = encode_conversation(messages_of({"messages": [QUESTION, bad, QUESTION, ANSWER]}))
    text = gpt2_tokenizer().decode([i for i, own in zip(ids, learned, strict=True) if own])
    assert text == "A<|endoftext|>"
    ones = [m | {"weight": 1} for m in (QUESTION, ANSWER)]
    assert messages_of({"messages": ones}) == [QUESTION, ANSWER]


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"messages": [QUESTION, ANSWER | {"weight": 0.5}]}, "message 2: weight 0.5; use 0"),
        ({"messages": [QUESTION, ANSWER | {"weight": True}]}, "message 2: weight True; use 0"),
        ({"messages": [SYSTEM, QUESTION], "system": "other"}, "two system messages"),
        ({"messages": [QUESTION], "system": ["S"]}, "`system` is not a text"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "from 'tool' is unknown"),
        ({"conversations": [{"from": "human"}]}, "`from` and `value`"),
        ({"conversations": {}}, "must be a list"),
        ({"instruction": "Q", "output": "A", "history": [["Q"]]}, "turn 1 is not a question"),
        ({"prompt": "Q"}, "`prompt` without `completion`"),
        ({"prompt": "Q", "completion": ["A"]}, "`completion` is not a text"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
         "message 2 calls a tool, which is not learned"),
        ({"messages": [QUESTION, ANSWER | {"tool_calls": [{}]}]}, "message 2 calls a tool"),
        ({"messages": [QUESTION, ANSWER | {"function_call": {}, "content": 5}]}, "not a text"),
        (dict.fromkeys(FORMS), "must be a list"),
    ],
)  # fmt: skip
def test_wrong_rows_are_told(item, told):
    with pytest.raises(UserError) as error:
        messages_of(item)
    assert told in str(error.value)


def test_what_is_not_read_is_counted(tmp_path):
    messages = [QUESTION, ANSWER | {"name": "n"}]
    rows = [{"messages": messages, "id": n + 1, "score": None} for n in range(9)]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    _, (line,) = open_conversations(str(path), 32, 0.2)
    assert line.endswith("; not read: id (9 rows), messages.name (9 rows)") or line.endswith(
        "; not read: messages.name (9 rows), id (9 rows)"
    )
    plain = write_jsonl(tmp_path / "plain.jsonl", [EQUAL["OpenAI"]] * 9)
    assert "not read" not in open_conversations(str(plain), 32, 0.2)[1][0]


@pytest.mark.parametrize("name", ["list.jsonl", "list.json", "lines.json", "lines.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lists_and_lines_under_both_names(name, encoding, tmp_path):
    rows = [{"prompt": f"Wie heißt {n}?", "completion": "ä"} for n in range(9)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    whole = json.dumps(rows, ensure_ascii=False, indent=1)
    (tmp_path / name).write_text(whole if "list" in name else lines, encoding=encoding)
    _, (line,) = open_conversations(str(tmp_path / name), 32, 0.2)
    assert "7 conversations" in line
    assert "2 for validation" in line
