"""Chat templates in the styles of the usual model families, written after their public formats,
with the control tokens that their tokenizers have.
"""

from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.text import make_tokenizer


@dataclass(frozen=True)
class Style:
    """A template, and its tokens.

    Args:
        template: The template.
        special: Control tokens that are flagged special.
        plain: Control tokens that are not.
        bos: Begins a text.
        eos: Ends one.
    """

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    bos: str = "<s>"
    eos: str = "</s>"


CHATML = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
LLAMA2 = """\
{%- if messages[0].role == 'system' %}{%- set system = '<<SYS>>\n' + messages[0].content + \
'\n<</SYS>>\n\n' %}{%- set rest = messages[1:] %}{%- else %}{%- set system = '' %}\
{%- set rest = messages %}{%- endif %}\
{%- for m in rest %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{- raise_exception('roles must alternate') }}{%- endif %}\
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + ((system if loop.first else '') + m.content) \
| trim + ' [/INST]' }}{%- else %}{{- ' ' + m.content | trim + ' ' + eos_token }}{%- endif %}\
{%- endfor %}"""
LLAMA3 = """\
{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + \
'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\
{%- endif %}"""
# The date, and tools in the first user turn.
LLAMA31 = """\
{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') \
%}{%- endif %}\
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}\
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}\
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + \
'<|eot_id|>' }}\
{%- for m in messages %}\
{%- if m.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + \
m.content | tojson + '<|eot_id|>' }}\
{%- elif 'tool_calls' in m %}{%- if m.tool_calls | length != 1 %}\
{{- raise_exception('only single tool calls') }}{%- endif %}{%- set call = \
m.tool_calls[0].function %}\
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + \
'", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}\
{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}\
{%- if tools and loop.first %}{%- for tool in tools %}{{- tool | tojson + '\n\n' }}{%- endfor %}\
{%- endif %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\
{%- endif %}"""
# The system message and the tools stand in the last user turn.
MISTRAL = """\
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}\
{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}\
{%- set last = namespace(user=-1) %}{%- for m in rest %}{%- if m.role == 'user' %}\
{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}{{- bos_token }}\
{%- for m in rest %}{%- if m.role == 'user' %}{%- if loop.index0 == last.user %}\
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}\
{%- if system is defined %}{{- '[INST]' + system + '\n\n' + m.content + '[/INST]' }}\
{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}\
{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}\
{%- elif m.tool_calls is defined %}{{- '[TOOL_CALLS][' }}{%- for c in m.tool_calls %}\
{{- c.function | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}\
{{- ']' + eos_token }}\
{%- elif m.role == 'assistant' %}{{- m.content + eos_token }}\
{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS]{"content": ' + m.content + '}[/TOOL_RESULTS]' }}\
{%- else %}{{- raise_exception('only user, assistant and tool roles') }}{%- endif %}\
{%- endfor %}"""
GEMMA = """\
{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}\
{{- raise_exception('System role not supported') }}{%- endif %}\
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{- raise_exception('roles must alternate') }}{%- endif %}\
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + \
m.content | trim + '<end_of_turn>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
PHI3 = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
# Reasoning is taken out of the content, dropped before the last question, and written again after
# it; an answer without any gets an empty block.
QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}\
{{- messages[0].content + '\n\n' }}{%- endif %}{{- '# Tools\n<tools>' }}{%- for tool in tools %}\
{{- '\n' + tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}\
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + \
'<|im_end|>\n' }}{%- endif %}\
{%- set ns = namespace(query=-1) %}{%- for m in messages %}{%- if m.role == 'user' and not \
(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}\
{%- set ns.query = loop.index0 %}{%- endif %}{%- endfor %}\
{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}\
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}\
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}\
{%- elif m.role == 'assistant' %}{%- set reasoning = '' %}\
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}\
{%- elif '</think>' in content %}\
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}\
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}\
{%- if loop.index0 > ns.query and (loop.last or reasoning) %}\
{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + \
content.lstrip('\n') }}\
{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}\
{%- for call in m.tool_calls or [] %}{%- if (loop.first and content) or not loop.first %}\
{{- '\n' }}{%- endif %}{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + \
call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}\
{%- elif m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}\
{{- '<|im_start|>user' }}{%- endif %}{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}\
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}\
{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}\
{%- if enable_thinking is defined and enable_thinking is false %}\
{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"""
# Reasoning is cut from every answer.
R1 = """\
{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}\
{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}\
{%- else %}{%- set content = m.content %}{%- if '</think>' in content %}\
{%- set content = content.split('</think>')[-1] %}{%- endif %}\
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}"""
R1_OPEN = R1.replace("{{- '<｜Assistant｜>' }}", "{{- '<｜Assistant｜><think>\\n' }}")
ZEPHYR = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""
COMMAND_R = """\
{{- bos_token }}{%- for m in messages %}{{- '<|START_OF_TURN_TOKEN|>' + {'user': \
'<|USER_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] + \
m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"""
# Answers have channels, which the model itself opens.
HARMONY = """\
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}\
{%- for m in messages %}{%- if m.role == 'assistant' %}{%- if m.thinking and loop.last %}\
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}\
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last and \
not add_generation_prompt else '<|end|>') }}\
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}\
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
# Its switch also writes a word into the user's turn.
GLM = """\
{{- '[gMASK]<sop>' }}{%- for m in messages %}{%- if m.role == 'assistant' %}\
{{- '<|assistant|>' }}{%- set content = m.content %}{%- set reasoning = '' %}\
{%- if '</think>' in content %}{%- set reasoning = \
content.split('</think>')[0].split('<think>')[-1] %}\
{%- set content = content.split('</think>')[-1] %}{%- endif %}\
{{- '\n<think>' + (reasoning.strip() if loop.last else '') + '</think>' }}\
{%- if content.strip() %}{{- '\n' + content.strip() }}{%- endif %}\
{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- if m.role == 'user' and enable_thinking is \
defined and not enable_thinking and not m.content.endswith('/nothink') %}{{- '/nothink' }}\
{%- endif %}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- if enable_thinking is defined and not \
enable_thinking %}{{- '\n<think></think>' }}{%- endif %}{%- endif %}"""

HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK = ("<think>", "</think>")
SENTENCES = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
STYLES = {
    "chatml": Style(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama2": Style(LLAMA2, ()),
    "llama3": Style(LLAMA3, HEADERS),
    "llama3.1": Style(LLAMA31, HEADERS),
    "mistral": Style(
        MISTRAL,
        (
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
    ),
    "gemma": Style(GEMMA, ("<start_of_turn>", "<end_of_turn>"), bos="<bos>"),
    "phi3": Style(PHI3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|tool|>")),
    "qwen3": Style(
        QWEN3,
        ("<|im_start|>", "<|im_end|>"),
        (*THINK, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        eos="<|im_end|>",
    ),
    "r1": Style(R1, SENTENCES, THINK, SENTENCES[0], SENTENCES[1]),
    "r1_open": Style(R1_OPEN, SENTENCES, THINK, SENTENCES[0], SENTENCES[1]),
    "zephyr": Style(ZEPHYR, ()),
    "command_r": Style(
        COMMAND_R,
        (
            *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "harmony": Style(
        HARMONY,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        eos="<|return|>",
    ),
    "glm": Style(
        GLM,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
        THINK,
        eos="<|endoftext|>",
    ),
}


def style_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a template of `STYLES` and its control tokens."""
    style = STYLES[name]
    tokenizer = make_tokenizer(None)
    words = dict.fromkeys((*style.special, style.bos, style.eos))
    tokenizer.add_tokens([AddedToken(word, special=True) for word in words], special_tokens=True)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in style.plain])
    tokenizer.bos_token = style.bos
    tokenizer.eos_token = style.eos
    tokenizer.chat_template = style.template
    return tokenizer
