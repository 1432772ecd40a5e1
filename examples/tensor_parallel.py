"""Two ranks share a model and its drafts.

Runs on two GPUs; `docs/distributed.md` has the command, and that for a CPU.
"""

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams

MODEL = str(Path(__file__).parents[1] / "checkpoints" / "stdlib-24l")
PROMPTS = ["def quicksort(", "class Stack:\n", "import os\n", "for line in "]


def main() -> None:
    """Complete a few prompts and say how many drafts were accepted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--engine", type=json.loads, default={}, help="more engine arguments, JSON")
    args = parser.parse_args()
    engine = {
        "tensor_parallel_size": 2,
        "speculative_config": {"method": "layerskip"},
        "disable_log_stats": False,
        **args.engine,
    }
    print(f"starting an engine of two ranks for {args.model}", flush=True)
    llm = LLM(args.model, **engine)
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48)):
        print(json.dumps({"prompt": output.prompt, "text": output.outputs[0].text}))
    counts = {metric.name: metric for metric in llm.get_metrics()}
    accepted = counts["vllm:spec_decode_num_accepted_tokens"].value
    drafted = counts["vllm:spec_decode_num_draft_tokens"].value
    print(f"{accepted} of {drafted} drafted tokens were accepted")


if __name__ == "__main__":
    main()
