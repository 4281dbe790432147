"""Chat templates as models bring them: with a switch, with the day's date, with turns that depend on their place."""

from __future__ import annotations

import datetime

from tiny_model import CHAT_TEMPLATE

_NO_THINKING = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
_TURN = (
    "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    + _NO_THINKING
    + "{% endif %}{{ m.content + '<|im_end|>\\n' }}"
)
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}" + _NO_THINKING + "{% endif %}"

THINKING = "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASK
"""``enable_thinking=false`` opens every answer with an empty thought."""

DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '<|im_start|>system\\nToday Date: ' + date_string + '<|im_end|>\\n' }}" + THINKING
)
"""As Llama 3.2 has it: today, unless an argument names a date."""

CLOCK = "{{ '<|im_start|>system\\nToday: ' + strftime_now('%Y-%m-%d') + '<|im_end|>\\n' }}" + THINKING
"""No argument changes the date."""

QWEN3 = (
    "{% set ns = namespace(last=messages|length - 1, looking=true) %}"
    "{% for m in messages[::-1] %}{% if ns.looking and m.role == 'user' %}"
    "{% set ns.looking = false %}{% set ns.last = messages|length - 1 - loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and loop.last %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
"""Qwen3's own, without tools: an answer after its question is rendered otherwise than alone."""

__all__ = ["CHAT_TEMPLATE", "CLOCK", "DATED", "QWEN3", "THINKING", "set_clock"]


def set_clock(monkeypatch, year: int) -> None:
    """Let transformers render with 1 January of ``year`` as the current date."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, 1, 1, tzinfo=tz)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
