"""A model as a Hugging Face folder: written in one of three forms, read in any.

- `aixsim` (default): config.json names the quantization method `aixsim` and holds the transform;
  the ranges are in the safetensors files. After `import aixsim_cli` every loader restores it.
- `strict`: the same under a `model_type` that only aixsim knows: nothing loads it digitally.
- `plain`: digital weights, with `transform.yaml` and `transform.safetensors` beside them.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from aixsim_cli.errors import UserError, shown
from aixsim_cli.models.form import Form
from aixsim_cli.models.hf.config import METHOD, AixsimConfig, transform_of
from aixsim_cli.models.hf.inspection import (
    check_config,
    check_fit,
    check_numbers_of,
    check_types,
    check_weights,
    libraries_told,
    safetensors_types,
)
from aixsim_cli.models.hf.strict import MODEL_TYPE, make_strict
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.settings.formats import dump_yaml
from aixsim_cli.settings.json_object import load_json_object
from aixsim_cli.transforms.choice import DIGITAL, KEEP_OWN, Choice
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.loaded import check_numbers
from aixsim_cli.transforms.read import (
    asks_for_lora,
    missing_paradigms,
    read_transform,
    require_paradigms,
)

logger = logging.getLogger("aixsim")
TRANSFORM_FILE = "transform.yaml"
TRANSFORM_STATE_FILE = "transform.safetensors"


def write_model(
    model: PreTrainedModel, folder: Path, form: Form = "aixsim", **options: Any
) -> None:
    """Write weights, config.json in the forms of transformers 4 and 5, generation_config.json.

    Args:
        model: digital, or simulated by `transform_hf_model`.
        folder: to write into.
        form: see above; a digital model has one form.
        options: of `save_pretrained`, `max_shard_size` for instance.
    """
    if getattr(model, "generation_config", None) is None and model.can_generate():
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder, **options)
    finish_folder(model, folder, form)


def finish_folder(model: PreTrainedModel, folder: Path, form: Form) -> None:
    """Bring a folder that `save_pretrained` wrote into its form, config.json included.

    Args:
        model: as saved.
        folder: that holds it.
        form: see above.
    """
    transform = transform_of(model)
    if transform is not None and form == "plain":
        _make_plain(folder, transform)
    _complete_config(folder / "config.json")
    if transform is not None and form == "strict":
        make_strict(folder)


def load_model(
    source: str,
    transform: Choice = KEEP_OWN,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model with the transform it was saved with, another one, or none.

    Ranges that were saved are kept where the other transform has the same module.

    Args:
        source: folder or hub name.
        transform: to simulate.
        trust_remote_code: run Python code that the model brings.
        options: of `from_pretrained`: dtype, revision, token, ….

    Raises:
        UserError: it cannot be loaded.
        ConfigError: the transform does not fit.
    """
    config = load_config(source, trust_remote_code=trust_remote_code, **options)
    files = check_weights(Path(source)) if Path(source).is_dir() else []
    with libraries_told(source):
        own = getattr(config, "quantization_config", None) or {}
        is_ours = own.get("quant_method") == METHOD
        if is_ours and transform is not KEEP_OWN:
            config.quantization_config = _with_choice(source, own, transform).to_dict()
        elif is_ours:
            require_paradigms(own.get("transform"), source=source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            trust_remote_code=bool(trust_remote_code),
            # told by `check_fit`, with both shapes
            ignore_mismatched_sizes=True,
            **options,
        )
        model, info = loaded
        if is_ours or not own:
            check_types(files, (name for name, _ in model.named_parameters()))
    check_fit(info, model.state_dict(), source)
    if is_ours and own.get("dequantize") and transform is KEEP_OWN:
        logger.warning("%s/config.json: dequantize is true: the model is loaded digitally", source)
    if transform is KEEP_OWN and not own:
        _check_no_ranges(info["unexpected_keys"], source)
    check_numbers(dict(model.named_parameters()) | ranges_of(model), source)
    if not is_ours and transform is not DIGITAL:
        _simulate(model, source, transform)
    return model


def _simulate(model: PreTrainedModel, source: str, transform: Choice) -> None:
    """Put the transform that is asked for, or a plain folder's own, into what came digitally."""
    ranges = _ranges_beside(Path(source))
    config = transform if isinstance(transform, TransformConfig) else None
    if config is None and ranges is not None:
        config = read_transform(Path(source) / TRANSFORM_FILE, saved=True)
    if config is None:
        return
    transform_hf_model(model, config)
    if ranges is not None:
        _load_ranges(model, ranges, source, is_own=transform is KEEP_OWN)


def _check_no_ranges(unexpected: Iterable[str], source: str) -> None:
    ranges = sorted(name for name in unexpected if name.endswith(".ranges"))
    if ranges:
        raise UserError(
            f"{source}/config.json: names no hardware, and the weights hold {ranges[0]}; expected "
            "its quantization_config as it was saved, or --no-transform"
        )


def load_config(source: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """A model's config.json as transformers reads it; everything that needs one loads it here.

    Args:
        source: folder or hub name.
        trust_remote_code: run Python code that the model brings.
        options: as of `load_model`.

    Raises:
        UserError: it cannot be loaded, names code to be downloaded, or holds what is no number.
    """
    shared = {k: options[k] for k in ("revision", "token", "cache_dir") if k in options}
    if Path(source).is_dir():
        check_config(Path(source))
    with libraries_told(source):
        # False, not None: transformers would ask, and take what stdin says for an answer
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=bool(trust_remote_code), **shared
        )
    if weights := getattr(config, "transformers_weights", None):
        raise UserError(
            f"{source}/config.json: transformers_weights: got {shown(weights)}; expected none, and "
            "the weights in files of their usual names: others are not looked at"
        )
    if not trust_remote_code:
        _check_kernels(config, source)
    check_numbers_of(config.to_dict(), f"{source}/config.json")
    return config


