"""grab_jax: measure how much private text leaks from federated language-model updates, by reconstructing it."""
