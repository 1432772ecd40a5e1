"""`layerskip-vllm verify MODEL`: does speculation lose anything here?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from layerskip_vllm.tools.output import make_console, write_json
from layerskip_vllm.tools.verify.config import VerifyConfig

_COUNTS = {
    "num_prompts": "prompts to complete greedily",
    "num_prompt_tokens": "most tokens of a prompt",
    "max_tokens": "tokens of a greedy completion",
    "num_samples": "samples of each of the first four prompts",
    "tensor_parallel_size": "GPUs of an engine",
}


def add_parser(subparsers: Any) -> None:
    """Add the subcommand to the parser of `layerskip-vllm`."""
    parser = subparsers.add_parser(
        "verify",
        help="check that speculation loses nothing on a model and this machine",
        description="Run plain vLLM twice, layerskip, and layerskip with verification taken out, "
        "one after the other, and compare greedy tokens and sampled distributions. The exit status "
        "is 0 if layerskip differs from plain vLLM by no more than plain vLLM from itself, 1 if "
        "not or if the check would not have seen it, 2 on an error.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint's folder or name")
    add("--exit-layer", type=int, metavar="E", help="default: the checkpoint's")
    add("--num-speculative-tokens", type=int, metavar="K", help="default: the checkpoint's")
    add(
        "--speculative-config",
        type=_read_object,
        default={},
        metavar="JSON",
        help="more of vLLM's speculative settings, such as "
        '\'{"draft_sample_method": "probabilistic"}\'',
    )
    add("--dtype", default="auto", help="float32 is the strictest (auto, the checkpoint's own)")
    add(
        "--engine-args",
        type=_read_object,
        default={},
        metavar="JSON",
        help="more arguments of vLLM's LLM for all runs, such as '{\"max_model_len\": 4096}'",
    )
    add(
        "--data",
        nargs="+",
        metavar="FILE_OR_FOLDER",
        help="texts to cut prompts from, in the place of the built-in ones: text files, .jsonl "
        "files whose objects have a 'text', or folders of them",
    )
    for name, words in _COUNTS.items():
        default = VerifyConfig.__dataclass_fields__[name].default
        option = "--" + name.replace("_", "-")
        add(option, type=int, default=default, metavar="N", help=f"{words} ({default})")
    add("--output-dir", type=Path, default=Path("verify-output"), help="(verify-output)")
    parser.set_defaults(run=run, extra="verify")


def run(args: argparse.Namespace) -> int:
    """Run the engines, compare, print, write, and return the exit status."""
    from layerskip_vllm.tools.prompts import choose_prompts
    from layerskip_vllm.tools.verify import runs
    from layerskip_vllm.tools.verify.comparison import conclude
    from layerskip_vllm.tools.verify.report import build_table, describe_run, to_json

    config = VerifyConfig(
        model=args.model,
        speculative=_read_speculative_config(args),
        dtype=args.dtype,
        engine=args.engine_args,
        **{name: getattr(args, name) for name in _COUNTS},
    )
    documents = _read_data(args.data) if args.data else None
    prompts = choose_prompts(documents, config.num_prompts, config.num_prompt_tokens)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    console = make_console()
    with console.status("starting") as status:

        def track(name: str) -> None:
            status.update(f"run {runs.RUNS.index(name) + 1} of {len(runs.RUNS)}: {name}")
            console.print(f"run {runs.RUNS.index(name) + 1} of {len(runs.RUNS)}: {name}")

        results = runs.run_all(config, prompts, args.output_dir, track)
    verdict = conclude(results)
    drafted = results[runs.DRAFTED]
    write_json(args.output_dir / "verify.json", to_json(config, drafted, verdict))
    console.print(build_table(verdict, describe_run(config, drafted)))
    for problem in verdict.problems:
        console.print(f"[bold red]{problem}.[/]", soft_wrap=True)
    if not verdict.problems:
        console.print("[bold green]layerskip loses nothing here.[/]", soft_wrap=True)
    console.print(f"Written: {args.output_dir}/verify.json", soft_wrap=True)
    return 1 if verdict.problems else 0


def _read_speculative_config(args: argparse.Namespace) -> dict[str, Any]:
    """`--speculative-config` and the flags beside it, each setting said once."""
    config = dict(args.speculative_config)
    for key in ("exit_layer", "num_speculative_tokens"):
        value = getattr(args, key)
        if value is None:
            continue
        if key in config:
            raise ValueError(
                f"--{key.replace('_', '-')} and --speculative-config[{key!r}] are mutually "
                "exclusive; leave one out."
            )
        config[key] = value
    return config


def _read_data(data: list[str]) -> list[str]:
    from layerskip_vllm.tools.text import read_documents

    return read_documents(data)


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value
