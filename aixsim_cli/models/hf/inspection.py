"""What a model folder's files say, looked at before and after transformers loads them.

transformers reads a damaged folder as far as it can, and what it then says names no file. Here
each file is looked at first: the JSON, the index and the headers of the weights, no weight itself.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from aixsim_cli.errors import ConfigError, RunError, UserError, reason_of, shown
from aixsim_cli.models.hf.config import METHOD
from aixsim_cli.settings.json_object import load_json_object

_OBJECTS = ("config.json", "generation_config.json")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_ADAPTER = "adapter_config.json"
_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions", "n_embd",
    "n_layer", "n_head",
)  # fmt: skip
# of generation_config.json
_NUMBERS = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "temperature",
    "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size", "guidance_scale",
    "num_return_sequences", "pad_token_id", "bos_token_id",
)  # fmt: skip
# what a version of this package writes into `quantization_config`
_OURS = {"quant_method", "schema_version", "transform", "modules", "dequantize"}


@contextmanager
def libraries_told(source: str) -> Iterator[None]:
    """Make a user's error, with the source in it, of whatever a library raises in the block.

    Raises:
        UserError: of any exception but a run's, a want of memory, and the user's errors themselves.
    """
    try:
        yield
    except UserError as error:
        # what the model's own sections say of themselves does not know whose they are
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        named = (source, str(Path(source)))
        told = [p if p.startswith(named) else f"{source}/config.json: {p}" for p in problems]
        raise ConfigError(told) from error
    except (RunError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors and torch raise what they like
        kind, expected = "cannot be loaded", "a whole model, of a kind that this transformers knows"
        if not Path(source).is_dir():
            kind = "no such folder, and not loaded from the hub"
            expected = "a folder, or a name on the hub and a connection to it"
        reason = reason_of(error)
        if "--trust" not in reason and "expected" not in reason:
            reason += f"; expected {expected}"
        raise UserError(f"{source}: {kind}: {reason}") from error


def check_config(folder: Path) -> None:
    """See that config.json and generation_config.json can be what they should be.

    Raises:
        UserError: naming file, key and value.
    """
    found = {
        name: load_json_object(folder / name) for name in _OBJECTS if (folder / name).is_file()
    }
    for name, values in found.items():
        check_numbers_of(values, str(folder / name))
    for key, value in found.get("generation_config.json", {}).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _NUMBERS and value is not None and not is_number:
            where = folder / "generation_config.json"
            raise UserError(f"{where}: {key}: got {shown(value)}; expected a number")
    config = found.get("config.json")
    if config is None:
        raise UserError(f"{folder}: has no config.json; expected a Hugging Face model folder")
    path = folder / "config.json"
    if (folder / _ADAPTER).is_file():
        # transformers would put it into the model, without a word
        raise UserError(
            f"{folder / _ADAPTER}: an adapter beside a model; expected folders of their own, or "
            "the model as PEFT's merge_and_unload gives it"
        )
    if not config:
        raise UserError(f"{path}: cannot be loaded: is empty; expected a model's config")
    for key in _POSITIVE:
        value = config.get(key)
        # a list has one for each layer
        if value is None or isinstance(value, list | dict):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {key}: got {shown(value)}; expected an integer of at least 1")
    _check_quantization(config.get("quantization_config"), path)


def check_numbers_of(section: Mapping[str, Any], where: str) -> None:
    """See that every number of a config is one.

    Args:
        section: of a config.json or generation_config.json.
        where: file, and keys that lead to it.

    Raises:
        UserError: naming the first that is NaN, or infinite. A list may hold infinite bounds, as
            Mamba's `time_step_limit` does.
    """
    for key, value in section.items():
        if isinstance(value, Mapping):
            check_numbers_of(value, f"{where}: {key}")
        for number in value if isinstance(value, list | tuple) else [value]:
            is_bound = number is not value and number in (math.inf, -math.inf)
            if isinstance(number, float) and not math.isfinite(number) and not is_bound:
                raise UserError(f"{where}: {key}: got {number}; expected a number")


def _check_quantization(section: Any, path: Path) -> None:
    where = f"{path}: quantization_config"
    if section is None:
        return
    if not isinstance(section, dict):
        raise UserError(f"{where}: got {shown(section)}; expected an object with quant_method")
    method = section.get("quant_method")
    if method != METHOD:
        # transformers would load the stored numbers as they are, with a warning
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            known = ", ".join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
            raise UserError(f"{where}: quant_method: got {shown(method)}; expected one of: {known}")
        return
    unknown = sorted(section.keys() - _OURS)
    if unknown:
        raise UserError(
            f"{where}: {unknown[0]}: unknown key; expected {', '.join(sorted(_OURS))}, or the "
            "version of aixsim that wrote it"
        )
    if not isinstance(section.get("transform"), dict):
        raise UserError(
            f"{where}: transform: got {shown(section.get('transform'))}; expected an object"
        )
    if not isinstance(section.get("dequantize", False), bool):
        raise UserError(
            f"{where}: dequantize: got {shown(section['dequantize'])}; expected true or false"
        )
    modules = section.get("modules")
    if modules is not None and (not isinstance(modules, int) or modules < 0):
        raise UserError(f"{where}: modules: got {shown(modules)}; expected how many are simulated")


def check_weights(folder: Path) -> list[Path]:
    """See that the files of weights are all there, and whole.

    Returns:
        The files.

    Raises:
        UserError: naming the file, and the tensor where it is one.
    """
    names = [name for name in ("model.safetensors",) if (folder / name).is_file()]
    listed: dict[str, str] = {}
    for index in _INDEXES:
        if (folder / index).is_file():
            listed |= _index(folder / index)
    names += [name for name in sorted(set(listed.values())) if name not in names]
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: missing; expected every file that the index of the weights names"
            )
        if not name.endswith(".safetensors"):
            continue
        types = safetensors_types(folder / name)
        lost = [tensor for tensor, file in listed.items() if file == name and tensor not in types]
        if lost:
            raise UserError(
                f"{folder / name}: holds no {lost[0]}, which the index says is in it; expected "
                "files and index of one save"
            )
    pickles = [path for path in [folder / "pytorch_model.bin"] if path.is_file()]
    return [folder / name for name in names] or pickles


def _index(path: Path) -> dict[str, str]:
    weights = load_json_object(path).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise UserError(f"{path}: weight_map: expected an object of tensor and file names")
    for file in weights.values():
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts:
            raise UserError(
                f"{path}: weight_map: got {shown(file)}, a file outside the folder; expected one "
                "in it"
            )
    return weights


def safetensors_types(path: Path) -> dict[str, str]:
    """Tensor name -> type ("F32", "I64", …) of a safetensors file; its header alone is read.

    Raises:
        UserError: it is cut, or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors' own class, OSError, and more for a strange header
        size = path.stat().st_size
        raise UserError(
            f"{path}: damaged: {size} bytes that are no whole safetensors file "
            f"({reason_of(error)}); expected the file as it was saved"
        ) from error


