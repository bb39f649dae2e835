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


_SEARCH = Needs(
    labels="told, else searched",
    lengths="told, else the longest of the batch",
    batch_size="yes",
    dropout="its rate and sites; the masks are searched",
    embedding_gradient="no",
    auxiliary_data="no",
)
_PLAIN = _SEARCH._replace(dropout="ignored, or its rate with --attack_masks=learn")
_DECODED = _SEARCH._replace(labels="no", lengths="no", batch_size="no", dropout="on or off; its rate may be unknown")

NEEDS = {
    "grab": _SEARCH,
    "dlg": _PLAIN,
    "tag": _PLAIN,
    "lamp": _PLAIN._replace(auxiliary_data="text or a causal language model for --attack_prior, if any"),
    "span": _DECODED,
    "dager": _DECODED._replace(batch_size="yes, for what does not fit", dropout="off"),
}
"""Of every attack by its name."""
