"""Prompts: built in, cut from a user's text, or from held-out code of the standard library.

`verify` and `soak` ask the first, `verify` the second, the demo and the benchmarks the third.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from pathlib import Path

from layerskip_vllm.tools.stdlib_corpus import held_out_files

# More than the tokens of a prompt have in any usual tokenizer.
_CHARACTERS_PER_TOKEN = 6

BUILT_IN = (
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n",
    "The capital of France is Paris. The capital of Italy is",
    "import json\n\n\ndef load_config(path):\n    with open(path) as file:\n",
    "Once upon a time, in a village at the foot of a mountain, there lived a clockmaker who",
    "Q: A train leaves at 9:40 and arrives at 12:15. How long does the journey take?\nA:",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "Water boils at 100 degrees Celsius at sea level because",
    "Dear Ms. Keller,\n\nthank you for your letter of 3 March. We are sorry to hear that",
    "SELECT name, COUNT(*) FROM orders JOIN customers ON",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "The following is a list of the planets of the solar system:\n1. Mercury\n2.",
    "for i in range(1, 101):\n    if i % 15 == 0:\n        print('FizzBuzz')\n    elif",
    "Recipe for pancakes\n\nIngredients:\n- 200 g of flour\n- 3 eggs\n-",
    "In 1969 the first people landed on the moon. The mission was called",
    '{"name": "Ada Lovelace", "born": 1815, "occupation": ',
    "To compute the greatest common divisor of two numbers, Euclid's algorithm repeats",
)


def spread_evenly(num_places: int, num_chosen: int) -> list[int]:
    """Return `num_chosen` of the places 0 to `num_places` - 1, as far apart as they can be."""
    return [index * num_places // num_chosen for index in range(num_chosen)]


def cut_prompts(documents: Sequence[str], num_prompts: int, num_prompt_tokens: int) -> list[str]:
    """Cut texts into prompts, from places spread evenly over all of them.

    They are somewhat longer than `num_prompt_tokens`, to which the engine cuts them. A ValueError
    says that there is too little text.
    """
    length = num_prompt_tokens * _CHARACTERS_PER_TOKEN
    pieces = [
        piece
        for document in documents
        for start in range(0, len(document), length)
        if (piece := document[start : start + length]).strip()
    ]
    if len(pieces) < num_prompts:
        raise ValueError(
            f"num_prompts is {num_prompts}, but data has text for {len(pieces)}; ask for fewer or "
            "name more text."
        )
    return [pieces[index] for index in spread_evenly(len(pieces), num_prompts)]


def choose_prompts(
    documents: Sequence[str] | None, num_prompts: int, num_prompt_tokens: int
) -> list[str]:
    """Take the built-in prompts, or cut the user's texts; too few are a ValueError."""
    if documents is not None:
        return cut_prompts(documents, num_prompts, num_prompt_tokens)
    if num_prompts > len(BUILT_IN):
        raise ValueError(
            f"num_prompts is {num_prompts}; without data it must be at most {len(BUILT_IN)}, the "
            "number of built-in prompts."
        )
    return list(BUILT_IN[:num_prompts])


def held_out_prompts(
    num_prompts: int, max_prompt_chars: int = 800, root: Path | None = None
) -> list[str]:
    """Return prompts cut from held-out code where a function's body is about to begin.

    A prompt ends with a function's header, or with its docstring where it has one: a completion is
    the function's body. It ends before the line break, since a tokenizer joins that and the next
    line's indentation into one token, and starts at the first whole line of the last
    `max_prompt_chars`. The functions are spread evenly over the files, in the order of their paths.
    A ValueError says that the files, the running interpreter's where `root` is None, have fewer
    places to cut.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts must be at least 1, got {num_prompts}.")
    places = [
        (file, offset)
        for file in held_out_files(root)
        for offset in _function_body_offsets(file.text)
        if offset >= max_prompt_chars // 4
    ]
    if len(places) < num_prompts:
        raise ValueError(
            f"num_prompts must be at most {len(places)}, the places to cut in the held-out files, "
            f"got {num_prompts}."
        )
    chosen = [places[index] for index in spread_evenly(len(places), num_prompts)]
    return [_cut_prompt(file.text, offset, max_prompt_chars) for file, offset in chosen]


def _function_body_offsets(text: str) -> list[int]:
    """Return where each function's header and docstring end, the offset of the line break."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return []
    line_starts = [0, *itertools.accumulate(len(line) + 1 for line in text.split("\n"))]
    offsets = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0]
        if ast.get_docstring(node, clean=False) is not None:
            if len(node.body) > 1:
                offsets.append(line_starts[first.end_lineno or first.lineno] - 1)
        elif first.lineno > node.lineno:
            offsets.append(line_starts[first.lineno - 1] - 1)
    return sorted(offsets)


def _cut_prompt(text: str, offset: int, max_prompt_chars: int) -> str:
    start = max(0, offset - max_prompt_chars)
    if start > 0:
        line_break = text.find("\n", start - 1, offset - 1)
        start = line_break + 1 if line_break >= 0 else start
    return text[start:offset].rstrip()
