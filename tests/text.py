"""A small tokenizer, chat templates of the usual kinds, files and a model folder, for tests on
text.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    (
        "How do I bake bread? Mix flour with water and salt, let the dough rise, then bake it for"
        " forty minutes."
    ),
    (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request."
    ),
    (
        "system user assistant model You are a helpful assistant. Peel two apples and cut the"
        " butter into small cubes."
    ),
    (
        "Name a soup. Tomato soup with basil. I would rather not talk about recipes, sorry. 12"
        " eggs, 3 cups: 1,000 g!"
    ),
]
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
]

# As SmolLM2-135M-Instruct has it: a default system prompt, no generation markers, a line break
# after the end token.
CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
'<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# As Llama 3 has it: BOS in the template, content stripped, nothing after the end token.
LLAMA3 = """\
{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + \
'<|end_header_id|>\n\n'+ message['content'] \
| trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif \
%}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif \
%}"""
# As Gemma has it: no system role, turns must alternate, the assistant is called model.
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not \
supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% \
endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = \
message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
# With markers around what the model writes.
MARKED = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] \
== 'assistant' %}{% generation %}\
{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + \
'<|im_end|>' }}{% endif %}{{ '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# As Llama 2 has it: a blank before the end token; the system message inside the first user turn.
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = \
messages[0]['content'] %}{% else %}\
{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}{% if \
loop.index0 == 0 and system %}\
{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set \
content = message['content'] %}\
{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' \
[/INST]' }}{% else %}\
{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
# Ends answers with nothing at all.
BARE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{%"
    " endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "marked": MARKED,
    "llama2": LLAMA2,
    "bare": BARE,
}
BOS = {"gemma": "<bos>"}  # else <s>


@functools.cache
def _backend(adds_bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return tokenizer.to_str()


def make_tokenizer(
    template: str | None = "chatml", adds_bos: bool = False, **settings: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a template of `TEMPLATES`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(adds_bos)),
        **{
            "bos_token": BOS.get(str(template), "<s>"),
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
        }
        | settings,
    )
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def model_folder(folder: Path, template: str = "chatml") -> Path:
    """A Llama with random weights, and the tokenizer beside it; without pad token, as many have
    none.
    """
    tokenizer = make_tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Rows as JSON lines; the path, as a flag takes it."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)
