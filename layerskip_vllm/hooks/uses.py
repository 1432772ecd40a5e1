"""What of vLLM the plugin extends, calls or sets that vLLM keeps to itself, module by module.

`plugin` has it checked with the hooks, before anything is hooked. What a module imports, and what
its classes override and call of vLLM's, is found in the code by `scripts/ledger.py`; listed here is
only what it touches on vLLM's objects.
"""

from __future__ import annotations

from layerskip_vllm.hooks.install import V1_WORKER, V2_WORKER, Use

_V1_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_WORKER = "each worker"

_REGISTRY = "vLLM takes drafters from outside, through an interface that it keeps"

USES = (
    Use(
        module="layerskip_vllm.config.speculative",
        relies_on=("vllm.config.speculative:SpeculativeConfig",),
        why="`LayerSkipConfig` is a `SpeculativeConfig`",
        process="whichever reads the engine arguments; pickled to all others",
        how="Extends it, and knows its fields one by one: which mean the same, which are refused. "
        "To the rest of vLLM it is a `draft_model` whose model is the target.",
        remove_when="a speculative method can bring a configuration of its own",
    ),
    Use(
        module="layerskip_vllm.config.setting_refusals",
        why="a K by batch size that cannot be is refused early",
        process="whichever reads the engine arguments",
        how="Has vLLM check the schedule that it would check in the engine core.",
        remove_when="vLLM checks the schedule with the arguments",
    ),
    Use(
        module="layerskip_vllm.config.engine_refusals",
        why="a scheduler that the hooks do not reach, and a table of tokens that would fill a "
        "device, are refused early",
        process="whichever reads the engine arguments",
        how="Asks whether `scheduler_cls` extends vLLM's and whether the platform is a CPU.",
        remove_when="vLLM has a K for each request",
    ),
    Use(
        module="layerskip_vllm.drafting.proposer",
        relies_on=(
            f"{_V1_RUNNER}._input_fits_in_drafter",
            f"{_V1_RUNNER}.effective_drafter_max_model_len",
            f"{_V1_RUNNER}.discard_request_mask",
            f"{_V1_RUNNER}.input_batch",
            f"{_V1_RUNNER}.requests",
            f"{_V1_RUNNER}._bookkeeping_sync",
            f"{_V1_RUNNER}._copy_draft_token_ids_to_cpu",
            f"{_V1_RUNNER}._copy_valid_sampled_token_count",
            f"{_V1_RUNNER}.propose_draft_token_ids",
            "vllm.v1.worker.gpu_input_batch:InputBatch.add_request",
            "vllm.v1.worker.gpu_input_batch:InputBatch.block_table",
            "vllm.v1.worker.gpu_input_batch:InputBatch.request_lora_mapping",
            "vllm.v1.attention.backend:CommonAttentionMetadata",
        ),
        why="`LayerSkipProposer` is V1's `DraftModelProposer`, over the target's own KV cache",
        reason="The runner stops a whole batch from drafting when one request comes near the end "
        "of its context; this drafter leaves out that request alone.",
        process=V1_WORKER,
        how="Overrides how a draft is made, loaded and sampled. Takes the place of the runner's "
        "`propose_draft_token_ids`, on that runner, to leave it out where nothing is drafted; sets "
        "the runner's "
        "`effective_drafter_max_model_len` past the context's end, reads its block tables, "
        "`requests`, `discard_request_mask` and its tokens but for the last ones.",
        upstream="[vllm#37399](https://github.com/vllm-project/vllm/pull/37399), closed",
        remove_when="vLLM drops Model Runner V1",
    ),
    Use(
        module="layerskip_vllm.drafting.draft_attention",
        relies_on=(
            f"{_V1_RUNNER}.input_batch",
            "vllm.v1.worker.gpu_input_batch:InputBatch.block_table",
            "vllm.v1.worker.block_table:BlockTable.get_device_tensor",
            "vllm.v1.attention.backend:CommonAttentionMetadata",
            "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
        ),
        why="V1's draft steps have the target's attention layers, one token a request",
        process=V1_WORKER,
        how="Groups the first layers by KV cache group and backend, and makes the metadata of "
        "draft steps of the target step's.",
        remove_when="vLLM drops Model Runner V1",
    ),
    Use(
        module="layerskip_vllm.drafting.draft_sampling",
        relies_on=(f"{_V1_RUNNER}.input_batch", f"{_V1_RUNNER}.requests"),
        why="V1's draft steps sample as vLLM samples, each request from its own seed",
        process=V1_WORKER,
        how="Calls `random_sample`, and reads the runner's `requests`.",
        remove_when="vLLM drops Model Runner V1",
    ),
    Use(
        module="layerskip_vllm.drafting.verifier",
        relies_on=(
            f"{_V1_RUNNER}._model_forward",
            f"{_V1_RUNNER}.execute_model",
            f"{_V1_RUNNER}.query_start_loc",
            f"{_V1_RUNNER}.seq_lens",
            f"{_V1_RUNNER}.optimistic_seq_lens_cpu",
            "vllm.v1.worker.gpu_input_batch:InputBatch.spec_token_ids",
            "vllm.v1.worker.gpu_input_batch:InputBatch.update_req_spec_token_ids",
            "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
            "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids",
        ),
        why="verification begins at the exit where drafting has left exit states",
        reason="A request that has drafts in a step was drafted for in the step before: the "
        "scheduler gives none to one that is still in its prompt, was preempted or resumes.",
        process=V1_WORKER,
        how="Takes the place of the runner's `_model_forward`, which is meant to be overridden, on "
        "that runner; reads how many tokens and drafts of each request are in the step, and makes "
        "the first layers' metadata of some tokens of the step's.",
        remove_when="vLLM drops Model Runner V1",
    ),
    Use(
        module="layerskip_vllm.drafting.slots",
        relies_on=(
            "vllm.v1.worker.block_table:MultiGroupBlockTable.__getitem__",
            "vllm.v1.worker.block_table:BlockTable.get_device_tensor",
            "vllm.v1.worker.block_table:BlockTable.block_size",
        ),
        why="V1's draft steps write to slots of the target's KV cache",
        process=V1_WORKER,
        how="Looks up a draft's slots in the runner's block tables, all steps at once; those that "
        "are `PAD_SLOT_ID` are not written.",
        remove_when="vLLM drops Model Runner V1",
    ),
    Use(
        module="layerskip_vllm.drafting.speculator",
        relies_on=(
            "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator",
            "vllm.v1.worker.gpu.lora_utils:LoraState",
        ),
        why="`LayerSkipSpeculator` is V2's `DraftModelSpeculator`, over the target's own KV cache",
        process=V2_WORKER,
        how="Overrides how a draft is made and captured.",
        upstream="[vllm#36219](https://github.com/vllm-project/vllm/issues/36219), open",
        remove_when=_REGISTRY,
    ),
    Use(
        module="layerskip_vllm.drafting.one_token_steps",
        relies_on=("vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator",),
        why="V2's draft steps run the target's first layers, one token a request",
        process=V2_WORKER,
        how="Extends `DraftModelSpeculator`; names no layers of its own to the runner, which would "
        "take them out of the target's checks.",
        remove_when=_REGISTRY,
    ),
    Use(
        module="layerskip_vllm.drafting.cuda_graphs",
        relies_on=(
            "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils:"
            "SpeculatorCudaGraphManager",
        ),
        why="`DraftCudaGraphs` are vLLM's graphs of draft steps, `RemainingLayersCudaGraphs` those "
        "of a model's steps",
        reason="vLLM's drafts have no adapters, and its models begin with their first layer.",
        process=V2_WORKER,
        how="Has each captured with as many adapters in use as it will be run with; of the "
        "target's full graphs, captures those again that steps which begin at the exit are run "
        "by (`_capture_descs`).",
        remove_when="vLLM captures drafts with adapters, and a model's layers can be run in two "
        "parts",
    ),
    Use(
        module="layerskip_vllm.drafting.device_verifier",
        relies_on=(
            f"{_V2_RUNNER}.prepare_inputs",
            f"{_V2_RUNNER}.prepare_attn",
            f"{_V2_RUNNER}.execute_model",
            f"{_V2_RUNNER}.gather_batch_req_state",
            f"{_V2_RUNNER}.add_requests",
            "vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables",
            "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager",
            "vllm.v1.worker.gpu.input_batch:InputBatch",
            "vllm.v1.worker.gpu.input_batch:expand_idx_mapping",
        ),
        why="on V2, verification begins at the exit where drafting has left exit states",
        reason="A request that has drafts in a step without prompts was drafted for in a step "
        "before, by its request state; one that joins or resumes has a prompt to run first.",
        process=V2_WORKER,
        how="Takes the place of the runner's `prepare_inputs`, of its graphs' `run_fullgraph` and "
        "of the model's `forward`, on these objects: each calls the original, but where a step "
        "begins at the exit.",
        remove_when="a model's layers can be run in two parts",
    ),
    Use(
        module="layerskip_vllm.drafting.target_graphs",
        relies_on=("vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager",),
        why="the target's full graphs take requests that draft less than K",
        process=V2_WORKER,
        how="Sets `varlen_decode` of the runner's `ModelCudaGraphManager`, and has it choose its "
        "graphs anew, where vLLM's own check for adaptive verification finds nothing against it.",
        remove_when="vLLM captures such graphs without adaptive verification",
    ),
    Use(
        module="layerskip_vllm.drafting.kernels",
        why="the kernels between V2's draft steps write the runner's buffers",
        process=V2_WORKER,
        how="Writes `InputBuffers`.",
        remove_when=_REGISTRY,
    ),
    Use(
        module="layerskip_vllm.drafting.device_lookup",
        relies_on=(
            "vllm.v1.worker.gpu.spec_decode.ngram.speculator:_ngram_scan_kernel",
            "vllm.v1.worker.gpu.states:RequestState",
            "vllm.v1.worker.gpu.input_batch:InputBatch",
        ),
        why="V2 copies drafts from a request's own tokens",
        process=V2_WORKER,
        how="Runs the kernel of vLLM's `ngram` drafter over the runner's table of tokens, which "
        "`LayerSkipConfig.use_ngram` has vLLM keep on the device; a kernel of its own takes what "
        "it found.",
        remove_when="vLLM's drafters can be combined with its lookup",
    ),
    Use(
        module="layerskip_vllm.drafting.stages",
        relies_on=(
            "vllm.compilation.decorators:_support_torch_compile",
            "vllm.compilation.decorators:_try_load_aot_compiled_fn",
            "vllm.distributed.parallel_state:get_pp_group",
        ),
        why="a model's first layers are compiled on their own, as vLLM compiles the model",
        reason="vLLM keys compiled code by the code object and, on disk, by its qualified name and "
        "first line: a stage that shared them with the model would load its graphs.",
        process=_WORKER,
        how="Copies the module that runs the layers, gives it an end, a class and a `forward` of "
        "its own, and calls `TorchCompileWithNoGuardsWrapper.__init__` on it anew; sets "
        "`_compile_tag`, drops `aot_compiled_fn`. While a stage runs, `parallel_state._PP` is the "
        "rank of a pipeline that it would be.",
        remove_when="vLLM compiles a slice of a model's layers",
    ),
    Use(
        module="layerskip_vllm.drafting.draft_head",
        relies_on=(
            "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
            "vllm.model_executor.layers.logits_processor:LogitsProcessor",
        ),
        why="drafts choose among some tokens by the target's own way from states to logits",
        process=_WORKER,
        how="Sees which head the model gives its `LogitsProcessor`, copies some of its rows into a "
        "`ParallelLMHead`, by `shard_indices` and an all-reduce, and runs `compute_logits` of a "
        "shallow copy of the model that has both for fewer tokens.",
        remove_when="vLLM has draft vocabularies for drafters that share the target's head",
    ),
    Use(
        module="layerskip_vllm.drafting.exit_states",
        why="exit states have the form of what a rank of a pipeline sends to the next",
        process=_WORKER,
        how="Has the model make room for them (`make_empty_intermediate_tensors`), and makes the "
        "`IntermediateTensors` that its remaining layers take.",
        remove_when="a model's layers can be run in two parts",
    ),
    Use(
        module="layerskip_vllm.drafting.exit_model",
        why="what is kept of the target's weights, or of their outputs, is dropped as they change",
        process=_WORKER,
        how="Puts a call before the model's `load_weights`, whoever loads weights.",
        remove_when="vLLM tells drafters that weights have changed",
    ),
    Use(
        module="layerskip_vllm.drafting.lora",
        relies_on=("vllm.lora.model_manager:LoRAModelManager.set_adapter_mapping",),
        why="each request drafts with its own adapter",
        process=_WORKER,
        how="Gives the manager of the target's adapters the rows of a draft step, and of V2's "
        "verification; it is the loaded model's `lora_manager`.",
        remove_when="vLLM's runners map the rows of draft steps to adapters",
    ),
    Use(
        module="layerskip_vllm.drafting.kv_transfer",
        relies_on=(
            "vllm.distributed.kv_transfer.kv_transfer_state:get_kv_transfer_group",
            "vllm.distributed.kv_transfer.kv_transfer_state:has_kv_transfer_group",
            "vllm.distributed.kv_transfer.kv_transfer_state:is_v1_kv_transfer_group",
        ),
        why="KV connectors do not see draft steps",
        reason="A connector follows the target's layers through a step, each once; draft steps run "
        "the same layers by the same names.",
        process=_WORKER,
        how="Sets `_KV_CONNECTOR_AGENT` to None while a draft step runs, and back.",
        remove_when="a forward can be run without a connector",
    ),
    Use(
        module="layerskip_vllm.checkpoint.first_layers",
        why="the load format `first_layers`: a checkpoint's first layers as a model",
        process=_WORKER,
        how="Registers `FirstLayersLoader` with `register_model_loader`, which is open to plugins; "
        "overrides what `DefaultModelLoader` reads.",
        remove_when="vLLM's loaders leave out the weights of layers that a model has not",
    ),
)
