"""The weight versions in use or being prepared: one, or two during an update."""

from dataclasses import dataclass, replace

from moecluster.types import WeightVersion


@dataclass(frozen=True, kw_only=True)
class WeightVersions:
    """During an update there are two versions: from when the new one starts loading until no request uses the old one.
    The new one is published in between."""

    all: tuple[WeightVersion, ...]  # one or two, the newest last
    weight_version: int  # of them: the published one, which new requests use
    last_version: int  # the highest number ever assigned

    @classmethod
    def only(cls, version: WeightVersion) -> "WeightVersions":
        """Returns a single version, as in a new cluster."""
        return cls(all=(version,), weight_version=version.version, last_version=version.version)

    @property
    def checkpoint(self) -> str:
        """The directory of the published version."""
        return next(v.checkpoint for v in self.all if v.version == self.weight_version)

    @property
    def written_with(self) -> tuple[WeightVersion, ...]:
        """The versions in use by requests, oldest first: replicas are loaded in all of them."""
        return tuple(v for v in self.all if v.version <= self.weight_version)

    @property
    def old(self) -> int:
        """The version that running requests may still use and new ones do not; 0: none."""
        return next((v.version for v in self.all if v.version < self.weight_version), 0)

    @property
    def next(self) -> WeightVersion | None:
        """The version that is being prepared."""
        return self.all[-1] if self.all[-1].version > self.weight_version else None

    def with_next(self, checkpoint: str) -> "WeightVersions":
        """Returns these with a new version to be prepared."""
        assert len(self.all) == 1, "one version at a time is prepared"
        version = WeightVersion(version=self.last_version + 1, checkpoint=checkpoint)
        return replace(self, all=(*self.all, version), last_version=version.version)

    def with_next_published(self) -> "WeightVersions":
        """Returns these with the prepared version published."""
        assert self.next is not None
        return replace(self, weight_version=self.next.version)

    def without_others(self) -> "WeightVersions":
        """Returns the published version alone."""
        return replace(self, all=tuple(v for v in self.all if v.version == self.weight_version))

    def with_checkpoint(self, checkpoint: str) -> "WeightVersions":
        """Returns these with another directory for the published version."""
        return replace(
            self,
            all=tuple(replace(v, checkpoint=checkpoint) if v.version == self.weight_version else v for v in self.all),
        )
