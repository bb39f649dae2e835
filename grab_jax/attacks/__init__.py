"""Attacks: recipes over matching, search and span. `ATTACKS[name].attack`; see `grab.attack`.

`ATTACKS[name].NEEDS` lists what each must be told.

A recipe with a `start` can be resumed from its state; one without takes seconds and is attacked batch by batch.
"""

from grab_jax.attacks import dager, grab, span

ATTACKS = {"grab": grab, "span": span, "dager": dager}
