"""The scorer's HTTP app on Ray Serve, which adds and removes replicas with the load.

    serve run metaalign_rl.serving.scorer_service:application model=runs/quickstart/reward

In the config files of `serve deploy` and KubeRay's RayService, this name is the `import_path`, with `args`. The number
of replicas and the resources of each are under `deployments`, for the deployment `Scorer`.
"""

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.metrics import Counter, Gauge, Histogram

from metaalign_rl.core.errors import UserError
from metaalign_rl.runtime.actor_options import NO_GPU
from reward.score import Mode
from reward.serving.client import TOKEN_VARIABLE
from reward.serving.server_metrics import NAMES, ROWS, SECONDS

SCALING = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 32}
MOST_ONGOING = 256  # requests that a replica accepts at the same time


class Arguments(BaseModel):
    """The arguments of the application.

    Attributes:
        model: the reward model's folder, on storage that every node sees, or its hub id.
        dtype: the weights' type, such as "bfloat16". Empty: bfloat16 if the hardware is fast at it, otherwise the
            checkpoint's own.
        mode: the score that `/get_reward` returns.
        max_tokens: tokens of the longest text; 0: as in training.
        gpus, cpus: per replica.
        replicas: their number; 0: it follows the load.
        without_token: accept requests without a token. Otherwise METAALIGN_REWARD_TOKEN in the replicas' environment is
            the secret that clients must send.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    dtype: str = ""
    mode: Mode = "overall"
    max_tokens: int = Field(default=0, ge=0)
    gpus: float = 0
    cpus: float = 1
    replicas: int = Field(default=0, ge=0)
    without_token: bool = False


def application(arguments: Arguments) -> serve.Application:
    """The application. Each replica loads the model and builds the app of `reward.serving`."""

    def build() -> Any:
        return build_app(arguments)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="Scorer",
        **({"num_replicas": arguments.replicas} if arguments.replicas else {"autoscaling_config": SCALING}),
        max_ongoing_requests=MOST_ONGOING,
        graceful_shutdown_timeout_s=60,
        ray_actor_options={
            "num_gpus": arguments.gpus,
            "num_cpus": arguments.cpus,
            "runtime_env": {"env_vars": {} if arguments.gpus else NO_GPU},
        },
    )
    return deployment.bind()


def build_app(arguments: Arguments) -> Any:
    """The FastAPI app of one replica.

    Raises:
        UserError: a token is needed and not set, or the reward model cannot be loaded.
    """
    from reward import Scorer
    from reward.serving.app import ServingConfig, create_app

    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and not arguments.without_token:
        raise UserError(
            f"{TOKEN_VARIABLE}: expected a secret, found none; set it where the replicas run, or give "
            "without_token=true to accept requests without a token"
        )
    scorer = Scorer.from_pretrained(
        arguments.model, dtype=arguments.dtype or None, max_tokens=arguments.max_tokens or None
    )
    name = arguments.model.rstrip("/").rpartition("/")[2]
    return create_app(scorer, ServingConfig(name, token=token, mode=arguments.mode), ServeMetrics())


class ServeMetrics:
    """The scorer's metrics in Ray, which prefixes their names with `ray_` and adds labels for deployment and replica.

    The methods are those of `reward.serving.metrics.Metrics`.
    """

    def __init__(self) -> None:
        self._requests = Counter(*NAMES["requests"], tag_keys=("path", "status"))
        self._rows = Counter(*NAMES["rows"])
        self._tokens = Counter(*NAMES["tokens"])
        self._seconds = Histogram(*NAMES["seconds"], boundaries=list(SECONDS), tag_keys=("path",))
        self._batch = Histogram(*NAMES["batch"], boundaries=list(ROWS))
        self._busy = Counter(*NAMES["busy"])
        self._queue = Gauge(*NAMES["queue"])

    def answered(self, path: str, status: int, seconds: float) -> None:
        """See `ServerMetrics`."""
        self._requests.inc(tags={"path": path, "status": str(status)})
        self._seconds.observe(max(seconds, 1e-9), tags={"path": path})

    def scored(self, rows: int, tokens: int, seconds: float) -> None:
        """See `ServerMetrics`."""
        self._rows.inc(rows)
        self._tokens.inc(tokens)
        self._busy.inc(seconds)
        self._batch.observe(rows)

    def queued(self, tokens: int) -> None:
        """See `ServerMetrics`."""
        self._queue.set(tokens)
