"""`distill generate`: a student goes on with a text, word by word."""

from pathlib import Path

import torch

from distill.errors import UserError
from distill.evaluate.target import load_student


def generate(target: Path, prompt: str, *, tokens: int, chat: bool, temperature: float) -> str:
    """Print what a student says, as it says it, and return it.

    Args:
        target: a run folder or a student's folder. temperature: 0 takes the likeliest token.

    Raises:
        UserError: no finished student there, or a chat asked of a tokenizer without a template.
    """
    from transformers import AutoTokenizer, TextStreamer

    path = target / "student" if (target / "recipe.yaml").is_file() else target
    if not path.exists():
        raise UserError(f"{target} has no finished student; is it a run folder, and is the run over?")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = load_student(path).to(device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if chat:
        if tokenizer.chat_template is None:
            raise UserError(f"the tokenizer of {path} has no chat template; leave out --chat")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    out = student.generate(
        **inputs, max_new_tokens=tokens, streamer=streamer, pad_token_id=tokenizer.pad_token_id, **sampling
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
