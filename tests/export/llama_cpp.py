"""llama.cpp's tokenizer of the type llama, in Python: what a GGUF file's tokens mean to it.

After llm_tokenizer_spm_session and tokenizer_st_partition in llama.cpp's src/llama-vocab.cpp. Any
two neighboring symbols whose text is a token's merge, whatever the token's type, best score first.
"""

import heapq
import re
from dataclasses import dataclass, field
from typing import Any

UNKNOWN, CONTROL = 2, 3
SPACE = "\u2581"


@dataclass
class LlamaTokenizer:
    names: list[str]
    scores: list[float]
    types: list[int]
    id_of: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.id_of = {name: index for index, name in enumerate(self.names)}
        special = [
            n for n, t in zip(self.names, self.types, strict=True) if t in (CONTROL, UNKNOWN)
        ]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @classmethod
    def read(cls, reader: Any) -> "LlamaTokenizer":
        """Take the tokens of a GGUF file, an open gguf.GGUFReader."""
        tokens, scores, types = (
            reader.get_field(f"tokenizer.ggml.{name}").contents()
            for name in ("tokens", "scores", "token_type")
        )
        return cls(tokens, scores, types)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Tokenize as /tokenize does; `special` as a rendered chat, whose tokens are read."""
        ids = []
        for part in self._special.split(text) if special else [text]:
            if special and self._special.fullmatch(part):
                ids.append(self.id_of[part])
            elif part:  # add_space_prefix: every stretch follows the start or a special token
                ids += self._merge(list((" " + part).replace(" ", SPACE)))
        return ids

    def _merge(self, symbols: list[str]) -> list[int]:
        after = [*range(1, len(symbols)), -1]
        before = [*range(-1, len(symbols) - 1)]
        queue: list[tuple[float, int, int, int]] = []

        def add(left: int, right: int) -> None:
            if left == -1 or right == -1:
                return
            index = self.id_of.get(symbols[left] + symbols[right])
            if index is not None:
                size = len(symbols[left]) + len(symbols[right])
                heapq.heappush(queue, (-self.scores[index], left, right, size))

        for left in range(len(symbols) - 1):
            add(left, left + 1)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            parts = symbols[left], symbols[right]
            if not all(parts) or sum(map(len, parts)) != size:
                continue
            symbols[left], symbols[right] = "".join(parts), ""
            after[left] = after[right]
            if after[right] != -1:
                before[after[right]] = left
            add(before[left], left)
            add(left, after[left])
        ids = []
        for symbol in filter(None, symbols):
            whole = self.id_of.get(symbol)
            spelled = [f"<0x{byte:02X}>" for byte in symbol.encode()]
            ids += [self.id_of[name] for name in spelled] if whole is None else [whole]
        return ids
