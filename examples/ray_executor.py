"""vLLM's workers are Ray actors, wherever in the cluster there are GPUs for them.

Runs in a cluster (`RAY_ADDRESS`, or `ray start` on this machine) or on this machine's GPUs.
`docs/distributed.md` has the command, and that for a CPU.
"""

import argparse
import json
import os
from pathlib import Path

import ray
from vllm import LLM, SamplingParams

MODEL = str(Path(__file__).parents[1] / "checkpoints" / "stdlib-24l")
PROMPTS = ["def quicksort(", "class Stack:\n", "import os\n", "for line in "]


def main() -> None:
    """Complete a few prompts and say how many drafts were accepted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--num-gpus", type=int, help="for Ray to count on; default: what it finds")
    parser.add_argument("--engine", type=json.loads, default={}, help="more engine arguments, JSON")
    args = parser.parse_args()
    # An engine core of its own process is ended by a signal, of which Ray prints a stack trace.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    ray.init(num_gpus=args.num_gpus)
    print(f"starting an engine for {args.model}; its workers are Ray actors", flush=True)
    engine = {
        "distributed_executor_backend": "ray",
        "speculative_config": {"method": "layerskip"},
        "disable_log_stats": False,
        **args.engine,
    }
    llm = LLM(args.model, **engine)
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48)):
        print(json.dumps({"prompt": output.prompt, "text": output.outputs[0].text}))
    counts = {metric.name: metric for metric in llm.get_metrics()}
    accepted = counts["vllm:spec_decode_num_accepted_tokens"].value
    drafted = counts["vllm:spec_decode_num_draft_tokens"].value
    print(f"{accepted} of {drafted} drafted tokens were accepted")
    del llm  # its actors end before Ray does
    ray.shutdown()


if __name__ == "__main__":
    main()
