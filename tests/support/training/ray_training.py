"""A training run whose rank is the test's process and whose experts are a cluster's actors."""

from moecluster.config import Config
from moecluster.rpc.controller.client import set_checkpoint
from moecluster.training.events import Event
from moecluster.training.loop import TrainingLoop
from moecluster.training.setup import prepare_start, read_data, run_tokenizer
from tests.support.clusters.ray_cluster import CREDENTIALS, RayCluster


def run_on(cluster: RayCluster, config: Config) -> list[Event]:
    """Returns the events of a run."""
    cluster.wait_served()
    start = prepare_start(config)
    for directory in (start, config.train.output_dir):
        cluster.driver.give_directory(str(directory))
    set_checkpoint(cluster.driver.controller_address(), str(start.resolve()), credentials=CREDENTIALS)
    tokenizer = run_tokenizer(config)
    with cluster.remote_experts(hold=True) as remote:
        loop = TrainingLoop(
            config,
            remote,
            start=start,
            data=read_data(config, tokenizer),
            tokenizer=tokenizer,
            announce=lambda path: set_checkpoint(cluster.driver.controller_address(), path, credentials=CREDENTIALS),
        )
        try:
            return list(loop.run())
        finally:
            loop.close()
