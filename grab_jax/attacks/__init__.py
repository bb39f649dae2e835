"""Attacks: recipes over matching and search. `ATTACKS[name]` has `attack` and `start`; see `grab.attack`."""

from grab_jax.attacks import grab

ATTACKS = {"grab": grab}
