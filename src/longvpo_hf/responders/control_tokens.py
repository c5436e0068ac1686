"""What looks like a control token of some model, where it is not known which model reads it.

Prompts for a server are sent as text, which it parses with a tokenizer of its own: there, such letters are parted by a
space. Texts that a model wrote are dropped for them by name (`building/filters.py`): a server or a template leaked
them, and whoever trains on the rows may parse them. Models of this process need neither, see `families/encoding.py`.
"""

from __future__ import annotations

import re

#: The forms of Qwen, Llama 3, GLM, Phi and DeepSeek; those of Llama 2 and Mistral; and by name what Gemma, SmolVLM,
#: InternVL, LLaVA and Molmo write like tags, since an answer may well name a tag of HTML.
_CONTROL_TOKEN = re.compile(
    r"<(?=[|｜][^|｜<>\n]{1,64}[|｜]?>|[^|｜<>\s]{1,64}[|｜]>)"
    r"|<(?=/?(?:s|bos|eos|pad|unk|mask|sop|eop|img|image|video|audio|image_soft_token|(?:start|end)_of_(?:image|turn|audio)"
    r"|end_of_utterance|IMG_CONTEXT|image_pad|video_pad|fake_token_around_image|global-img"
    r"|(?:low_res_)?im_(?:start|end|patch|col|low)|frame_(?:start|end)|row_\d{1,3}_col_\d{1,3})>)"
    r"|<(?=</?SYS>>)"
    r"|\[(?=/?(?:INST|IMG|IMG_BREAK|IMG_END|gMASK|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])",
    re.IGNORECASE,
)


def holds_control_token(text: str) -> bool:
    """Whether a text holds what models read as more than text."""
    return _CONTROL_TOKEN.search(text) is not None


def parted(text: str) -> str:
    """The text with a space after the first character of each control token, which makes it plain text."""
    return _CONTROL_TOKEN.sub(r"\g<0> ", text)
