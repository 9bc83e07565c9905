"""A model by what loads it, so that another process can have the same."""

from dataclasses import dataclass, replace
from functools import lru_cache

from anchors.model.language import LanguageModel, load


@dataclass(frozen=True)
class Source:
    """What `anchors.load` takes; the attributes are its parameters."""

    model: str | None
    device: str = "auto"
    precision: str = "auto"
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def on(self, device: str) -> "Source":
        """The same elsewhere."""
        return replace(self, device=device)

    def load(self) -> LanguageModel:
        """The model; the last one that was asked for stays loaded."""
        return _loaded(self)


@lru_cache(1)
def _loaded(source: Source) -> LanguageModel:
    return load(
        source.model,
        device=source.device,
        precision=source.precision,
        device_map=source.device_map,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
    )
