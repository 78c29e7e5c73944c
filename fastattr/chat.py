"""Conversations: several turns, pictures between the words, a system prompt, tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fastattr.errors import InputError
from fastattr.images import Visual, read_visual, read_visuals
from fastattr.parts import check_whole, plain_part, sampling_of, short, sizing_of

PICTURES = ("image", "video")
NOT_OPTIONS = (
    frozenset(  # arguments of `apply_chat_template` that fastattr sets itself, or that are not for the template
        [
            "add_generation_prompt",
            "continue_final_message",
            "conversation",
            "max_length",
            "messages",
            "padding",
            "processor_kwargs",
            "return_assistant_tokens_mask",
            "return_dict",
            "return_tensors",
            "tokenize",
            "tokenizer_kwargs",
            "tools",
            "truncation",
        ]
    )
)
Messages = Sequence[Mapping[str, Any]]  # a conversation as chat templates take it


@dataclass(frozen=True)
class Chat:
    """A conversation up to where the model answers. The last turn is not the assistant's.

    Attributes:
        messages: as chat templates take them: mappings with `role` and `content`, which is text or a list of parts
            `{"type": "text", "text": ...}`, `{"type": "image"}` and `{"type": "video"}`. A part may hold its picture:
            `{"type": "image", "image": ...}`, `{"type": "video", "video": [frame, ...]}`. Parts in the formats
            of OpenAI and Anthropic are converted to this one, see `fastattr.parts`.
        tools: for the chat template; what it writes of them is no context.
        template_options: further variables of the chat template, such as `{"enable_thinking": False}`. They must be those
            the response was generated with: other options make another prompt.
    """

    messages: Messages
    tools: Sequence[Any] | None = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.messages, list | tuple):
            raise InputError(f"the messages are a {type(self.messages).__name__}, expected a list of mappings")
        object.__setattr__(self, "messages", tuple(_plain(message) for message in self.messages))
        if not isinstance(self.tools, list | tuple | None):
            raise InputError(f"the tools are a {type(self.tools).__name__}, expected a list of them")
        object.__setattr__(self, "tools", tuple(self.tools or ()))
        options = self.template_options
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise InputError(f"template_options is {short(options)}, expected a mapping with names as keys")
        wrong = sorted(NOT_OPTIONS & set(options))
        if wrong:
            raise InputError(
                f"template_options holds {wrong[0]!r}, expected variables of the chat template; messages and tools are "
                "arguments of Chat, and the others are set by fastattr"
            )
        object.__setattr__(self, "template_options", MappingProxyType(deepcopy(dict(options))))
        if not self.messages or self.messages[-1]["role"] == "assistant":
            raise InputError(
                "the last message must be what the model answers to, but "
                + ("there is none" if not self.messages else "it is the assistant's; pass it as response= instead")
            )
        if not any(text.strip() for text in self.texts):
            raise InputError("the messages hold no text, expected some: it is the context the response is read against")
        for role, text in zip(self.roles, self.texts, strict=True):
            check_whole(text, f"what the {role} said")

    def __reduce__(self) -> tuple[type[Chat], tuple[Any, ...]]:
        return Chat, (self.messages, self.tools, dict(self.template_options))  # a mapping proxy cannot be copied

    @property
    def parts(self) -> list[Mapping[str, Any]]:
        """Those of all messages, in order; content that is text counts as one part."""
        return [part for message in self.messages for part in _parts(message)]

    @property
    def texts(self) -> list[str]:
        """What everybody said, in order."""
        return [part["text"] for part in self.parts if part["type"] == "text"]

    @property
    def roles(self) -> list[str]:
        """The role of each text."""
        return [m["role"] for m in self.messages for part in _parts(m) if part["type"] == "text"]

    @property
    def text(self) -> str:
        """All of it, for people."""
        return "\n".join(text for text in self.texts if text.strip())

    @property
    def n_pictures(self) -> int:
        return sum(part["type"] in PICTURES for part in self.parts)


Prompt = str | Chat


def read_prompt(image: Any, prompt: str | Messages | Chat) -> tuple[tuple[Visual, ...], Prompt]:
    """Pictures and prompt as they were given, in one form.

    Args:
        image: see `images.read_visuals`; None where the messages hold the pictures themselves.
        prompt: the user's text, with all images before it; messages, or a `Chat`, with the images where they stand.

    Raises:
        InputError: messages are broken, or their pictures are not as many as the images.
        ImageError: an image is unreadable.
    """
    if isinstance(prompt, str):
        return read_visuals(image), prompt
    chat = prompt if isinstance(prompt, Chat) else Chat(prompt)
    parts = [part for part in chat.parts if part["type"] in PICTURES]
    held = [part.get(part["type"]) for part in parts]
    inline = [each for each in held if each is not None]
    if inline and image is not None:
        raise InputError(
            f"the messages hold {len(inline)} pictures and image= was given too; pass them in one of the two ways"
        )
    if inline and len(inline) != len(held):
        raise InputError(
            f"{len(held) - len(inline)} of {len(held)} picture parts hold no picture; put it into the part"
        )
    if not inline and image is None:
        raise InputError("got no image; pass image=, or put the pictures into the parts of the messages")
    given = inline if inline else list(image) if isinstance(image, list | tuple) else [image]
    if len(given) != len(held):
        raise InputError(
            f"got {len(given)} images for messages with {len(held)} image parts, expected one each, in their order"
        )
    return tuple(
        _read(number, part, each) for number, (part, each) in enumerate(zip(parts, given, strict=True), 1)
    ), chat


def _read(number: int, part: Mapping[str, Any], picture: Any) -> Visual:
    visual = read_visual(picture, part["type"], sampling=sampling_of(part), sizing=sizing_of(part))
    if part["type"] == "image" and len(visual.frames) > 1:
        raise InputError(
            f"picture part {number} is an image, but a video of {len(visual.frames)} frames was given; write "
            '{"type": "video"}, and give pictures in the order of the parts'
        )
    return visual


def text_of(prompt: Prompt) -> str:
    """The prompt for people."""
    return prompt if isinstance(prompt, str) else prompt.text


def as_chat(prompt: Prompt, n_pictures: int) -> Chat:
    """A text prompt as a conversation of one turn, its pictures before it."""
    if isinstance(prompt, Chat):
        return prompt
    if not prompt.strip():
        raise InputError(
            f"the prompt is {prompt!r}, expected some text: it is the context the response is read against"
        )
    pictures = [{"type": "image"}] * n_pictures
    return Chat(({"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]},))


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    if content is None:  # a turn that only calls tools
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise InputError(f"the content of a message of {message['role']!r} is {short(content)}, expected text or parts")
    return list(content)


def _plain(message: Any) -> Mapping[str, Any]:
    """A message with its parts in the form of `fastattr.parts`. Raises `InputError`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"a message is {short(message)}, expected a mapping with a role and content")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    parts = _parts(message)
    if not all(isinstance(part, Mapping) for part in parts):
        wrong = next(part for part in parts if not isinstance(part, Mapping))
        raise InputError(f"a message of {message['role']!r} holds {short(wrong)}, expected parts: mappings with a type")
    try:
        plain = [plain_part(part) for part in parts]
    except InputError as error:
        raise InputError(f"a message of {message['role']!r} holds {error}") from error
    return {**message, "content": plain}
