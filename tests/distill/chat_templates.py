"""Chat templates with the structure of several families, and a small tokenizer that carries one."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

OPENED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = (
    "{% for call in message['tool_calls'] %}{{ '\n<tool_call>\n{\"name\": \"' + call['function']['name'] + '\", "
    "\"arguments\": ' }}{{ call['function']['arguments'] | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
)
# A system turn of its own where the chat has none.
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}" + OPENED
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN2 = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{% if message['tool_calls'] %}"
    + CALLS
    + "{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + OPENED
)
# Thoughts of turns before the last question are dropped, and an answer without any gets empty ones.
QWEN3 = (
    "{% set last = namespace(at=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set last.at = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set said = message['content'] %}"
    "{% set thought = message['reasoning_content'] or '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > last.at %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + OPENED
)
# No system role; users and assistants in turn; nothing opens the assistant's turn but what ends the user's.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# What ends the text stands behind the last turn alone.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (  # nothing that is no text
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + OPENED
)
THINKS = CHATML.replace("'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}")
SPECIAL = (
    *(
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "[INST]",
        "[/INST]",
    ),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
)
TEXT = (
    "the river runs on and over stones to the sea and hello world said more than what is the end of it assistant user "
    "system :) x:) y:)\n"
)


@lru_cache
def tokenizer_with(template, *, eos="</s>", metaspace=False, trims=False, bos=False):
    """A tokenizer of some 400 entries with a template.

    metaspace: words begin with a sign, as in SentencePiece; else bytes. trims: the places of tokens leave out spaces. bos:
    it puts one before every text.
    """
    raw = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None))
    sign = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.pre_tokenizer = sign
    raw.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    special = [*SPECIAL, *(["<unk>"] if metaspace else [])]
    alphabet = (
        sorted(set(TEXT) | set("abcdefghijklmnopqrstuvwxyz.,'#:?!{}\"_2é"))
        if metaspace
        else pre_tokenizers.ByteLevel.alphabet()
    )
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([TEXT] * 8, trainer)
    if trims:
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos)
    made.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    made.chat_template = template
    return made


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def shown(document, tokenizer):
    """A document as text, what is trained on between ⟦ and ⟧."""
    said = []
    for trained, ids in _runs(document):
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        said.append(f"⟦{text}⟧" if trained else text)
    return "".join(said)


def _runs(document):
    begin = 0
    for at in range(1, len(document.ids) + 1):
        if at == len(document.ids) or document.trained[at] != document.trained[begin]:
            yield bool(document.trained[begin]), document.ids[begin:at].tolist()
            begin = at


# Of the tiny teacher's tokenizer, which has no token of its own but the end of text.
TINY = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
