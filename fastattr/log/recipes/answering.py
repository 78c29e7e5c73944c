"""What every recipe needs and yours has already: a picture and a question to the inputs of `generate`, and its text."""

from __future__ import annotations

from typing import Any

from PIL import Image

import fastattr
from fastattr.demo.scenes import make_scene
from fastattr.log import AttributionLogger

PROMPT = "Describe the image."
GREEDY = {"max_new_tokens": 64, "do_sample": False}
MIN_SIDE, MAX_RATIO = 32, 64  # pixels; the longer side over the shorter one


def inputs_of(model: fastattr.Model, picture: Image.Image, prompt: str = PROMPT) -> Any:
    """What `generate` takes: the chat template around the prompt, tokenised, beside the picture's pixels.

    Raises:
        ValueError: the picture is too small or too long for most models, or the processor refuses it or the prompt.
    """
    width, height = picture.size
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"the picture has {width} x {height} pixels, expected sides of at least {MIN_SIDE}, the longer one at most "
            f"{MAX_RATIO} times the shorter one"
        )
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = model.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return model.processor(text=[text], images=[picture], return_tensors="pt")


def text_of(model: fastattr.Model, inputs: Any, out: Any) -> str:
    """The answer alone, from the sequence `[1 seq]` that begins with the prompt."""
    answer = out[0, inputs["input_ids"].shape[1] :]
    return str(model.processor.tokenizer.decode(answer, skip_special_tokens=True))


def log_scenes(model: fastattr.Model, logger: AttributionLogger, n: int, **metadata: Any) -> None:
    """Stands for traffic: answer about `n` made-up pictures and submit what was captured."""
    for seed in range(n):
        picture = make_scene(seed).image
        inputs = inputs_of(model, picture)
        with fastattr.capture(model, buffer=logger.buffer) as states:
            out = model.hf_model.generate(**inputs, **GREEDY)
        logger.submit(states, out, request_id=f"scene-{seed}", images=[picture], prompt=PROMPT, metadata=metadata)
