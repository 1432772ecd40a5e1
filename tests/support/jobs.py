"""What runs in the child processes of `engine_process`: engines that serve scenarios."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import vllm
from safetensors import safe_open
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from layerskip_vllm.drafting import auto_length
from tests.support.child_engines import engine, shared_engine
from tests.support.scenarios import GREEDY, Completion, Output, Report, Request, Scenario, Step


def serve(scenario: Scenario) -> Report:
    """Serve a scenario's requests, with the engine of an earlier one if it was made alike."""
    with shared_engine(scenario) as llm:
        return Server(llm, scenario).run()


def serve_twice(scenario: Scenario) -> tuple[Report, Report]:
    """Serve a scenario's requests with one engine, and once more with the same."""
    with shared_engine(scenario) as first:
        before = Server(first, scenario).run()
    with shared_engine(scenario) as second:
        assert second is first
        return before, Server(second, scenario).run()


def serve_alone(scenario: Scenario) -> Report:
    """Serve a scenario's requests with a new engine, the only one of its process."""
    with engine(scenario) as llm:
        return Server(llm, scenario).run()


def find_vllm() -> str | None:
    """The file that vLLM is imported from."""
    return vllm.__file__


def lora_requests(requests: Sequence[Request]) -> list[LoRARequest | None]:
    """What each request says of its adapter; the adapters are numbered from 1."""
    folders = sorted({request.adapter for request in requests if request.adapter})
    adapters = {
        folder: LoRARequest(folder, number, lora_path=folder)
        for number, folder in enumerate(folders, start=1)
    }
    return [adapters.get(request.adapter) for request in requests]


