"""`layerskip-vllm draft-vocab MODEL --data ...`: the tokens that drafts choose among."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from typing_extensions import override

from layerskip_vllm.checkpoint.draft_vocab import DraftVocab, save_draft_vocab
from layerskip_vllm.tools.command_line import Command, Option
from layerskip_vllm.tools.draft_vocab.coverage import (
    TokenCounts,
    count_tokens,
    find_coverage,
    parse_size,
    rank_tokens,
)
from layerskip_vllm.tools.output import make_console

if TYPE_CHECKING:
    from rich.table import Table

SIZES = ("100%", "50%", "25%", "12.5%", "6.25%")


class DraftVocabCommand(Command):
    """Choose the tokens that drafts choose among: the most frequent of a text, or of answers.

    Prints what share of held-out text they are, for each kind of text and for several sizes, and
    writes the file that the setting `draft_vocab` takes. The exit status is 2 on an error.
    """

    summary: ClassVar = "choose the tokens that drafts choose among, for a smaller head"
    extra: ClassVar = "draft-vocab"

    model: Annotated[str, Option(metavar="MODEL", is_positional=True)] = Field(
        description="a checkpoint's folder or name"
    )
    data: Annotated[tuple[str, ...], Option(metavar="FILE_OR_FOLDER")] = Field(
        description="text like what will be generated, each name a kind of its own: text files, "
        ".jsonl files whose objects have a 'text', or folders of them; 'stdlib' for held-out files "
        "of Python's standard library"
    )
    size: Annotated[str, Option(metavar="SIZE")] = Field(
        default="12.5%", description="how many tokens: a number, or a share of the vocabulary"
    )
    output: Path = Field(default=Path("draft_vocab.json"), description="where they are written")
    url: Annotated[str | None, Option(metavar="URL")] = Field(
        default=None,
        description="a running server of the model, such as http://127.0.0.1:8000: its answers to "
        "prompts cut from the data are counted, not the data",
    )
    num_prompts: int = Field(default=64, ge=1, description="for --url: prompts of each kind")
    max_tokens: int = Field(default=256, ge=1, description="for --url: tokens of an answer")

    @override
    def run(self) -> int:
        from transformers import AutoConfig, AutoTokenizer

        vocab_size = AutoConfig.from_pretrained(self.model).get_text_config().vocab_size
        size = parse_size(self.size, vocab_size)
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        kinds = {name: count_tokens(self._read_tokens(name, tokenizer)) for name in self.data}
        counted: Counter[int] = sum((counts.counted for counts in kinds.values()), Counter())
        ranked = rank_tokens(counted, vocab_size)
        save_draft_vocab(
            self.output, DraftVocab(vocab_size=vocab_size, token_ids=tuple(ranked[:size]))
        )
        sizes = {size, *(parse_size(share, vocab_size) for share in SIZES)}
        console = make_console()
        console.print(_build_coverage_table(ranked, sorted(sizes, reverse=True), kinds))
        console.print(f"Written: {self.output}, {size:,} of {vocab_size:,} tokens", soft_wrap=True)
        return 0

    def _read_tokens(self, name: str, tokenizer: Any) -> list[int]:
        """Read a kind of text, or have it answered, as tokens."""
        from layerskip_vllm.tools.text import encode_documents, read_documents

        documents = read_documents([name])
        if self.url is None:
            token_ids: list[int] = encode_documents(tokenizer, documents).token_ids.tolist()
            return token_ids
        from layerskip_vllm.tools.draft_vocab.answers import collect_answers
        from layerskip_vllm.tools.prompts import cut_prompts

        prompts = cut_prompts(documents, self.num_prompts, num_prompt_tokens=128)
        return collect_answers(self.url, prompts, self.max_tokens)


def _build_coverage_table(
    ranked: list[int], sizes: list[int], kinds: Mapping[str, TokenCounts]
) -> Table:
    """Lay out a size a line, and what share of each kind of held-out text it covers."""
    from rich.table import Table

    table = Table(title="share of held-out text that the most frequent tokens are")
    for heading in ("tokens", "of all", *kinds):
        table.add_column(heading, justify="right")
    for size in sizes:
        shares = (find_coverage(ranked[:size], counts.held_out) for counts in kinds.values())
        cells = (f"{share:.1%}" for share in (size / len(ranked), *shares))
        table.add_row(f"{size:,}", *(cell.replace("%", " %") for cell in cells))
    return table
