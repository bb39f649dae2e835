"""Attacks: recipes over matching, search and span. `ATTACKS[name].attack`; see `grab.attack`.

`NEEDS[name]` lists what each must be told.

A recipe with a `start` can be resumed from its state; one without takes seconds and is attacked batch by batch.

DLG (Zhu et al. 2019, arXiv 1906.08935) and TAG (Deng et al. 2021, arXiv 2103.06819) are Grab's loop with one round,
other distances and nothing learned or searched beside the embeddings; LAMP (`lamp`) adds moves of words. What makes
each is a row of settings: `attack_config.OWN`.
"""

from grab_jax.attacks import dager, grab, span
from grab_jax.attacks.needs import NEEDS as NEEDS

ATTACKS = {"grab": grab, "dlg": grab, "tag": grab, "lamp": grab, "span": span, "dager": dager}
