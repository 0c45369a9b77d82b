"""The configuration: a frozen, validated model. Every key is documented in its table and only there.

`funcprobe init` writes a commented file from these descriptions.
"""

from pydantic import model_validator

from .batches import PromptsConfig, RewardConfig, RolloutsConfig, SamplingConfig
from .estimation import AttributionConfig, EntropyConfig, MeasureConfig, ObjectiveConfig, StepConfig
from .log import LogConfig
from .policy import OptimizerConfig, PolicyConfig, RunConfig
from .rules import WhatifConfig
from .section import Section
from .server import ServerConfig

__all__ = [
    "AttributionConfig",
    "Config",
    "EntropyConfig",
    "LogConfig",
    "MeasureConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutsConfig",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "ServerConfig",
    "StepConfig",
    "WhatifConfig",
]


class Config(Section):
    """A complete configuration file."""

    run: RunConfig = RunConfig()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    server: ServerConfig = ServerConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    step: StepConfig = StepConfig()
    entropy: EntropyConfig = EntropyConfig()
    measure: MeasureConfig = MeasureConfig()
    attribution: AttributionConfig = AttributionConfig()
    whatif: WhatifConfig = WhatifConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _placed_once(self) -> "Config":
        if self.policy.device_map is not None and self.run.device != "auto":
            raise ValueError(
                f'run.device = "{self.run.device}", but policy.device_map places the layers: remove '
                "one of the two"
            )
        return self

    @model_validator(mode="after")
    def _sampled_from_the_policy(self) -> "Config":
        if self.rollouts.eval is None and (self.sampling.top_p < 1 or self.sampling.top_k):
            raise ValueError(
                f"sampling.top_p = {self.sampling.top_p:g}, top_k = {self.sampling.top_k}: E must be "
                "sampled with top_p = 1 and top_k = 0, else its importance weights are ratios "
                "to the wrong distribution; set both, or supply E with rollouts.eval"
            )
        return self

    @model_validator(mode="after")
    def _server_named(self) -> "Config":
        if self.sampling.engine == "server" and (self.server.url is None or self.server.model is None):
            missing = (
                'url: the address, as "http://localhost:8000"'
                if self.server.url is None
                else "model: the name under which the server has the adapter"
            )
            raise ValueError(f'sampling.engine = "server" needs server.{missing}')
        return self