class Server:
    """Feeds a scenario's requests to an engine and steps it."""

    def __init__(self, llm: LLM, scenario: Scenario):
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.model = scenario.model
        self.requests = scenario.requests
        self.outputs: dict[int, Output] = {}
        self.aborted: dict[int, tuple[int, ...]] = {}
        self.waiting_turns: dict[int, list[tuple[int, ...]]] = {}
        self.streamed: dict[int, list[Completion]] = {}
        self.steps: list[Step] = []
        self.counts: Counter[str] = Counter()
        self.num_accepted_per_pos: list[int] = []
        self._record_steps()
        self._record_counts()
        self._force_lengths(scenario.lengths)

    def run(self) -> Report:
        """Run all phases."""
        for phase in sorted({request.phase for request in self.requests}):
            self.run_phase(phase)
        return self.report()

    def run_phase(self, phase: int) -> None:
        """Serve the requests of a phase until all have left."""
        waiting = {i: request for i, request in enumerate(self.requests) if request.phase == phase}
        step = 0
        while waiting or self.engine.has_unfinished_requests():
            for index in [i for i, request in waiting.items() if request.joins_at <= step]:
                self._add(index, waiting.pop(index))
            for output in self.engine.step():
                self._receive(output)
            step += 1

    def _add(self, index: int, request: Request) -> None:
        if request.turns or request.unchecked is not None:
            self._add_to_core(index, request.prompt)
            for turn in request.turns[:1]:
                self._add_to_core(index, turn)
            self.waiting_turns[index] = list(request.turns[1:])
            return
        self.engine.add_request(
            str(index),
            self._prompt(request),
            self._params(request),
            lora_request=lora_requests(self.requests)[index],
            priority=request.priority,
        )

    def _add_to_core(self, index: int, prompt: tuple[int, ...], is_last: bool = False) -> None:
        """Add a request, or a turn of one, without what `LLM` does around it."""
        request = self.requests[index]
        core_request = self.engine.input_processor.process_inputs(
            str(index),
            {"prompt_token_ids": list(prompt)},
            self._params(request),
            supported_tasks=self.engine.get_supported_tasks(),
            priority=request.priority,
            resumable=bool(request.turns) and not is_last,
        )
        core_request.external_req_id = str(index)
        if request.unchecked is not None:
            core_request.sampling_params.extra_args = dict(request.unchecked)
        self.engine.output_processor.add_request(core_request, None, None, 0)
        # As it crosses to the engine core of a server: the two share no list.
        self.engine.engine_core.add_request(copy.deepcopy(core_request))

    def _params(self, request: Request) -> SamplingParams:
        params = {"output_kind": RequestOutputKind.FINAL_ONLY, **GREEDY, **request.params}
        if request.aborts_after is not None:
            params["output_kind"] = RequestOutputKind.CUMULATIVE
        if request.turns:
            params["output_kind"] = RequestOutputKind.DELTA
        if "structured_outputs" in params:
            params["structured_outputs"] = StructuredOutputsParams(**params["structured_outputs"])
        return SamplingParams(**params)

    def _prompt(self, request: Request) -> Any:
        if not request.as_embeddings:
            return {"prompt_token_ids": list(request.prompt)}
        with safe_open(Path(self.model, "model.safetensors"), "pt") as weights:
            embeddings = weights.get_tensor("model.embed_tokens.weight")
        return {"prompt_embeds": embeddings[list(request.prompt)]}

    def _receive(self, output: Any) -> None:
        index = int(output.request_id)
        if self.requests[index].turns:
            self._receive_turn(index, output)
            return
        limit = self.requests[index].aborts_after
        if limit is not None and not output.finished:
            token_ids = output.outputs[0].token_ids
            if len(token_ids) >= limit:
                self.aborted[index] = tuple(token_ids)
                self.engine.abort_request([output.request_id])
        elif output.finished:
            self.outputs[index] = _convert(output)

    def _receive_turn(self, index: int, output: Any) -> None:
        (delta,) = _convert(output).completions
        turns = self.streamed.setdefault(index, [])
        if not turns or turns[-1].finish_reason is not None:
            turns.append(delta)
        else:
            turn = turns[-1]
            turns[-1] = replace(
                delta, token_ids=turn.token_ids + delta.token_ids, text=turn.text + delta.text
            )
        if delta.finish_reason is None or len(turns) == 1:
            return
        if self.waiting_turns[index]:
            self._add_to_core(index, self.waiting_turns[index].pop(0))
        else:
            self._add_to_core(index, (0,), is_last=True)
            self.outputs[index] = Output(tuple(turns), None, None)

    def _record_steps(self) -> None:
        scheduler = self.core.scheduler
        schedule = type(scheduler).schedule.__get__(scheduler)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            before = {
                req_id: request.num_computed_tokens
                for req_id, request in scheduler.requests.items()
            }
            output = schedule(*args, **kwargs)
            drafts = output.scheduled_spec_decode_tokens
            self.steps.append(
                Step(
                    num_requests=len(output.num_scheduled_tokens),
                    num_tokens=output.total_num_scheduled_tokens,
                    num_mid_prompt=sum(
                        scheduler.requests[req_id].is_prefill_chunk
                        for req_id in output.num_scheduled_tokens
                    ),
                    num_drafts=len(drafts),
                    num_padded=sum(
                        before[req_id] < scheduler.requests[req_id].num_prompt_tokens
                        for req_id in drafts
                    ),
                    draft_lens=tuple(len(token_ids) for token_ids in drafts.values()),
                    num_to_draft=output.num_spec_tokens_to_schedule,
                )
            )
            return output

        scheduler.schedule = recorded

    def _force_lengths(self, lengths: Sequence[int]) -> None:
        chosen = itertools.cycle(lengths)
        auto_length._lengths.pop(self.core.scheduler, None)
        if lengths:
            forced: Any = SimpleNamespace(
                choose=lambda limits: next(chosen), observe=lambda *a: None, forget=lambda ids: None
            )
            auto_length._lengths[self.core.scheduler] = forced

    def _record_counts(self) -> None:
        """Add up what vLLM makes its metrics of, which it exports for the last engine alone."""
        manager = self.engine.logger_manager
        record = type(manager).record.__get__(manager)

        def recorded(scheduler_stats: Any, iteration_stats: Any, **kwargs: Any) -> None:
            record(scheduler_stats=scheduler_stats, iteration_stats=iteration_stats, **kwargs)
            if iteration_stats is not None:  # as it is where a step had no output
                self.counts["num_preemptions"] += iteration_stats.num_preempted_reqs
            stats = scheduler_stats.spec_decoding_stats
            if stats is not None:
                for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
                    self.counts[name] += getattr(stats, name)
                per_pos = zip_longest(
                    self.num_accepted_per_pos, stats.num_accepted_tokens_per_pos, fillvalue=0
                )
                self.num_accepted_per_pos = [before + now for before, now in per_pos]

        manager.record = recorded

    def report(self) -> Report:
        """All that the engine has done so far."""
        runner = self.core.model_executor.driver_worker.worker.model_runner
        drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
        scheduler = self.core.scheduler
        return Report(
            outputs=tuple(self.outputs.get(i) for i in range(len(self.requests))),
            aborted_token_ids=self.aborted,
            steps=tuple(self.steps),
            num_drafts=self.counts["num_drafts"],
            num_draft_tokens=self.counts["num_draft_tokens"],
            num_accepted=self.counts["num_accepted_tokens"],
            num_accepted_per_pos=tuple(self.num_accepted_per_pos),
            num_preemptions=self.counts["num_preemptions"],
            num_blocks=scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
            layers_by_group=tuple(
                tuple(group.layer_names) for group in scheduler.kv_cache_config.kv_cache_groups
            ),
            drafter=type(drafter).__name__ if drafter is not None else None,
            runner="v2" if "worker.gpu.model_runner" in str(type(runner).__mro__) else "v1",
            is_async=scheduler.scheduler_config.async_scheduling,
        )


def _convert(output: Any) -> Output:
    return Output(
        completions=tuple(
            Completion(
                token_ids=tuple(completion.token_ids),
                text=completion.text,
                finish_reason=completion.finish_reason,
                stop_reason=completion.stop_reason,
                logprobs=_convert_logprobs(completion.logprobs),
                spec_decode=_convert_metrics(completion.spec_decode_metrics),
            )
            for completion in sorted(output.outputs, key=lambda completion: completion.index)
        ),
        prompt_logprobs=_convert_logprobs(output.prompt_logprobs),
        num_cached_tokens=output.num_cached_tokens,
    )


def _convert_logprobs(logprobs: Any) -> Any:
    return logprobs and tuple(
        position and {token_id: logprob.logprob for token_id, logprob in position.items()}
        for position in logprobs
    )


def _convert_metrics(metrics: Any) -> dict[str, Any] | None:
    if metrics is None:
        return None
    return metrics.to_dict() if hasattr(metrics, "to_dict") else vars(metrics)
