"""Chat templates of strangers: what they may do, and where they end."""

import threading

import pytest

from gpt2.errors import UserError
from gpt2.untrusted import templates
from gpt2.untrusted.templates import ModelTemplate, template_source

TALK = [{"role": "user", "content": "Olá\n"}, {"role": "assistant", "content": " oi "}]


def template(source, error=""):
    return ModelTemplate(source, "m", {"eos_token": "</s>"}, (), 0, list, error)


def test_as_transformers_renders_it():
    from transformers.utils.chat_template_utils import render_jinja_template

    source = """
    {%- for message in messages %}
        {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
        <|im_start|>{{ message['role'] }}
        {{ message.content | trim + eos_token }}
    {%- endfor %}
    {% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}
    {{ ns.n ~ '<&>' | tojson }}{% if tools %}tools{% endif %}
    {% if add_generation_prompt %}assistant: {% endif %}"""
    for ask in (True, False):
        (theirs,), _ = render_jinja_template(
            [TALK], chat_template=source, add_generation_prompt=ask, eos_token="</s>"
        )
        assert template(source).render(TALK, ask=ask) == theirs


REFUSED = {
    "what it raises itself": ("{{ raise_exception('roles alternate') }}", "roles alternate"),
    "no template": ("{% for", "unexpected 'end of template'"),
    "an unknown name": ("{{ tools.all.x }}", "'tools' is undefined"),
    "Python's objects": ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    "a change of the messages": ("{{ messages.append(1) }}", "is unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "all memory": ("{{ ('a' * 30000000000)|length }}", "too much memory"),
    "escape codes": ("{{ raise_exception('\x1b[2J') }}", r"\\x1b\[2J"),
    "too long": ("{# " + "a" * 2**17 + " #}", "has over 131,072 characters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_fails_is_one_line(name):
    source, message = REFUSED[name]
    with pytest.raises(UserError, match=f"m: its chat template fails: .*{message}") as found:
        template(source).render(TALK, ask=True)
    assert "\n" not in str(found.value)
    assert template("{{ 1 }}").render(TALK, ask=True) == "1"  # the next one works


def test_one_that_never_ends(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.7)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"takes over 0.7 seconds, or too much memory"):
        template(endless).render(TALK, ask=True)
    monkeypatch.setattr(templates, "SECONDS", 10)
    assert template("{{ 2 }}").render(TALK, ask=True) == "2"


def test_threads_take_turns():
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = template(f"{{{{ {number} }}}}").render(TALK, ask=True)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) for n in range(8)}


def test_a_known_error_is_told():
    with pytest.raises(UserError, match="it is damaged"):
        template("{{ 1 }}", error="it is damaged").render(TALK, ask=True)


def test_of_several_templates_the_default_is_taken_and_the_file_comes_first():
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert template_source({"chat_template": several}, None) == "b"
    assert template_source({"chat_template": several[:1]}, None) == ""
    assert template_source({"chat_template": several}, b"c") == "c"
    assert template_source({}, None) == ""
