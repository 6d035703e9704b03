"""The subcommands of ``errata``, one module each.  A module has ``add`` (its arguments; imports nothing heavy) and ``run``."""
