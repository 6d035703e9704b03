"""Editing methods, one file each; `errata.registry` names them.  Methods import neither each other nor the scorers."""
