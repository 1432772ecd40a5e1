"""The prompts that `layerskip-vllm verify` completes: its own, or cut from the user's text."""

from __future__ import annotations

from collections.abc import Sequence

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


def cut_prompts(documents: Sequence[str], num_prompts: int, num_prompt_tokens: int) -> list[str]:
    """Cut texts into prompts, from places spread evenly over all of them.

    Args:
        documents: The texts.
        num_prompts: How many prompts.
        num_prompt_tokens: Their length; the engine cuts them to it, these are somewhat longer.

    Returns:
        The prompts.

    Raises:
        ValueError: If there is too little text.
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
    return [pieces[index * len(pieces) // num_prompts] for index in range(num_prompts)]


def choose_prompts(
    documents: Sequence[str] | None, num_prompts: int, num_prompt_tokens: int
) -> list[str]:
    """Take the built-in prompts, or cut the user's texts.

    Args:
        documents: The user's texts, None for the built-in ones.
        num_prompts: How many prompts.
        num_prompt_tokens: Their length, for texts that are to be cut.

    Returns:
        The prompts.

    Raises:
        ValueError: If there are too few.
    """
    if documents is not None:
        return cut_prompts(documents, num_prompts, num_prompt_tokens)
    if num_prompts > len(BUILT_IN):
        raise ValueError(
            f"num_prompts is {num_prompts}; without data it must be at most {len(BUILT_IN)}, the "
            "number of built-in prompts."
        )
    return list(BUILT_IN[:num_prompts])
