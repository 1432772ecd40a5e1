"""How much `layerskip-vllm exits` measures; plain Python, for the command line to import."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from layerskip_vllm.checkpoint.checks import check_positive_int


@dataclass(frozen=True)
class ExitsConfig:
    """How much is measured; the command line sets each field by its name.

    Attributes:
        seq_len: Tokens of a held-out sequence.
        max_held_out_tokens: Limit of the tokens that losses and agreements are measured over.
        num_prompts: Prompts to complete.
        num_prompt_tokens: Tokens of each.
        max_tokens: Limit of a completion's tokens.
        max_num_speculative_tokens: K goes from 1 to this.
        batch_size: Sequences, or prompts, of a forward pass.

    Raises:
        ValueError: If a number is not an integer of at least 1, or no draft of the longest kind
            fits into a completion.
    """

    seq_len: int = 512
    max_held_out_tokens: int = 65_536
    num_prompts: int = 32
    num_prompt_tokens: int = 128
    max_tokens: int = 128
    max_num_speculative_tokens: int = 8
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_positive_int(name, value)
        if self.max_num_speculative_tokens >= self.max_tokens:
            raise ValueError(
                f"max_num_speculative_tokens is {self.max_num_speculative_tokens}; it must be "
                f"below max_tokens, which is {self.max_tokens}, for a draft to fit in."
            )

    def check_context(self, max_position_embeddings: int | None) -> None:
        """Checks that all texts fit into a model's context.

        Args:
            max_position_embeddings: The context's length; None if the model names none.

        Raises:
            ValueError: If some do not.
        """
        if max_position_embeddings is None:
            return
        if self.seq_len > max_position_embeddings:
            raise ValueError(
                f"seq_len is {self.seq_len}; it must be at most {max_position_embeddings}, the "
                "length of the model's context."
            )
        if self.num_prompt_tokens + self.max_tokens > max_position_embeddings:
            raise ValueError(
                f"num_prompt_tokens and max_tokens are {self.num_prompt_tokens} and "
                f"{self.max_tokens}; together they must be at most {max_position_embeddings}, the "
                "length of the model's context."
            )
