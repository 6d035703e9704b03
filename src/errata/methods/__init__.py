"""Editing methods, a wing a family: ``op`` runs in the forward pass, ``editor`` is what the family shares, ``training`` finds the
parameters, and a file named after each method says only what is its own.

`errata.registry` names the methods.  A wing imports no other wing (REP, which wraps ``locate``, is the one exception) and no scorer.
"""
