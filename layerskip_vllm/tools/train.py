"""`layerskip-vllm train [CONFIG]`: what `layerskip_vllm.training` does, on the command line."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from typing_extensions import override

from layerskip_vllm.tools.command_line import Command, Option


class TrainCommand(Command):
    """Train a model for early exit.

    Run again after it was stopped, it goes on from its last checkpoint. Without CONFIG it lists the
    ready recipes. The exit status is 2 on an error.
    """

    summary: ClassVar = "train a model for early exit, by a YAML config or a ready recipe"
    extra: ClassVar = "train"

    config: Annotated[str | None, Option(metavar="CONFIG", is_positional=True)] = Field(
        default=None, description="a YAML file or a recipe"
    )
    assignments: Annotated[tuple[str, ...], Option(metavar="KEY=VALUE", is_positional=True)] = (
        Field(
            default=(),
            description="a value to set over the config's, such as training.output_dir=out",
        )
    )
    prints: Annotated[bool, Option(flag="--print")] = Field(
        default=False, description="print the config's text, to edit it"
    )

    @override
    def run(self) -> int:
        from layerskip_vllm.training import run as training_run
        from layerskip_vllm.training import run_config

        if self.config is None:
            for name, title in run_config.list_recipes().items():
                print(f"{name:24} {title}")
            return 0
        if self.prints:
            if self.assignments:
                raise ValueError(
                    "--print shows a config as it is written; leave out "
                    f"{' '.join(self.assignments)}."
                )
            print(run_config.read_config_text(self.config), end="")
            return 0
        config = run_config.load_config(self.config, list(self.assignments))
        trainer = training_run.prepare(config)
        training_run.train(trainer, config)
        if trainer.is_world_process_zero():
            print(training_run.describe_result(trainer, config))
        return 0
