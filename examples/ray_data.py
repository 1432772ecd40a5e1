"""Ray Data LLM: batch inference over a data set, engines as Ray actors.

Runs in a cluster (`RAY_ADDRESS`, or `ray start` on this machine) or on this machine's GPUs.
`docs/distributed.md` has the command, and that for a CPU.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

MODEL = str(Path(__file__).parents[1] / "checkpoints" / "stdlib-24l")
PROMPTS = ["def quicksort(", "class Stack:\n", "import os\n", "for line in "]


def to_request(row: dict[str, Any]) -> dict[str, Any]:
    """Say what vLLM is asked for a row of the data set."""
    return {"prompt": row["prompt"], "sampling_params": {"temperature": 0, "max_tokens": 48}}


def main() -> None:
    """Complete a data set's prompts and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--num-gpus", type=int, help="for Ray to count on; default: what it finds")
    parser.add_argument("--engine", type=json.loads, default={}, help="more engine arguments, JSON")
    args = parser.parse_args()
    # Ray's logical cores: reading, the engine and its workers each ask for one.
    ray.init(num_gpus=args.num_gpus, num_cpus=8 if args.num_gpus else None)
    config = vLLMEngineProcessorConfig(
        model_source=args.model,
        engine_kwargs={"speculative_config": {"method": "layerskip"}, **args.engine},
        concurrency=1,
        batch_size=16,
        chat_template_stage=False,
        # Settings of vLLM's and layerskip's, for the engine's actor and all that it starts.
        runtime_env={
            "env_vars": {k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "OMP_"))}
        },
    )
    process = build_processor(
        config,
        preprocess=to_request,
        postprocess=lambda row: {"prompt": row["prompt"], "text": row["generated_text"]},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False  # a table every ten seconds
    print(f"completing {len(PROMPTS)} prompts with {args.model}", flush=True)
    rows = process(ray.data.from_items([{"prompt": prompt} for prompt in PROMPTS])).take_all()
    for row in rows:
        print(json.dumps(row))
    ray.shutdown()


if __name__ == "__main__":
    main()
