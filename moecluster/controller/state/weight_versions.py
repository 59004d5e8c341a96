"""The weight versions that stand: one, or two while weights are replaced."""

from dataclasses import dataclass, replace

from moecluster.types import WeightVersion


@dataclass(frozen=True, kw_only=True)
class WeightVersions:
    """A new version stands beside the old one from when it begins to be loaded until no text is written with the old
    one any more; in between it is published."""

    all: tuple[WeightVersion, ...]  # one or two, the newest last
    weight_version: int  # of them: the one that new texts are written with
    last_version: int  # the highest number that was ever given

    @classmethod
    def only(cls, version: WeightVersion) -> "WeightVersions":
        """One version, as a cluster begins."""
        return cls(all=(version,), weight_version=version.version, last_version=version.version)

    @property
    def checkpoint(self) -> str:
        """The directory of the version that new texts are written with."""
        return next(v.checkpoint for v in self.all if v.version == self.weight_version)

    @property
    def written_with(self) -> tuple[WeightVersion, ...]:
        """The versions that texts may be written with now, the oldest first: replicas are loaded in all of them."""
        return tuple(v for v in self.all if v.version <= self.weight_version)

    @property
    def old(self) -> int:
        """The version of which texts may still be written although new ones are not; 0: none."""
        return next((v.version for v in self.all if v.version < self.weight_version), 0)

    @property
    def next(self) -> WeightVersion | None:
        """The version that is being prepared."""
        return self.all[-1] if self.all[-1].version > self.weight_version else None

    def with_next(self, checkpoint: str) -> "WeightVersions":
        """A new version is prepared beside the one that stands."""
        assert len(self.all) == 1, "one version at a time is prepared"
        version = WeightVersion(version=self.last_version + 1, checkpoint=checkpoint)
        return replace(self, all=(*self.all, version), last_version=version.version)

    def with_next_published(self) -> "WeightVersions":
        """New texts are written with the version that was prepared."""
        assert self.next is not None
        return replace(self, weight_version=self.next.version)

    def without_others(self) -> "WeightVersions":
        """Only the version that new texts are written with stands."""
        return replace(self, all=tuple(v for v in self.all if v.version == self.weight_version))

    def with_checkpoint(self, checkpoint: str) -> "WeightVersions":
        """The version that new texts are written with is that of another directory."""
        return replace(
            self,
            all=tuple(replace(v, checkpoint=checkpoint) if v.version == self.weight_version else v for v in self.all),
        )
