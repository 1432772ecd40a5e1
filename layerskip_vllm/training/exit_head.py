"""Any layer of a Hugging Face model through the model's own head; called by `exit_evaluation`."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from layerskip_vllm.training.decoder import capture_layer_outputs, find_decoder_parts

MAX_LOGITS_AT_ONCE = 2**25  # 128 MiB in float32; a loss takes as much again


class ExitHead:
    """Unembeds any layer's output as the model does its last layer's.

    Done as `DecoderParts.compute_logits` does, in parts that fit in memory. `ValueError` if the
    model's logits are not what this makes of its last layer's output.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parts = find_decoder_parts(model)
        self.chunk_size = max(1, MAX_LOGITS_AT_ONCE // model.config.vocab_size)
        self._check()

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `[num_tokens, vocab_size] float32` from a layer's `[num_tokens, hidden_size]`."""
        return self.parts.compute_logits(hidden_states[None])[0].float()

    def iter_logits(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the same in parts of at most `chunk_size` tokens, so that they fit in memory."""
        for chunk in torch.split(hidden_states, self.chunk_size):
            yield self.logits(chunk)

    def run_layers(self, token_ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return layer index to x_{l+1}, `[batch_size, seq_len, hidden_size]`."""
        layers = self.parts.layers
        with capture_layer_outputs(layers, range(len(layers))) as outputs:
            self.parts.decoder(input_ids=token_ids, use_cache=False)
        return outputs

    @torch.inference_mode()
    def _check(self) -> None:
        token_ids = torch.arange(8, device=self.model.device)[None]
        expected = self.model(input_ids=token_ids, use_cache=False).logits[0].float()
        logits = self.logits(self.run_layers(token_ids)[len(self.parts.layers) - 1][0])
        if not torch.allclose(logits, expected, rtol=0, atol=0.01 * float(expected.abs().max())):
            raise ValueError(
                f"model is a {type(self.model).__name__}, whose logits are not its last layer's "
                "output through model.norm and its head; its exits cannot be read."
            )
