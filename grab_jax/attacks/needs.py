"""What an attack must be told about the client, in the same words for every attack."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """One phrase each: `yes`, `no`, or what it does without."""

    labels: str
    lengths: str
    batch_size: str
    dropout: str
    embedding_gradient: str
    auxiliary_data: str

    def sentence(self) -> str:
        """All of them, for the log of a run."""
        return "; ".join(f"{name.replace('_', ' ')}: {phrase}" for name, phrase in self._asdict().items())
