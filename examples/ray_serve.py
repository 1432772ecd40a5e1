"""Ray Serve LLM: OpenAI's interface over HTTP, replicas as Ray actors.

Runs in a cluster (`RAY_ADDRESS`, or `ray start` on this machine) or on this machine's GPUs.
`docs/distributed.md` has the command, and that for a CPU, with a request to it.
"""

import argparse
import json
import os
import signal
from pathlib import Path

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

MODEL = str(Path(__file__).parents[1] / "checkpoints" / "stdlib-24l")


def main() -> None:
    """Serve a model until the process is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--num-gpus", type=int, help="for Ray to count on; default: what it finds")
    parser.add_argument("--engine", type=json.loads, default={}, help="more engine arguments, JSON")
    args = parser.parse_args()
    # Ray's logical cores: the ingress, the replica and its workers each ask for one.
    ray.init(num_gpus=args.num_gpus, num_cpus=8 if args.num_gpus else None)
    config = LLMConfig(
        model_loading_config={"model_id": "layerskip", "model_source": args.model},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        engine_kwargs={"speculative_config": {"method": "layerskip"}, **args.engine},
        # Settings of vLLM's and layerskip's, for the replica and all that it starts.
        runtime_env={
            "env_vars": {k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "OMP_"))}
        },
    )
    print(f"starting a replica for {args.model}", flush=True)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=False)
    print("serving", flush=True)
    try:
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
