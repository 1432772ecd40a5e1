"""Writes the ledger, patches/README.md: all that is changed or used in vLLM, and why."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from layerskip_vllm.hooks.install import Entry
from layerskip_vllm.hooks.method_hooks import METHOD_HOOKS, REGISTRY
from layerskip_vllm.hooks.uses import USES
from layerskip_vllm.hooks.vllm_fixes import FIXES
from layerskip_vllm.hooks.vllm_source import ANY, SUPPORTED_VLLM_VERSIONS, read_digests

PAGE = Path(__file__).parents[1] / "patches/README.md"

_INTRODUCTION = """# What this plugin changes in vLLM, and what it uses that vLLM keeps to itself

Made by `python -m scripts.ledger` from `layerskip_vllm/hooks/`; a test compares the two. For vLLM
{versions}, in two forms:

- **Hooks** on an unmodified vLLM, in each process that vLLM loads the plugin in.
- **A diff**, `vllm-VERSION.diff`: a small registry of speculative methods for vLLM itself, in a
  form to send upstream. Where vLLM has it (`{registry}`), the plugin gives it
  what the hooks of the method call; the fixes of vLLM itself stay hooks.

```bash
vllm=$(python -c "from importlib.util import find_spec; print(find_spec('vllm').origin)")
patch -p1 -d "$(dirname "$vllm")/.." < patches/vllm-{newest}.diff
```

All that stands under *Relies on* is checked before any hook is applied. `register()` raises, so
that vLLM does not start, if

- the version of vLLM is not one that the hooks were written for
  (`VLLM_LAYERSKIP_SKIP_VERSION_CHECK=1` skips this check and no other),
- the source of a target, or of anything else relied on, is missing or has changed,
- something else has patched a target.

A hook is applied when its target's module is imported, so a process imports nothing for the
plugin's sake. `layerskip-vllm doctor` prints the state of each entry.

How another vLLM is supported, and one given up, is in
[CONTRIBUTING.md](../CONTRIBUTING.md#add-a-vllm-version).

## Why hooks

vLLM {newest} has no interface for a drafter from outside that can use the model.
`method="custom_class"` ([vllm#39487](https://github.com/vllm-project/vllm/pull/39487)) hands over
token lists on the host, neither the model nor its KV cache, turns asynchronous scheduling off, and
exists in Model Runner V1 alone. A common interface for drafters was asked for in
[vllm#36219](https://github.com/vllm-project/vllm/issues/36219); the attempt for Model Runner V1
([vllm#37399](https://github.com/vllm-project/vllm/pull/37399)) was closed in favour of V2, whose
`init_speculator` is a fixed list. SGLang has such a registry
([sglang#23991](https://github.com/sgl-project/sglang/pull/23991)), and the diff gives vLLM a like
one.

## The registry in the diff, and the one in review

EAGLE-4's plugin (eagle-harness 0.1.3) is written for a registry that is in review for vLLM, in a
file of the same name. The diff's has its names and call shapes as far as that plugin shows them,
so that either can become the other by adding fields:

- **The same**: `register_speculative_method(name, SpeculativeMethodSpec(...))` with all by keyword;
  `speculator_cls`, Model Runner V2's drafter as "module:Class", made from `(vllm_config, device)`;
  and that hooks into a step are methods of `BaseSpeculator` (`prepare_sampling`, and
  `prepare_target_graphs` before graphs are captured).
- **Another way to a configuration**: there, `configure(config)` completes a `SpeculativeConfig`,
  whose `method_config` is an opaque dict. Here, `create_config(args, ...)` makes a subclass: what
  layerskip refuses depends on the engine's arguments, such as a scheduler class, and its settings
  are checked fields that `compute_hash` knows. The subclass presents itself as a `draft_model`, so
  that it needs no `num_lookahead_tokens`, and the diff leaves `SpeculativeConfig`, whose methods
  are a closed list, as it is.
- **Another way to fewer drafts**: there, `suspend_drafting` and `verify_budget` of the drafter, for
  a step. Here, `before_schedule` and `after_schedule` in the engine core: a request's own K must be
  known before tokens and blocks are reserved for its drafts.
- **Not here**: `uses_target_hidden_states`, `uses_aux_hidden_states` and
  `linear_attn_verify_extension`. Layerskip drafts from tokens, over the target's own KV cache.
- **Only here**: `proposer_cls`, the drafter of Model Runner V1, which is what runs on CPUs; and
  `add_cli_args`, `fold_cli_args`, `check_request`, `publish_info` and `after_weights_change` for
  flags, for what a request may ask for, for metrics, and for what is copied of weights.

Where vLLM has a registry without `create_config`, the plugin stays with its hooks.
"""

_SECTIONS = (
    ("Hooks that make layerskip a method", METHOD_HOOKS),
    ("Hooks that fix vLLM", FIXES),
    ("What is used without a hook", USES),
)


def write_page() -> str:
    """Write the ledger as Markdown: an entry for each hook, then for each module that uses vLLM."""
    versions, newest = " and ".join(SUPPORTED_VLLM_VERSIONS), SUPPORTED_VLLM_VERSIONS[-1]
    # Of what the newest does not need, those of the version before it.
    digests = {
        name: relied_on
        for version in SUPPORTED_VLLM_VERSIONS
        for name, relied_on in read_digests(version).items()
        if relied_on is not None
    }
    parts = [_INTRODUCTION.format(versions=versions, registry=REGISTRY, newest=newest)]
    for title, entries in _SECTIONS:
        parts.append(f"\n## {title}\n")
        parts += [_write_entry(entry, digests.get(entry.name, {})) for entry in entries]
    return "".join(parts)


def _write_entry(entry: Entry, digests: Mapping[str, str]) -> str:
    whole = [name for name, digest in digests.items() if digest != ANY]
    there = [name for name, digest in digests.items() if digest == ANY]
    parts = (_list_names(whole), f"that there is, {_list_names(there)}" if there else "")
    fields = {
        "Why": f"{entry.why}. {entry.reason}",
        "Process": f"{entry.process}.",
        "How": entry.how,
        "Relies on": "; ".join(filter(None, parts)) + ".",
        "Upstream": f"{entry.upstream}.",
        "Remove when": f"{entry.remove_when}.",
    }
    lines = (
        textwrap.fill(
            f"- **{field}**: {' '.join(text.split())}",
            width=100,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for field, text in fields.items()
    )
    return f"\n### `{entry.name}`\n\n" + "\n".join(lines) + "\n"


def _list_names(names: Iterable[str]) -> str:
    by_module: dict[str, list[str]] = {}
    for name in names:
        module, _, qualname = name.partition(":")
        by_module.setdefault(module, []).append(f"`{qualname}`")
    return "; ".join(f"in `{module}` {', '.join(by_module[module])}" for module in by_module)
