"""How much `layerskip-vllm exits` measures: options of its command line."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from layerskip_vllm.checkpoint.validation import Settings


class ExitsConfig(Settings):
    """How much is measured."""

    seq_len: int = Field(default=512, ge=1, description="tokens of a held-out sequence")
    max_held_out_tokens: int = Field(
        default=65_536, ge=1, description="most tokens to measure losses over"
    )
    num_prompts: int = Field(default=32, ge=1, description="prompts to complete")
    num_prompt_tokens: int = Field(default=128, ge=1, description="tokens of each")
    max_tokens: int = Field(default=128, ge=1, description="most tokens of a completion")
    max_num_speculative_tokens: int = Field(
        default=8, ge=1, description="K goes from 1 to this, which is below --max-tokens"
    )
    batch_size: int = Field(
        default=8,
        ge=1,
        description="sequences, or prompts, of a forward pass, of which fewer take less memory",
    )

    @model_validator(mode="after")
    def _check_drafts(self) -> Self:
        if self.max_num_speculative_tokens >= self.max_tokens:
            raise ValueError(
                f"max_num_speculative_tokens is {self.max_num_speculative_tokens}; it must be "
                f"below max_tokens, which is {self.max_tokens}, for a draft to fit in."
            )
        return self

    def check_context(self, max_position_embeddings: int | None) -> None:
        """Check that all texts fit into a model's context, if it names its length."""
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
