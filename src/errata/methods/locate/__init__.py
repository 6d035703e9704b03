"""ROME, R-ROME, MEMIT, PMET, EMMET and AlphaEdit: a value a fact, written as a low-rank change of an MLP's last linear."""
