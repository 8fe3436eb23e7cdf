"""What `TrainingArguments` takes and a run of continual-pretrain cannot keep to: refused."""

import re
from collections.abc import Iterator

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.training_args import OptimizerNames

from aixsim_cli.run.nonfinite import OnNonfinite


def not_supported(training: TrainingArguments) -> Iterator[str]:
    """Messages about flags of HF's that would do something else here than they say."""
    if training.fsdp and training.use_cpu:
        yield (
            "--fsdp: accelerate shards on accelerators alone, and would copy the model to every "
            "rank here; expected no --fsdp, or an accelerator"
        )
    strategy = HubStrategy(training.hub_strategy)
    if strategy != HubStrategy.END:
        yield (
            f"--hub_strategy: got {strategy.value}; expected end: the finished model alone is "
            "pushed"
        )
    if training.save_on_each_node:
        yield (
            "--save_on_each_node: a checkpoint is one folder that all nodes see; expected a shared "
            "--output_dir"
        )


def cannot_recover(
    training: TrainingArguments, action: OnNonfinite, limit: int, *, streaming: bool
) -> Iterator[str]:
    """Messages about what no step can be left out of, or gone back from.

    Args:
        training: HF's.
        action: `--on_nonfinite`.
        limit: `--max_nonfinite`.
        streaming: of the data.
    """
    if limit < 0:
        yield f"--max_nonfinite: got {limit}; expected 0 or more"
    if action == "stop":
        return
    optimizer = OptimizerNames(training.optim).value
    in_the_way = {
        "--deepspeed, which takes the optimizer's step by itself": training.deepspeed,
        "--streaming, which does not go on behind a step": streaming,
        "--save_only_model, which leaves nothing to go back to": training.save_only_model,
        f"--optim {optimizer}, which takes its steps within the backward": re.search(
            "lomo|layerwise", optimizer
        ),
    }
    for why in (why for why, is_there in in_the_way.items() if is_there):
        yield f"--on_nonfinite: got {action}; expected stop with {why}"
