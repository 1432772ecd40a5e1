"""Writes the model card of a checkpoint that `pretrain` made, beside a plain run's losses.

`python -m checkpoints.stdlib.model_card checkpoints/stdlib-24l --plain build/stdlib-24l-plain`
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from layerskip_vllm.tools.prompts import held_out_prompts
from layerskip_vllm.training.exit_evaluation import complete_greedily

_CARD = """\
---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
tags: [layerskip, speculative-decoding, vllm, tiny]
---

# {name}

A Llama-architecture model of {num_layers} layers and {num_parameters:,} parameters, made so that
LayerSkip self-speculative decoding can be tried, tested and measured without a download or a GPU.
It has learned what Python looks like, and nothing else: do not use what it writes.

Its first {exit_layer} layers draft and the whole model verifies: `config.json` has
`"layerskip": {layerskip}`.

## Data

The source of the standard library of CPython {python}, by its authors under the
[PSF license](https://docs.python.org/3/license.html), as it comes with the interpreter: no tests,
no tables, no third-party code. One file in 16, by a hash of its path, is held out; every number
below is measured on those files. `layerskip_vllm/tools/stdlib_corpus.py` says which they are.

| | tokens | sha256 |
|---|---|---|
| training files | {num_corpus_tokens:,} | `{train_sha256}` |
| held-out files | {num_held_out_tokens:,} | `{held_out_sha256}` |

The tokenizer is a byte-level BPE of {vocab_size:,} tokens, trained on the training files.

## Recipe

```
python -m checkpoints.stdlib.pretrain --out {out}
```

One CPU thread, {num_training_tokens:,} tokens in {num_steps:,} steps: {training_cpu_seconds:,} CPU
seconds ({training_seconds:,} seconds on a shared machine), in bfloat16 autocast with torch {torch};
the weights are float32. Seeds, data order and draws are fixed: short runs of this command, repeated
on one machine, gave equal weights to the bit. Another CPU or torch may round otherwise.

- Early exit loss: exits {min_exit_layer} to {exit_layer} and every multiple of {exit_interval}
  above, each at e_scale {e_scale} against 1 for the last layer, rotating with R = {rotation}, the
  last layer always on. Differs from [the paper](https://arxiv.org/abs/2404.16710): its e(l) gives
  an early exit too small a share for so few tokens.
- In the last {num_distill_steps:,} steps exit {exit_layer} alone has a loss besides the last layer,
  at every step and at {distill_scale} against 1. It learns what the last layer predicts instead of
  the text, since that is what its drafts are accepted by. This differs from the paper as well.
- Layer dropout: per sample, exponential over depth to {max_drop_prob}, exponential over time.
- In the first {num_growth_steps:,} steps only the first {num_first_layers} layers run; the others
  then join as copies of them. This saves time, and the plain run below does the same.

## Results

Held-out loss of the last layer, in nats per token, against the same model trained for the same
steps without layer dropout and early exit loss (`--no-recipe`):

| | held-out loss | perplexity |
|---|---|---|
| this model | {loss:.4f} | {perplexity:.2f} |
| plain run | {plain_loss:.4f} | {plain_perplexity:.2f} |
| difference | {difference:+.1%} | |

By exit, drafting K = {num_speculative_tokens} tokens a round, over greedy completions of
{num_prompts} held-out prompts by at most {num_new_tokens} tokens. Accepted is accepted tokens over
drafted ones; by position is the share of rounds in which that draft was accepted.

{exit_table}

The last steps train E = {exit_layer}, and it shows. `training.json` has every exit's loss, both
runs' settings and times.
These acceptance rates are for greedy decoding of a model that repeats itself, which makes drafting
easier; they say nothing of a large model's.

## Two completions

Greedy, of held-out code; two of the better ones, since many end in a repetition. First the prompt's
last lines, then `# --- completion ---`, which is part of neither, then what the model writes.

{completions}
"""


def exit_table(report: dict[str, Any], plain: dict[str, Any]) -> str:
    """Return a Markdown table of each exit's loss and acceptance, beside the plain run's."""
    rows = [
        "| E | held-out loss | accepted | by position | accepted in the plain run |",
        "|---|---|---|---|---|",
    ]
    for exit_layer, acceptance in report["acceptance"]["by_exit_layer"].items():
        by_position = " / ".join(f"{rate:.0%}" for rate in acceptance["rate_by_position"])
        rows.append(
            f"| {exit_layer} | {report['held_out_loss_by_exit_layer'][exit_layer]:.3f} "
            f"| {acceptance['rate']:.1%} | {by_position} "
            f"| {plain['acceptance']['by_exit_layer'][exit_layer]['rate']:.1%} |"
        )
    return "\n".join(rows)


def completion_blocks(
    checkpoint: Path, prompt_indices: Sequence[int], num_prompts: int, num_new_tokens: int = 96
) -> str:
    """Return Markdown code blocks of held-out prompts' ends and their greedy completions."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = held_out_prompts(num_prompts)
    blocks = []
    for prompt_idx in prompt_indices:
        prompt = prompts[prompt_idx]
        completion = complete_greedily(
            model, tokenizer.encode(prompt), num_new_tokens, tokenizer.eos_token_id
        )
        shown_prompt = "\n".join(prompt.splitlines()[-8:])
        text = str(tokenizer.decode(completion)).rstrip()
        blocks.append(f"```python\n{shown_prompt}\n# --- completion ---\n{text}\n```")
    return "\n\n".join(blocks)


def write_model_card(checkpoint: Path, plain: Path, prompt_indices: Sequence[int]) -> None:
    """Write the checkpoint's `README.md`, and the plain run's report into its `training.json`."""
    report = json.loads((checkpoint / "training.json").read_text())
    plain_report = json.loads((plain / "training.json").read_text())
    plain_report.pop("plain_run", None)
    report["plain_run"] = plain_report
    (checkpoint / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    loss, plain_loss = report["held_out_loss"], plain_report["held_out_loss"]
    acceptance = report["acceptance"]
    layerskip = json.loads((checkpoint / "config.json").read_text())["layerskip"]
    card = _CARD.format(
        **{**report, **report["config"], **acceptance},
        name=checkpoint.name,
        out=f"checkpoints/{checkpoint.name}",
        layerskip=json.dumps(layerskip),
        loss=loss,
        plain_loss=plain_loss,
        perplexity=math.exp(loss),
        plain_perplexity=math.exp(plain_loss),
        difference=loss / plain_loss - 1,
        exit_table=exit_table(report, plain_report),
        completions=completion_blocks(checkpoint, prompt_indices, acceptance["num_prompts"]),
    )
    (checkpoint / "README.md").write_text(card)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="what `pretrain` wrote")
    parser.add_argument("--plain", type=Path, required=True, help="what `--no-recipe` wrote")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[18, 10], help="held-out prompts to complete"
    )
    args = parser.parse_args()
    write_model_card(args.checkpoint, args.plain, args.prompts)


if __name__ == "__main__":
    main()
