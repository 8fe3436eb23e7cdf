"""Put a transform into a torchtitan model, at the seam torchtitan offers: a model converter."""

import logging
from typing import Any

from torch import nn
from torchtitan.distributed import ParallelDims

from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.models.titan.sites import titan_sites
from aixsim_cli.pretrain import compat
from aixsim_cli.transforms.apply import apply_transform
from aixsim_cli.transforms.state import TransformState

logger = logging.getLogger("aixsim")


class TransformConverter:
    """Applies the config's `transform` section (torchtitan's `ModelConverter` protocol)."""

    def __init__(self, job_config: PretrainConfig, parallel_dims: ParallelDims) -> None:
        assert job_config.transform_config is not None
        self.config = job_config.transform_config
        self.state: TransformState | None = None

    def convert(self, model: nn.Module) -> None:
        """Replace modules in place; the model is on the meta device."""
        self.state, report = apply_transform(model, self.config, titan_sites(model))
        for line in str(report).splitlines():
            logger.info(line)
        compat.reset_after_init(model, self.state)

    def post_optimizer_hook(self, model: Any) -> None:
        """Update the ranges, once a step."""
        assert self.state is not None
        self.state.end_step()
