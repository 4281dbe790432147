"""Examples as earlier turns of one conversation: prompts of in-context learning, and what MetaICL trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metasft.data.examples import Example, messages_for

Messages = Sequence[Mapping[str, str]]


def in_context(shots: Sequence[Messages], messages: Messages) -> list[dict[str, str]]:
    """A test conversation with those of the shots before it, under the test conversation's system prompt."""
    system = [dict(message) for message in messages if message["role"] == "system"]
    turns = [message for shot in (*shots, messages) for message in shot if message["role"] != "system"]
    return system + [dict(message) for message in turns]


def in_context_examples(examples: Sequence[Example], shots: int) -> list[Example]:
    """The examples of one task as conversations of ``shots`` + 1, each example in one of them; the last may be shorter.

    MetaICL (Min et al. 2022, arXiv 2110.15943) trains on the last response of such a conversation. With veRL's dataset
    every response is learned, which is MetaICL with 0 to ``shots`` earlier examples in one pass.
    """
    conversations = []
    for start in range(0, len(examples), shots + 1):
        *earlier, last = examples[start : start + shots + 1]
        turns = in_context([messages_for(example) for example in earlier], messages_for(last))[:-1]
        conversations.append(
            Example(
                task=last.task,
                data_source=last.data_source,
                example_id=f"{last.example_id}/after_{len(earlier)}",
                prompt=last.prompt,
                response=last.response,
                answer=last.answer,
                extra_info=last.extra_info,
                turns=tuple(turns),
            )
        )
    return conversations
