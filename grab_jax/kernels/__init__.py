"""Array kernels that know neither leaves nor models."""
