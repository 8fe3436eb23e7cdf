"""Downstream tasks through lm-eval's own API, on simulated hardware.

Noise is drawn from a hash of a request's own tokens, and a noisy model gets one request a forward,
so a score depends neither on the batch size nor on which other requests there are.
"""

import hashlib
import logging
import statistics
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.registry import register_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from torch import Tensor

from aixsim_cli.errors import UserError
from aixsim_cli.eval.measure import load_for_generation
from aixsim_cli.models.load import LanguageModel
from aixsim_cli.run.device import device_type
from aixsim_cli.transforms.choice import read_choice

logger = logging.getLogger("aixsim")

# its decorators hide its types
_HFLM: Any = HFLM
# where no device was asked for, whatever the machine has
_LM_EVALS_DEVICE = EvaluatorConfig().device
# what HFLM says of every model that it did not load itself
_OF_EVERY_MODEL = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model")


class SimulatedLM(_HFLM):
    """lm-eval's Hugging Face model around one of ours.

    Args:
        pretrained: a loaded model, or a source for lm-eval's own command: a torchtitan checkpoint,
            a folder or a hub name.
        noise_seed: of the hardware's noise.
        transform_config: a transform file to use instead of the source's own.
        options: HFLM's.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        noise_seed: int = 0,
        transform_config: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if isinstance(pretrained, str):
            device = _device(options.get("device"))
            pretrained = load_for_generation(
                pretrained,
                read_choice(transform_config),
                trust_remote_code=options.get("trust_remote_code") is True,
                device=device,
            )
        self.simulated = pretrained
        self.noise_seed = int(noise_seed)
        module: Any = pretrained.module
        super().__init__(
            pretrained=module,
            tokenizer=pretrained.tokenizer,
            # a row's noise depends on its place in the batch
            batch_size=1 if pretrained.state is not None else batch_size,
            max_length=pretrained.seq_len,
            **{k: v for k, v in options.items() if k not in ("device", "max_length")},
        )

    def _draw_noise_of(self, tokens: Tensor) -> None:
        if self.simulated.state is None:
            return
        content = f"{self.noise_seed}/{tokens.tolist()}".encode()
        digest = hashlib.blake2b(content, digest_size=7).digest()
        self.simulated.state.begin_step(int.from_bytes(digest, "little"))

    def _model_call(self, inps: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self._draw_noise_of(inps)
        return super()._model_call(inps, *arguments, **keywords)

    def _model_generate(self, context: Any, *arguments: Any, **keywords: Any) -> Tensor:
        self._draw_noise_of(context)
        return super()._model_generate(context, *arguments, **keywords)


register_model("aixsim")(SimulatedLM)
logging.getLogger(HFLM.__module__).addFilter(
    lambda record: not record.getMessage().startswith(_OF_EVERY_MODEL)
)


def _device(asked: str | None) -> str | None:
    """The device to run on; None = the accelerator that is there, else the CPU."""
    if asked != _LM_EVALS_DEVICE or torch.cuda.is_available():
        return asked
    logger.warning("no %s here, which is lm-eval's default: running on %s", asked, device_type())
    return None


def evaluate(
    model: LanguageModel,
    tasks: list[str],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 1,
    include_path: Path | None = None,
    repeats: int = 1,
) -> dict[str, Any]:
    """Score a model on tasks.

    Args:
        model: loaded with `for_generation=True`.
        tasks: lm-eval's names, or files of its YAML.
        num_fewshot: examples in a prompt; None = what the task says.
        limit: requests a task, or a fraction of them below 1; None = all.
        batch_size: requests a forward, of a model without noise.
        include_path: folder of task files.
        repeats: how often, each time with another noise seed.

    Returns:
        lm-eval's result. With more than one repeat its numbers are the means over them, without
        standard errors, and `repeats` holds mean, standard deviation and values of every metric.

    Raises:
        UserError: a task that lm-eval does not know, or repeats of a model without noise.
    """
    if repeats > 1 and model.state is None:
        raise UserError(
            f"--repeats: got {repeats}; a digital model gives the same result each time"
        )
    manager = cast(Any, TaskManager)(include_path=str(include_path) if include_path else None)
    unknown = [task for task in tasks if task not in manager.all_tasks and not _is_file(task)]
    if unknown:
        raise UserError(f"--tasks: lm-eval knows no {', '.join(unknown)}; see `lm-eval ls tasks`")
    runs: list[dict[str, Any]] = []
    for seed in range(repeats):
        lm = SimulatedLM(model, noise_seed=seed, batch_size=batch_size)
        found = simple_evaluate(
            model=lm,
            tasks=cast(Any, tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0 if repeats > 1 else 1000,
        )
        # simple_evaluate gives nothing on ranks other than 0
        runs.append(cast(dict[str, Any], found))
    return runs[0] if repeats == 1 else _summary(runs)


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) and Path(task).is_file()


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    result = dict(runs[0])
    means: dict[str, dict[str, Any]] = {}
    repeats: dict[str, dict[str, Any]] = {}
    for task, row in runs[0]["results"].items():
        means[task] = {key: value for key, value in row.items() if "_stderr," not in key}
        repeats[task] = {}
        for metric, value in means[task].items():
            if not isinstance(value, int | float) or "," not in metric:
                continue
            values = [run["results"][task][metric] for run in runs]
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            repeats[task][metric] = {"mean": mean, "stdev": deviation, "values": values}
            means[task][metric] = mean
    result["results"], result["repeats"] = means, repeats
    if "groups" in result:
        result["groups"] = {name: means[name] for name in result["groups"]}
    return result


def table(result: dict[str, Any]) -> str:
    """lm-eval's own table of a result; of repeats, with their deviation for its standard error."""
    if "repeats" not in result:
        return make_table(result)
    rows = {task: dict(row) for task, row in result["results"].items()}
    seeds = 0
    for task, metrics in result["repeats"].items():
        for metric, found in metrics.items():
            name, _, kind = metric.partition(",")
            rows[task][f"{name}_stderr,{kind}"] = found["stdev"]
            seeds = len(found["values"])
    # as wide as the heading that it replaces
    shown = make_table(result | {"results": rows}).replace("Stderr", "Stdev ", 1)
    return f"{shown}\nValue and Stdev: mean and standard deviation over {seeds} noise seeds"


def run_lm_eval_command(argv: list[str]) -> None:
    """lm-eval's own command line, with the model type `aixsim` and our folders known to it.

    Args:
        argv: its arguments: `run --model aixsim --model_args pretrained=DIR --tasks …`.
    """
    import sys

    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
