"""The model card of a trained folder: how to load it, what was simulated, how it was trained."""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from aixsim_cli import __version__
from aixsim_cli.continual.arguments import Arguments, without_secrets
from aixsim_cli.models.hf.config import transform_of
from aixsim_cli.settings.formats import dump_yaml
from aixsim_cli.transforms.config import TransformConfig

_SHOWN = ("train_loss", "eval_loss", "perplexity", "train_runtime", "epoch")
CARD_FILE = "README.md"

_LOAD = """```python
import aixsim_cli  # without this line the model loads without its hardware{loud}
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

Programs that load models themselves need that import too:
`python -c "import aixsim_cli; from transformers.cli.transformers import main; main()" serve {name}`
is `transformers serve`, and `aixsim eval lm-eval -- run …` is lm-eval."""


def write_card(
    folder: Path, model: PreTrainedModel, arguments: Arguments, metrics: dict[str, Any]
) -> None:
    """Write `README.md` into a saved model's folder.

    Args:
        folder: to write into; the card is named after `--output_dir`.
        model: as saved.
        arguments: of the run; tokens among them are left out.
        metrics: of training and evaluation.
    """
    transform = transform_of(model)
    data = ModelCardData(
        library_name="transformers",
        base_model=arguments.model.model_name_or_path,
        datasets=arguments.data.dataset_name if _on_hub(arguments) else None,
        tags=["aixsim", *(transform.name.split("+") if transform else [])],
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(transform, arguments, metrics)}"
    ModelCard(text).save(folder / CARD_FILE)


def _on_hub(arguments: Arguments) -> bool:
    return arguments.data.dataset_name not in (None, "builtin")


def _body(
    transform: TransformConfig | None,
    arguments: Arguments,
    metrics: dict[str, Any],
) -> str:
    folder = Path(str(arguments.training.output_dir)).absolute().name
    parts = [f"# {folder}", f"Trained with aixsim {__version__}."]
    if transform is not None:
        loud = ": it does not load at all" if arguments.simulation.form == "strict" else ""
        described = dump_yaml(dict(transform.mapping)).strip()
        parts += [
            f"Its linear layers and attention run on simulated hardware: **{transform.name}**.",
            "Continue it, evaluate it or sample it with `aixsim`, which reads this folder as it is."
            if arguments.simulation.form == "plain"
            else _LOAD.format(name=folder, loud=loud),
            "Runtimes that replace transformers' layers (vLLM, llama.cpp) cannot simulate it.",
            "## Transform",
            f"```yaml\n{described}\n```",
        ]
    command = shlex.join(["aixsim", "continual-pretrain", *without_secrets(arguments.command)])
    parts += ["## Training", f"```bash\n{command}\n```", "## Results"]
    rows = [f"| {key} | {metrics[key]:.6g} |" for key in _SHOWN if key in metrics]
    parts.append("\n".join(["| metric | value |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"