def check_types(files: Iterable[Path], parameters: Iterable[str]) -> None:
    """See that the weights are stored as floating-point numbers: transformers casts any others.

    Args:
        files: of `check_weights`, which have been loaded.
        parameters: names of the model's; those in the files may lack its prefix, or have one.

    Raises:
        UserError: naming file, tensor and type. Buffers may be integers.
    """
    known = list(parameters)
    for path in files:
        for name, kind in _types(path).items():
            if kind.lower().startswith(("f", "bf")):
                continue
            is_weight = name.endswith((".weight", ".ranges"))
            if is_weight or any(_is_same(name, parameter) for parameter in known):
                raise UserError(
                    f"{path}: {name}: is stored as {kind}; expected floating-point numbers, or a "
                    "quantization_config in config.json that says how to read it"
                )


def _types(path: Path) -> dict[str, str]:
    if path.suffix == ".safetensors":
        return safetensors_types(path)
    # on the meta device no weight is read
    found = torch.load(path, map_location="meta", weights_only=True)
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    return {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}


def _is_same(name: str, other: str) -> bool:
    return name == other or name.endswith(f".{other}") or other.endswith(f".{name}")


def check_fit(info: dict[str, Any], own: Iterable[str], source: str) -> None:
    """See that the weights that were found are those of the model that config.json describes.

    Args:
        info: `output_loading_info` of `from_pretrained`.
        own: names of the model's own tensors.
        source: folder or hub name.

    Raises:
        UserError: a weight is missing, has another shape, or is of a layer that the model lacks.
    """
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{source}: {name}: the file has the shape {tuple(stored)}, config.json asks for "
            f"{tuple(expected)}; expected a config.json of the model's sizes"
        )
    lost = sorted(info["missing_keys"])
    if lost:
        # transformers fills them with random numbers
        raise UserError(
            f"{source}: lacks {len(lost)} weights: {', '.join(lost[:3])}, …; expected a whole "
            "model, and a config.json of its sizes"
        )
    kinds = {_numberless(name) for name in own}
    beyond = sorted(name for name in info["unexpected_keys"] if _numberless(name) in kinds)
    if beyond:
        raise UserError(
            f"{source}: has {len(beyond)} weights of layers that config.json does not count: "
            f"{', '.join(beyond[:3])}, …; expected its num_hidden_layers to be the model's"
        )

    others = sorted(name for name in info["unexpected_keys"] if _is_of_the_model(name, kinds))
    if others:
        raise UserError(
            f"{source}: holds {others[0]}, which the model of config.json does not read; expected "
            "a config.json that says so (of a bias, or of how the weights are quantised)"
        )


def _is_of_the_model(name: str, kinds: Collection[str]) -> bool:
    """Whether a tensor that no module reads goes with a weight that one reads."""
    kind = _numberless(name)
    of = re.sub(r"(\.bias|[._](weight_)?(scale(s|_inv)?|absmax|qzeros|g_idx))$", "", kind)
    if of == kind:
        return False
    # a file of a base model has no prefix
    return any(_is_same(f"{of}.weight", known) or _is_same(of, known) for known in kinds)


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", name)
