"""`layerskip-vllm watch URL`: what a running server drafts and accepts, live."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from typing_extensions import override

from layerskip_vllm.tools.command_line import Command, Option
from layerskip_vllm.tools.output import make_console

if TYPE_CHECKING:
    from rich.live import Live

    from layerskip_vllm.tools.server.metrics import LayerSkipInfo, Sample


class WatchCommand(Command):
    """Show a vLLM server's tokens a second, acceptance by position and load.

    From its /metrics, until interrupted. The exit status is 2 on an error.
    """

    summary: ClassVar = "show what a running server drafts and accepts, live"
    extra: ClassVar = "watch"

    url: Annotated[str, Option(metavar="URL", is_positional=True)] = Field(
        description="the server's address, such as http://127.0.0.1:8000"
    )
    interval: Annotated[float, Option(metavar="S")] = Field(
        default=2.0, gt=0, description="seconds between looks"
    )
    once: bool = Field(default=False, description="look at one interval, print it and stop")
    model: Annotated[str | None, Option(metavar="MODEL")] = Field(
        default=None,
        description="the served checkpoint's folder, to tell the bound on the speed-up",
    )
    exit_layer: Annotated[int | None, Option(metavar="E")] = Field(
        default=None,
        description="for --model: the layers that draft; what the server says when not given",
    )

    @override
    def run(self) -> int:
        from rich.live import Live

        if self.exit_layer is not None and self.model is None:
            raise ValueError("--exit-layer is for --model, which is not given; give both.")
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(console=make_console(), auto_refresh=False, transient=False) as live,
        ):
            self._watch(live)
        return 0

    def _watch(self, live: Live) -> None:
        from layerskip_vllm.tools.server.metrics import is_restarted, measure_interval, read_sample
        from layerskip_vllm.tools.watch.view import draw

        first = before = read_sample(self.url)
        draft_share = self._read_draft_share(first.info)
        while True:
            time.sleep(self.interval)
            now = self._read_again(live)
            if is_restarted(before, now):
                first = before = now
                draft_share = self._read_draft_share(first.info)
                continue
            intervals = [measure_interval(before, now)]
            if before is not first:
                intervals.append(measure_interval(first, now))
            live.update(draw(self.url, intervals, draft_share), refresh=True)
            before = now
            if self.once:
                return

    def _read_again(self, live: Live) -> Sample:
        """Read a sample; where the server is away for a while, say so and wait for it."""
        from layerskip_vllm.tools.server.metrics import read_sample

        while True:
            try:
                return read_sample(self.url)
            except OSError as error:
                if self.once:
                    raise
                live.update(f"{error}; waiting for it", refresh=True)
                time.sleep(self.interval)

    def _read_draft_share(self, info: LayerSkipInfo | None) -> float | None:
        """Read which share of the model's bytes a draft step reads, from the checkpoint's headers.

        E is the user's, else the server's, else that which the checkpoint would have by itself.
        """
        if self.model is None:
            return None
        from transformers import AutoConfig

        from layerskip_vllm.checkpoint.entry import default_settings
        from layerskip_vllm.checkpoint.weight_shares import read_shares

        if not (Path(self.model) / "config.json").is_file():
            raise ValueError(
                f"--model is {self.model!r}, which is no folder with a config.json in it."
            )
        config = AutoConfig.from_pretrained(self.model)
        num_layers = config.get_text_config().num_hidden_layers
        exit_layer = self.exit_layer
        if exit_layer is None and info is not None:
            exit_layer = info.exit_layer
        if exit_layer is None:
            exit_layer = default_settings(self.model, config, num_layers).exit_layer.value
        if not 1 <= exit_layer <= num_layers:
            raise ValueError(f"--exit-layer is {exit_layer}; it must be from 1 to {num_layers}.")
        shares = read_shares(Path(self.model), num_layers, exit_layer)
        if shares is None:
            raise ValueError(
                f"--model is {self.model!r}, which has not all weights in safetensors files."
            )
        if info is not None:
            vocab_size = config.get_text_config().vocab_size
            shares = shares.with_draft_vocab(info.draft_vocab_size / vocab_size)
        return shares.total