def _check_kernels(config: Any, source: str) -> None:
    """transformers downloads and runs attention kernels that a config names as owner/name."""
    for key in ("_attn_implementation", "_experts_implementation"):
        for name, value in _implementations(config, key, key.removeprefix("_")):
            if "/" in value:
                raise UserError(
                    f"{source}/config.json: {name}: got {value}, code on the hub that would be "
                    "run; expected none, or --trust-remote-code"
                )


def _implementations(config: Any, key: str, name: str) -> Iterator[tuple[str, str]]:
    """What a config, and those of its parts, name as an implementation."""
    value = getattr(config, key, None)
    if isinstance(value, Mapping):
        yield from ((f"{name}: {part}", str(of)) for part, of in value.items())
    elif value is not None:
        yield name, str(value)
    for part, inner in vars(config).items():
        if isinstance(inner, PretrainedConfig):
            yield from _implementations(inner, key, f"{part}: {name}")


def form_of(folder: Path) -> Form | None:
    """The form of a simulated model's folder; None for a digital one.

    Raises:
        UserError: config.json cannot be read.
    """
    if (folder / TRANSFORM_FILE).is_file():
        return "plain"
    if transform_in(folder) is None:
        return None
    is_strict = load_json_object(folder / "config.json").get("model_type") == MODEL_TYPE
    return "strict" if is_strict else "aixsim"


def transform_in(folder: Path) -> TransformConfig | None:
    """The transform config in a folder's config.json; None for a digital one, and for none.

    Raises:
        UserError: config.json cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    check_config(folder)
    own = load_json_object(path).get("quantization_config") or {}
    if own.get("quant_method") != METHOD:
        return None
    with libraries_told(str(folder)):
        saved: Any = AixsimConfig.from_dict(own)
    return saved.transform_config


def ranges_of(model: nn.Module) -> dict[str, Tensor]:
    """The ranges of a simulated model: name -> float32 (n, 2)."""
    return {k: v for k, v in model.state_dict().items() if k.endswith(".ranges")}


def _with_choice(source: str, own: dict[str, Any], choice: Choice) -> AixsimConfig:
    """What a simulated folder is loaded with in place of its own section."""
    # the weights and other transforms need nothing of what it was trained with
    saved: Any = AixsimConfig.from_dict(own | {"dequantize": True})
    if isinstance(choice, TransformConfig) and not missing_paradigms(saved.transform):
        kept: Any = AixsimConfig.from_dict(own | {"dequantize": False})
        if kept.transform_config == choice:
            return kept
    if asks_for_lora(saved.transform):
        raise UserError(
            f"{source}: a checkpoint within a low-rank run, its updates not merged yet: it loads "
            "with its own transform alone; expected the folder that the run saved at its end"
        )
    return AixsimConfig(choice) if isinstance(choice, TransformConfig) else saved


def _make_plain(folder: Path, transform: TransformConfig) -> None:
    """Move the ranges out of the weights' files, and the transform out of config.json."""
    ranges: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors = load_file(path)
        ranges |= {k: tensors.pop(k) for k in list(tensors) if k.endswith(".ranges")}
        save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))
        kept = {k: v for k, v in listed["weight_map"].items() if k not in ranges}
        _write_json(index, listed | {"weight_map": kept})
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["quantization_config"]
    _write_json(path, config)
    text = dump_yaml(dict(transform.mapping))
    (folder / TRANSFORM_FILE).write_text(text, encoding="utf-8")
    save_file(ranges, folder / TRANSFORM_STATE_FILE)


def _ranges_beside(folder: Path) -> dict[str, Tensor] | None:
    """The ranges of a plain folder; None where it is no such folder."""
    config, state = folder / TRANSFORM_FILE, folder / TRANSFORM_STATE_FILE
    if not config.is_file() and not state.is_file():
        return None
    for path in (config, state):
        if not path.is_file():
            raise UserError(
                f"{path}: missing; expected {TRANSFORM_FILE} and {TRANSFORM_STATE_FILE}"
            )
    safetensors_types(state)
    ranges = load_file(state)
    check_numbers(ranges, str(state))
    return ranges


def _load_ranges(
    model: PreTrainedModel, saved: dict[str, Tensor], source: str, *, is_own: bool
) -> None:
    """Set the ranges that a plain folder holds; of other hardware, those that both have."""
    path = Path(source) / TRANSFORM_STATE_FILE
    own = {name: tuple(ranges.shape) for name, ranges in ranges_of(model).items()}
    fitting = {k: v for k, v in saved.items() if tuple(v.shape) == own.get(k)}
    if is_own:
        for name in sorted(own.keys() | saved.keys()):
            if name in fitting:
                continue
            found = f"the shape {tuple(saved[name].shape)}" if name in saved else "nothing"
            wanted = f"the shape {own[name]}" if name in own else "no such ranges"
            raise UserError(
                f"{path}: {name}: got {found}; expected {wanted}, by {TRANSFORM_FILE} and "
                "config.json: the files as they were saved together"
            )
    model.load_state_dict(fitting, strict=False)


def weights_in(folder: Path) -> list[Path]:
    """The files of a folder that weights and ranges are read of.

    Raises:
        UserError: as `check_weights`.
    """
    beside = folder / TRANSFORM_STATE_FILE
    return check_weights(folder) + [beside] * beside.is_file()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _complete_config(path: Path) -> None:
    """Add the keys that transformers 4 reads; without them it assumes theta 10000, unscaled."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    config["torch_dtype"] = config.get("dtype") or str(torch.float32).removeprefix("torch.")
    _write_json(path, config)
