"""A merged tokenizer and ChatGLM3's chat format as llama.cpp reads them.

llama.cpp merges pieces as sentencepiece does, best score first, and gives the same ids, but for
control tokens. To sentencepiece they are no text. llama.cpp knows each by its text:

- it merges characters into any token of that text: people would become p eop le;
- where special tokens are allowed, as in a rendered chat, it first cuts a text at every spelling.

So a control token that merges can form gets another name (sop: <sop>), and the chat template breaks
spellings inside a message with a space, as the template of tokenizer_config.json does.
"""

import string
from typing import Any

from chatglm_ja.chatglm3.chat_format import INPUT_PREFIX, OTHER_ROLES, ROLES, SAMPLING
from chatglm_ja.chatglm3.tokenizer import EOS_ID, STOP_TOKENS

# llama.cpp, llama-cpp-python and LM Studio interpret it: only what all of them know may be used.
# The generation prompt goes on to the line break that ends an empty header, since an answer of a
# server would start with it otherwise. So the model can name no tool there, and tools are refused.
CHAT_TEMPLATE = """\
{%- macro plain(text) -%}
{%- set result = namespace(text=text) -%}
{%- for token in $spellings -%}
{%- set result.text = result.text.replace(token, token[0] ~ ' ' ~ token[1:]) -%}
{%- endfor -%}
{{- result.text -}}
{%- endmacro -%}
{%- set roles = $roles -%}
{%- if tools -%}
{{- raise_exception('this template writes no tools: describe them in a system message') -}}
{%- endif -%}
{{- '$prefix' -}}
{%- for message in messages -%}
{%- if message['role'] not in roles -%}
{{- raise_exception('role ' ~ message['role'] ~ ' does not exist: expected $role_names') -}}
{%- endif -%}
{%- if message['content'] is not string -%}
{{- raise_exception('a message has no content of type text') -}}
{%- endif -%}
{{- roles[message['role']] ~ plain(message['metadata'] or '') ~ '\\n' -}}
{%- if message['content'] -%}
{{- ' ' ~ plain(message['content']) -}}
{%- endif -%}
{%- if loop.last and message['role'] == 'assistant' and not add_generation_prompt -%}
{{- '$end' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- roles['assistant'] ~ '\\n' -}}
{%- endif -%}
"""

# Go's template language, which has no function that could break spelled tokens.
MODELFILE = '''\
FROM ./$file
TEMPLATE """$prefix{{ range .Messages }}{{ if eq .Role "tool" }}<|observation|>\
{{ else }}<|{{ .Role }}|>{{ end }}
{{ if .Content }} {{ .Content }}{{ end }}{{ end }}<|assistant|>
"""
'''


def name_tokens(proto: Any) -> list[str]:
    """Return the text of every id of a merged tokenizer (ModelProto) for llama.cpp."""
    names = [piece.piece for piece in proto.pieces]
    known = set(names)
    kinds = proto.SentencePiece

    def is_free(name: str) -> bool:
        """Return whether no other token has the name and no merge of two symbols makes it."""
        halves = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
        return name not in known and not any(
            all(len(half) == 1 or half in known for half in pair) for pair in halves
        )

    for index, piece in enumerate(proto.pieces):
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            known.discard(piece.piece)
            while not is_free(names[index]):
                names[index] = f"<{names[index]}>"
            known.add(names[index])
    return names


def write_chat_template(proto: Any) -> str:
    """Return the Jinja template whose prompts have the ids of chat_format.build_prompt_ids.

    They go on with those of the line break that begins every answer.
    """
    name_of = _control_names(proto)
    roles = {role: name_of[f"<|{role}|>"] for role in ROLES}
    roles |= {other: roles[role] for other, role in OTHER_ROLES.items()}
    return string.Template(CHAT_TEMPLATE).substitute(
        spellings=[*name_of.values()],
        roles=roles,
        role_names=", ".join(roles),
        prefix="".join(name_of[token] for token in INPUT_PREFIX),
        end=name_of[proto.pieces[EOS_ID].piece],
    )


def write_modelfile(proto: Any, file_name: str) -> str:
    """Return the Modelfile that `ollama create` reads beside a GGUF file of this name."""
    name_of = _control_names(proto)
    prefix = "".join(name_of[token] for token in INPUT_PREFIX)
    stops = [f'PARAMETER stop "{name_of[token]}"\n' for token in STOP_TOKENS]
    settings = [f"PARAMETER {name} {value}\n" for name, value in SAMPLING.items()]
    head = string.Template(MODELFILE).substitute(file=file_name, prefix=prefix)
    return "".join([head, *stops, *settings])


def _control_names(proto: Any) -> dict[str, str]:
    """Return llama.cpp's names of the tokens that are no text, by sentencepiece's."""
    kinds = proto.SentencePiece
    return {
        piece.piece: name
        for piece, name in zip(proto.pieces, name_tokens(proto), strict=True)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
    }
