"""Looks up running clusters in the recorded files."""

from actors import cluster_file
from actors.cluster_file import UpCluster
from actors.launch import message_of_start, take_down
from actors.local_ray import is_running
from moecluster.errors import ClusterNotFound


def found(name: str) -> UpCluster:
    """Returns a running cluster by name. Raises ClusterNotFound if it is not up; forgets one whose Ray has ended."""
    cluster, start = cluster_file.load(name), cluster_file.load_start(name)
    if start is not None:
        raise ClusterNotFound(message_of_start(start))
    if cluster is None:
        raise ClusterNotFound(f"no cluster {name} is up; start one with moecluster up, or give its --name")
    if cluster.local_ray is not None and not is_running(cluster.local_ray):
        take_down(cluster)  # removes its remaining files
        raise ClusterNotFound(f"the cluster {name} has ended without moecluster down; moecluster up starts it again")
    return cluster
