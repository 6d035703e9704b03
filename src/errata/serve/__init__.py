"""`errata serve`: one model over HTTP under any stack of patches, and the ledger's edits made and taken back beside the answering.

`refusals` what is said no to; `options` limits and addresses; `stacks` names to stacks; `rows`, `plans`, `cohorts` and `answering` make
answers; `jobs` and `editor` make edits; `questions` ask the model other things; `service` holds these together; `schemas`, `documents`,
`routes_*`, `guard`, `metrics` and `app` are HTTP; `running` starts and stops.  Only `errata.serve.app` and what it imports need the extra
``serve``.
"""
