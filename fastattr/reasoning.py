"""Finds the reasoning that a model writes before its answer.

Each family marks reasoning in the text in its own way. A marked block counts where it is not part of an answer: at the
beginning, after other reasoning, or as a complete block from the beginning of a line on. The chat template may have
opened it in the prompt; then the response holds only its closing mark.
"""

from __future__ import annotations

import re

Span = tuple[int, int]

_MARKS = (  # what opens reasoning, and what closes it, as regular expressions
    (r"<think>", r"</think>"),  # Qwen, GLM, InternVL, Keye, MiMo, DeepSeek
    (r"<thinking>", r"</thinking>"),
    (r"<thought>", r"</thought>"),  # EXAONE
    (r"<reasoning>", r"</reasoning>"),  # LLaVA-CoT, in capitals
    (r"<seed:think>", r"</seed:think>"),
    (r"◁think▷", r"◁/think▷"),  # Kimi
    (r"\[THINK\]", r"\[/THINK\]"),  # Mistral
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command
    (r"<\|channel>thought\b", r"<channel\|>"),  # Gemma
    (r"<\|channel\|>(?:analysis|commentary)\b.*?<\|message\|>", r"<\|end\|>(?:<\|start\|>assistant)?"),  # gpt-oss
    (r"<\|channel\|>final", r"<\|message\|>"),  # header of the answer of gpt-oss
)
_ALONE = len(_MARKS) - 2  # the closing marks of the last two pairs are also used elsewhere, so need their opening
_FLAGS = re.IGNORECASE | re.DOTALL
_PAIRS = [(re.compile(opening, _FLAGS), re.compile(closing, _FLAGS)) for opening, closing in _MARKS]
_ANY_OPENING = re.compile("|".join(f"(?:{opening})" for opening, _ in _MARKS), _FLAGS)
_LINE_OPENING = re.compile(rf"^[ \t]*(?={_ANY_OPENING.pattern})", _FLAGS | re.MULTILINE)
_SPACE = re.compile(r"\s*")
_ANSWER = re.compile(r"\s*(?:\n|\Z)|[\w{\[`*#<]")  # what may follow a closing mark without its opening


def find_reasoning(text: str, prompt_end: str = "") -> tuple[Span, ...]:
    """Half-open character ranges of a response that are reasoning, marks included, in order.

    Args:
        prompt_end: the end of the text before the response; reasoning opened there continues in the response.
    """
    spans = []
    at = _first_end(text, prompt_end)
    if at:
        spans.append((0, at))
    while at < len(text):
        start = _end(_SPACE, text, at)
        block = _block(text, start)
        if block is None:
            break
        at = len(text) if block < 0 else block
        spans.append((start, at))
    while line := _LINE_OPENING.search(text, at):
        block = _block(text, line.end())
        at = line.end() + 1
        if block is not None and block > 0:
            spans.append((line.end(), block))
            at = block
    return tuple(spans)


def _first_end(text: str, prompt_end: str) -> int:
    """Where reasoning that began before the response ends; 0 where none did."""
    before = prompt_end.rstrip()
    for opening, closing in _PAIRS:
        if any(match.end() == len(before) for match in opening.finditer(before)):
            found = closing.search(text)
            return len(text) if found is None else found.end()
    if text.lstrip().startswith("{"):  # JSON whose strings hold the mark
        return 0
    ends = [match for _, closing in _PAIRS[:_ALONE] for match in closing.finditer(text) if _is_border(text, match)]
    first = min(ends, key=lambda match: match.start(), default=None)
    return 0 if first is None or _ANY_OPENING.search(text, 0, first.start()) else first.end()


def _is_border(text: str, mark: re.Match[str]) -> bool:
    """Whether a closing mark separates two texts, instead of being mentioned in a sentence."""
    begins_line = not text[: mark.start()].rpartition("\n")[2].strip()
    return begins_line or _ANSWER.match(text, mark.end()) is not None


def _block(text: str, start: int) -> int | None:
    """Where the reasoning that opens at `start` ends; -1 where it is never closed, None where none opens there."""
    for opening, closing in _PAIRS:
        if begun := opening.match(text, start):
            ended = closing.search(text, begun.end())
            return -1 if ended is None else ended.end()
    return None


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()
