"""Search engines: descent, proposals, beam, vocabulary. They know functions of arrays, never models."""
