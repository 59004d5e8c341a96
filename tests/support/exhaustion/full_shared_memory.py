"""Expert actors and a router in a process whose /dev/shm is full. Rows still travel through shared memory: its segments
are files of the kernel's own, which no mounted file system bounds.

python -m tests.support.exhaustion.full_shared_memory CHECKPOINT, where /dev/shm is of this process alone.
"""

import sys
from pathlib import Path

from tests.support.clusters.expert_cluster import ExpertCluster
from tests.support.exhaustion.full_disk import full
from tests.support.expert.small_actor import load_modules
from tests.support.expert.small_layer import check_served


def main() -> None:
    """Fails if a lane is refused, or an answer is wrong."""
    checkpoint = Path(sys.argv[1])
    with full(Path("/dev/shm")), ExpertCluster(checkpoint, transport="shm") as cluster:
        for seed in range(3):
            check_served(cluster.remote, load_modules(checkpoint), seed)
        assert {lane.lane for lane in cluster.pool.lanes()} == {"shm"}


if __name__ == "__main__":
    main()
